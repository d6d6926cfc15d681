/** What both sides of a move say alike: the secret, whether an open network is allowed, how long the other side may take. */
import type { Command } from 'commander';
import { duration } from './parse-values.js';

export interface ConnectionFlags {
  secretFile?: string;
  plaintext?: boolean;
}

export function addConnectionFlags(command: Command): Command {
  return command
    .option('--secret-file <file>', 'the shared secret, mode 0600 (default on loopback: made automatically)')
    .option('--plaintext', 'allow an address other than loopback although nothing is encrypted');
}

export function connectionOptions(flags: ConnectionFlags): { secretFile?: string; plaintext: boolean } {
  return {
    plaintext: flags.plaintext === true,
    ...(flags.secretFile === undefined ? {} : { secretFile: flags.secretFile }),
  };
}

/** Of the two sides of a move. */
export interface PeerFlags extends ConnectionFlags {
  prepareTimeout?: number;
}

export function addPeerFlags(command: Command): Command {
  return addConnectionFlags(command).option(
    '--prepare-timeout <time>',
    'for the guest, which stands still, to be made ready to run (default 10s)',
    duration,
  );
}

export function peerOptions(
  flags: PeerFlags,
): ReturnType<typeof connectionOptions> & { prepareTimeoutMs?: number } {
  const { prepareTimeout: prepareTimeoutMs } = flags;
  return { ...connectionOptions(flags), ...(prepareTimeoutMs === undefined ? {} : { prepareTimeoutMs }) };
}
