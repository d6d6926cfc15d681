/** The file that `memferry park` writes, and that claims the guest again. */
import { type FileHandle, open } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { Command } from 'commander';
import { memferryError } from '../errors.js';
import { parseTicket, type UnparkOptions } from '../options.js';
import { readRegularFile } from '../regular-file.js';
import type { ParkTicket } from '../source/park.js';

export interface ClaimFlags {
  rollback?: boolean;
  withLosses?: boolean;
}

export function addClaimFlags(command: Command): Command {
  return command
    .option('--rollback', 'the guest was resumed before, and whoever did it is dead and stays so')
    .option('--with-losses', 'go on without servers that are away though nobody else has their pages');
}

export function claimOptions(flags: ClaimFlags): Pick<UnparkOptions, 'rollback' | 'withLosses'> {
  return { rollback: flags.rollback === true, withLosses: flags.withLosses === true };
}

/** Of a ticket for 250 servers with names of 64 characters, far more than it takes. */
const mostTicketBytes = 2 ** 20;

/** @throws INVALID_ARGUMENT */
export async function ticketFrom(path: string): Promise<ParkTicket> {
  try {
    return parseTicket(JSON.parse((await readRegularFile(path, mostTicketBytes)).toString('utf8')));
  } catch (error) {
    throw memferryError('INVALID_ARGUMENT', `${path} is no ticket of a parked guest`, { cause: error });
  }
}

/** @throws INVALID_ARGUMENT: it is there already, or cannot be written */
export async function newTicketFile(path: string): Promise<FileHandle> {
  try {
    return await open(path, 'wx', 0o600);
  } catch (cause) {
    const why = (cause as NodeJS.ErrnoException).code === 'EEXIST' ? 'is there already' : 'cannot be written';
    throw memferryError('INVALID_ARGUMENT', `--ticket: ${path} ${why}`, { cause });
  }
}

/** All of it and nothing else, and so that it outlives a crash of this machine, under its name. */
export async function writeTicket(file: FileHandle, path: string, ticket: ParkTicket): Promise<void> {
  // Of a park that failed after it.
  await file.truncate(0);
  const bytes = Buffer.from(`${JSON.stringify(ticket)}\n`);
  for (let at = 0; at < bytes.length; ) {
    at += (await file.write(bytes, at, bytes.length - at, at)).bytesWritten;
  }
  await file.sync();
  const directory = await open(dirname(path), 'r');
  try {
    await directory.sync().catch((error: NodeJS.ErrnoException) => {
      // A file system that has no such thing.
      if (error.code !== 'EINVAL') throw error;
    });
  } finally {
    await directory.close();
  }
}
