/** Which of QEMU's mappings is which of its memory backends. Pure. */
import { memferryError } from '../errors.js';
import type { Backend } from './inspect.js';
import type { ShimMapping } from './shim.js';

/** All of a backend's memory: pieces that follow one another in their file. */
export interface BackendMemory {
  id: string;
  lengthBytes: number;
  /** Which of the shim's descriptors. */
  file: number;
  pieces: { address: bigint; lengthBytes: number; offset: number }[];
}

/**
 * QEMU 7.2 does not say where a backend is mapped; its size tells, and where sizes are alike its file.
 * @param namedFile of the shim's files the one that is a backend's `mem-path`, or null where that is a directory
 * @throws GUEST_UNMOVABLE when a backend is not mapped, or two cannot be told apart
 */
export function matchMemory(
  backends: readonly Backend[],
  mappings: readonly ShimMapping[],
  namedFile: (backend: Backend) => number | null = () => null,
): BackendMemory[] {
  const files = wholeFiles(mappings);
  const taken = new Set<number>();
  const found = new Map<string, BackendMemory>();
  const take = (backend: Backend, file: number) => {
    taken.add(file);
    found.set(backend.id, { ...(files.get(file) as Omit<BackendMemory, 'id'>), id: backend.id });
  };
  for (const backend of backends) {
    const file = namedFile(backend);
    if (file !== null && !taken.has(file) && files.get(file)?.lengthBytes === backend.lengthBytes)
      take(backend, file);
  }
  for (const backend of backends) {
    if (found.has(backend.id)) continue;
    const candidates = [...files].filter(
      ([file, { lengthBytes }]) => !taken.has(file) && lengthBytes === backend.lengthBytes,
    );
    const alike = backends.filter(
      ({ id, lengthBytes }) => !found.has(id) && lengthBytes === backend.lengthBytes,
    );
    const [only] = candidates;
    if (!only) {
      throw unmovable(backend, `no shared mapping of ${backend.lengthBytes} bytes is in QEMU's memory`);
    }
    if (candidates.length > 1 || alike.length > 1) {
      throw unmovable(
        backend,
        `it cannot be told from ${alike.length > 1 ? 'another backend' : 'another mapping'} of the same size: give ` +
          'each backend a mem-path that is a file of its own',
      );
    }
    take(backend, only[0]);
  }
  return backends.map(({ id }) => found.get(id) as BackendMemory);
}

/** By file, those that are mapped once, from their start on and without a gap. The kernel splits mappings as it likes. */
function wholeFiles(mappings: readonly ShimMapping[]): Map<number, Omit<BackendMemory, 'id'>> {
  const files = new Map<number, Omit<BackendMemory, 'id'>>();
  const broken = new Set<number>();
  const inOrder = [...mappings].sort((a, b) => a.file - b.file || a.offset - b.offset);
  for (const { file, address, lengthBytes, offset } of inOrder) {
    const whole = files.get(file) ?? { lengthBytes: 0, file, pieces: [] };
    files.set(file, whole);
    if (offset !== whole.lengthBytes) broken.add(file);
    const last = whole.pieces.at(-1);
    if (last && last.address + BigInt(last.lengthBytes) === address) last.lengthBytes += lengthBytes;
    else whole.pieces.push({ address, lengthBytes, offset });
    whole.lengthBytes += lengthBytes;
  }
  for (const file of broken) files.delete(file);
  return files;
}

function unmovable(backend: Backend, why: string): Error {
  return memferryError('GUEST_UNMOVABLE', `memory backend '${backend.id}': ${why}`, {
    facts: { names: [backend.id] },
  });
}
