/** `memferry qemu`: a guest of an unmodified QEMU moves to another one; a command for each side. */
import type { Command } from 'commander';
import { shimPath } from '../qemu/shim.js';
import { addQemuDestination } from './qemu-destination.js';
import { addQemuSource } from './qemu-source.js';

export interface QemuFlags {
  qmp: string;
  shim: string;
}

export function addQemuFlags(command: Command): Command {
  return command
    .requiredOption('--qmp <socket>', "QEMU's QMP socket (-qmp unix:SOCKET,server=on,wait=off)")
    .requiredOption('--shim <socket>', 'what QEMU was given as MEMFERRY_SHIM_SOCKET');
}

export function addQemu(program: Command): void {
  const qemu = program.command('qemu').description('move the guest of an unmodified QEMU');
  addQemuSource(qemu);
  addQemuDestination(qemu);
  qemu
    .command('shim')
    .description('print the path of the object that QEMU is started with, as LD_PRELOAD')
    .action(() => {
      process.stdout.write(`${shimPath()}\n`);
    });
}
