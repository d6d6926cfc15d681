/** What a listener binds: the native part takes numeric addresses only. JavaScript thread. */
import { lookup } from 'node:dns/promises';
import { isIP } from 'node:net';
import { MemferryError } from '../errors.js';
import { untilAborted, within } from '../protocol/bounded.js';

/** As a resolver's own attempts end, at the latest. */
const lookupMs = 10_000;

/**
 * The first address of a name of this host. `localhost` is 127.0.0.1, whoever else may say what it is: it counts as
 * loopback, as other names never do, whatever address they have.
 * @throws INVALID_ARGUMENT, the signal's reason
 */
export async function numericHost(
  host: string,
  what: string,
  signal: AbortSignal = new AbortController().signal,
  resolve: (name: string) => Promise<{ address: string }> = (name) => lookup(name),
): Promise<string> {
  const bare = host.startsWith('[') && host.endsWith(']') ? host.slice(1, -1) : host;
  if (isIP(bare) !== 0) return bare;
  if (host.toLowerCase() === 'localhost') return '127.0.0.1';
  const found = within(
    resolve(host),
    lookupMs,
    'INVALID_ARGUMENT',
    `${what}: no answer to '${host}' in time`,
  );
  try {
    return (await untilAborted(found, signal)).address;
  } catch (cause) {
    if (cause instanceof MemferryError) throw cause;
    const { code = String(cause) } = cause as NodeJS.ErrnoException;
    const text = `${what}: '${host}' is no address, and as a name it has none (${code})`;
    throw new MemferryError('INVALID_ARGUMENT', text, { cause, facts: { host } });
  }
}
