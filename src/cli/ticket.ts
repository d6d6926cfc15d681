/** The file that `memferry park` wrote. */
import { readFile } from 'node:fs/promises';
import { memferryError } from '../errors.js';
import { parseTicket } from '../options.js';
import type { ParkTicket } from '../source/park.js';

/** @throws INVALID_ARGUMENT */
export async function ticketFrom(path: string): Promise<ParkTicket> {
  try {
    return parseTicket(JSON.parse(await readFile(path, 'utf8')));
  } catch (error) {
    throw memferryError('INVALID_ARGUMENT', `${path} is no ticket of a parked guest`, { cause: error });
  }
}
