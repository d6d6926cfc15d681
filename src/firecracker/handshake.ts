/**
 * The one message that Firecracker sends to a page-fault handler, with the userfaultfd; public forks may send a second
 * descriptor, the memfd that backs the guest's memory. Nothing is answered.
 */
import { memferryError } from '../errors.js';
import { closeDescriptors, type FdConnection } from '../fd-channel.js';
import { type GuestMemory, MOST_MESSAGE_BYTES, mayBeWhole, parseMappings } from './mappings.js';

/** What Firecracker says when it connects, with its descriptors: whoever has it closes them. */
export interface Handshake {
  /** Where its memory is. */
  memory: GuestMemory;
  /** Its userfaultfd. */
  uffd: number;
  /** What backs the memory, shared; null: private memory. */
  memfd: number | null;
}

/**
 * Null: the peer closed without a word, as one does that only looked whether somebody listens. The descriptors are the
 * caller's.
 * @throws PROTOCOL_ERROR, LIMIT_EXCEEDED, PEER_LOST (nothing came in time), CANCELLED
 */
export async function receiveHandshake(
  connection: FdConnection,
  timeoutMs: number,
): Promise<Handshake | null> {
  const { bytes, descriptors } = await connection.receiveWhole(
    { mostBytes: MOST_MESSAGE_BYTES, mostDescriptors: 2, timeoutMs },
    mayBeWhole,
  );
  try {
    if (bytes.length === 0 && descriptors.length === 0) return null;
    const memory = parseMappings(bytes);
    const [uffd, memfd] = descriptors;
    if (uffd === undefined)
      throw memferryError('PROTOCOL_ERROR', 'no userfaultfd came with the guest memory');
    return { memory, uffd, memfd: memfd ?? null };
  } catch (error) {
    closeDescriptors(descriptors);
    throw error;
  }
}
