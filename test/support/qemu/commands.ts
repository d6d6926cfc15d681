/** The commands that move a QEMU's guest, as one types them. */
import { command } from '../command-line.js';

interface Sockets {
  qmp: string;
  shim: string;
}

const sockets = (qemu: Sockets, secretFile: string) => [
  ...['--qmp', qemu.qmp, '--shim', qemu.shim],
  ...['--secret-file', secretFile],
];

export const destinationOf = (qemu: Sockets, secretFile: string, ...more: string[]) =>
  command('qemu', 'destination', '--listen', '127.0.0.1:0', ...sockets(qemu, secretFile), ...more);

export const sourceOf = (qemu: Sockets, port: unknown, secretFile: string, ...more: string[]) =>
  command('qemu', 'source', '--to', `127.0.0.1:${port}`, ...sockets(qemu, secretFile), ...more);

/** A VMD server's address. */
export async function stageFor(secretFile: string): Promise<string> {
  const server = command(
    ...['stage', '--listen', '127.0.0.1:0', '--memory', '512Mi', '--no-announce'],
    ...['--secret-file', secretFile],
  );
  return `127.0.0.1:${(await server.next('listening'))['port']}`;
}
