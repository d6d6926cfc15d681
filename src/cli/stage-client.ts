/** A connection to one VMD server for the time of one command. */
import { isLoopback } from '../control/address.js';
import { loadSecret } from '../control/secret.js';
import { parseAddress } from '../options.js';
import { StageClient } from '../staging/client.js';
import { type ConnectionFlags, connectionOptions } from './connection-flags.js';
import { onInterrupt } from './signals.js';

export async function withStageClient<T>(
  address: string,
  flags: ConnectionFlags,
  act: (client: StageClient) => Promise<T>,
): Promise<T> {
  using interruption = onInterrupt();
  const to = parseAddress(address);
  const options = connectionOptions(flags);
  const secret = await loadSecret(options, { loopback: isLoopback(to.host) });
  const { plaintext } = options;
  await using client = await StageClient.dial({ ...to, secret, plaintext, signal: interruption.signal });
  return await act(client);
}
