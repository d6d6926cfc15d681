/**
 * Who else has the memory that a guest is to arrive in: a QEMU on the same host that was given the same file as its
 * `mem-path`, most of all the source. To discard what is in it would be to discard that guest.
 */
import { fstatSync, readdirSync, readFileSync } from 'node:fs';
import { setImmediate as turn } from 'node:timers/promises';
import { memferryError } from '../errors.js';

/** Where the memory is, as `sharedMappings` names it, with the backend's id. One in which nothing is has no guest in it. */
export type FilledFiles = ReadonlyMap<string, string>;

export function filledFiles(backends: readonly { id: string; descriptor: number }[]): FilledFiles {
  const filled = backends.filter(({ descriptor }) => fstatSync(descriptor).blocks > 0);
  return new Map(filled.map(({ id, descriptor }) => [placeOf(descriptor), id]));
}

/** The kernel writes them as they are read: to wait for another thread to do that takes longer than they do. */
const processesAtOnce = 32;

/**
 * @param owner the QEMU whose memory it is
 * @throws PREPARE_FAILED with the process; nothing where /proc does not let one look
 */
export async function requireMappedByNoOther(files: FilledFiles, owner: number): Promise<void> {
  if (files.size === 0) return;
  const places = [...files.keys()];
  let looked = 0;
  for (const name of readdirSync('/proc')) {
    const pid = Number(name);
    if (!Number.isInteger(pid) || pid === owner || pid === process.pid) continue;
    if (++looked % processesAtOnce === 0) await turn();
    const maps = mapsOf(pid);
    if (!places.some((place) => maps.includes(place))) continue;
    const place = sharedMappings(maps).find((at) => files.has(at));
    if (place === undefined) continue;
    const id = files.get(place);
    throw memferryError(
      'PREPARE_FAILED',
      `memory backend '${id}' is in a file that process ${pid} has mapped too, and its content would be discarded: ` +
        'give this QEMU a mem-path of its own',
      { facts: { names: [id], pid } },
    );
  }
}

function mapsOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/maps`, 'latin1');
  } catch {
    return ''; // ended, or not ours to see
  }
}

/** Pure: of /proc/PID/maps, the files that are mapped shared, each as `device inode`. */
export function sharedMappings(maps: string): string[] {
  return maps.split('\n').flatMap((line) => {
    const [, permissions, , device, inode] = line.split(/ +/);
    return permissions?.[3] === 's' && inode !== '0' ? [`${device} ${inode}`] : [];
  });
}

/** As the kernel prints it there: the device's numbers in hexadecimal, two digits at least. */
function placeOf(descriptor: number): string {
  const { dev, ino } = fstatSync(descriptor, { bigint: true });
  const major = ((dev >> 8n) & 0xfffn) | ((dev >> 32n) & ~0xfffn);
  const minor = (dev & 0xffn) | ((dev >> 12n) & ~0xffn);
  const digits = (number: bigint) => number.toString(16).padStart(2, '0');
  return `${digits(major)}:${digits(minor)} ${ino}`;
}
