/**
 * Reads of an exact number of bytes from a stream, with the rest left in it. The caller names the number: it
 * never comes from a peer that has not authenticated. One reader at a time.
 */
import type { Duplex } from 'node:stream';
import { MemferryError } from '../errors.js';

/**
 * Resolves with exactly `bytes` bytes; rejects with PEER_LOST when the stream ends or fails before that, and
 * with the signal's reason when that comes first (the stream is then of no use any more).
 */
export function readExactly(stream: Duplex, bytes: number, signal: AbortSignal): Promise<Buffer> {
  return new Promise((resolve, reject) => {
    const settle = (act: () => void) => {
      stream.off('readable', onReadable);
      stream.off('end', onEnd);
      stream.off('close', onEnd);
      stream.off('error', onError);
      signal.removeEventListener('abort', onAbort);
      act();
    };
    const onReadable = () => {
      const chunk = stream.read(bytes) as Buffer | null;
      if (chunk === null) return;
      // At its end a stream gives what it has, however little.
      if (chunk.length === bytes) settle(() => resolve(chunk));
      else onEnd();
    };
    const onEnd = () =>
      settle(() =>
        reject(
          new MemferryError('PEER_LOST', 'the peer closed the connection in the middle of the handshake'),
        ),
      );
    const onError = (cause: Error) =>
      settle(() =>
        reject(new MemferryError('PEER_LOST', `the connection failed: ${cause.message}`, { cause })),
      );
    const onAbort = () => settle(() => reject(signal.reason));
    if (signal.aborted) {
      reject(signal.reason);
      return;
    }
    stream.on('readable', onReadable);
    stream.on('end', onEnd);
    stream.on('close', onEnd);
    stream.on('error', onError);
    signal.addEventListener('abort', onAbort);
    if (stream.destroyed || stream.readableEnded) onEnd();
    else onReadable();
  });
}
