/**
 * Talking to a guest by hand: every line on standard input is a request (JSON, or else the text itself) and its
 * answer is printed. An empty line means "go" where that means something. Works the same before the guest has
 * left and after it has arrived, which is how one sees that it is the same guest.
 */
import { createInterface, type Interface } from 'node:readline';
import type { Readable } from 'node:stream';
import type { WorkerGuest } from '../worker/index.js';
import type { Output } from './output.js';

/** As much of a WorkerGuest as is needed here. */
export interface Asked {
  request(value: unknown): Promise<unknown>;
}

export interface GuestConsoleOptions {
  input: Readable;
  output: Output;
  /** The guest that answers now; null while there is none. */
  guest: () => Asked | null;
  onEmptyLine?: () => void;
  onEnd?: () => void;
}

/** What the guest says unasked. */
export function sayMessages(guest: WorkerGuest, output: Output): void {
  guest.on('message', (value) => {
    if (output.json) output.line({ type: 'message', guest: guest.name, value });
    else output.say(`${guest.name}: ${JSON.stringify(value)}`);
  });
}

/** A guest asked faster than it answers: more than this many lines wait unread. */
const MOST_UNANSWERED = 1000;

export function parseRequest(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    return line;
  }
}

export class GuestConsole {
  #lines: Interface;
  #unanswered = 0;
  #paused = false;
  /** By `close`, or with the input: from then on readline throws at being paused or resumed (Node 24). */
  #closed = false;

  constructor(options: GuestConsoleOptions) {
    this.#lines = createInterface({ input: options.input, terminal: false });
    this.#lines.on('line', (line) => {
      if (line.trim() === '') options.onEmptyLine?.();
      else void this.#ask(line, options);
    });
    this.#lines.once('close', () => {
      this.#closed = true;
      options.onEnd?.();
    });
  }

  close(): void {
    this.#closed = true;
    this.#lines.removeAllListeners('close');
    this.#lines.close();
  }

  async #ask(line: string, { output, guest }: GuestConsoleOptions): Promise<void> {
    const request = parseRequest(line);
    const here = guest();
    this.#unanswered++;
    this.#pace();
    try {
      if (!here) throw Object.assign(new Error('no guest is here'), { code: 'NO_GUEST' });
      const reply = await here.request(request);
      if (output.json) output.line({ type: 'reply', request, reply });
      else output.say(`${JSON.stringify(reply)}`);
    } catch (error) {
      const { code, message } = error as { code?: string; message: string };
      if (output.json) output.line({ type: 'reply', request, error: { code: code ?? 'ERROR', message } });
      else output.say(`${code ?? 'ERROR'}: ${message}`);
    } finally {
      this.#unanswered--;
      this.#pace();
    }
  }

  #pace(): void {
    const pause = this.#unanswered >= MOST_UNANSWERED;
    if (this.#closed || pause === this.#paused) return;
    this.#paused = pause;
    if (pause) this.#lines.pause();
    else this.#lines.resume();
  }
}
