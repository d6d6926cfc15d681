/** What `send` and `receive` say alike: the secret and whether an open network is allowed. */
import type { Command } from 'commander';

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
