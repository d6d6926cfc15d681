/** A replay log as the command line has it: the lines that were typed to a guest, one request each, in their order. */
import type { WorkerGuest } from '../worker/index.js';
import { parseRequest } from './guest-console.js';

/**
 * Asks the guest again. A request that failed when it was first made fails again, and is passed over: what matters is
 * what comes of them all, and that is compared.
 */
export async function replayLines(
  guest: Pick<WorkerGuest, 'request'>,
  log: Uint8Array,
  { signal, progress }: { signal: AbortSignal; progress: (fraction: number) => void },
): Promise<void> {
  const lines = Buffer.from(log).toString('utf8').split('\n');
  for (const [done, line] of lines.entries()) {
    if (signal.aborted) return;
    if (line.trim() !== '') await guest.request(parseRequest(line)).catch(() => {});
    progress((done + 1) / lines.length);
  }
}
