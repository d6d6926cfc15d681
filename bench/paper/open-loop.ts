/**
 * Requests at a fixed rate, whatever the answers do. A latency counts from when a request was due, not from when it
 * could be sent: a service that stalls delays all that was due meanwhile, and each of these delays is in the figures.
 */
import { monotonicMs } from '../support/peer.js';

export interface OpenLoopFigures {
  /** Of each answered request, in the order of the answers; the monotonic clock. */
  answeredAtMs: Float64Array;
  latencyMs: Float64Array;
  /** Requests that were due and never answered. */
  unanswered: number;
  /** This process's CPU time a second of time. */
  cpuShare: number;
}

export interface OpenLoopOptions {
  ratePerSecond: number;
  /** More are not in flight at once: what is due beyond waits, and its latency runs. */
  maxOutstanding: number;
}

/** Sends one request; `done` is called once, with the answer. */
export type Send = (done: () => void) => void;

/** What is still in flight when the loop is stopped is waited for this long. */
const drainMs = 5000;

export class OpenLoop {
  readonly #options: OpenLoopOptions;
  readonly #send: Send;
  readonly #answeredAt: number[] = [];
  readonly #latencies: number[] = [];
  readonly #startMs = monotonicMs();
  readonly #cpuAtStart = process.cpuUsage();
  readonly #timer: NodeJS.Timeout;
  #issued = 0;
  #outstanding = 0;
  #stopAtMs = Number.POSITIVE_INFINITY;

  constructor(send: Send, options: OpenLoopOptions) {
    this.#send = send;
    this.#options = options;
    this.#timer = setInterval(() => this.#issue(), 1);
  }

  #issue(): void {
    const { ratePerSecond, maxOutstanding } = this.#options;
    const now = Math.min(monotonicMs(), this.#stopAtMs);
    const due = ((now - this.#startMs) * ratePerSecond) / 1000;
    while (this.#issued < due && this.#outstanding < maxOutstanding) {
      const dueAtMs = this.#startMs + (this.#issued * 1000) / ratePerSecond;
      this.#issued++;
      this.#outstanding++;
      this.#send(() => {
        const atMs = monotonicMs();
        this.#outstanding--;
        this.#answeredAt.push(atMs);
        this.#latencies.push(atMs - dueAtMs);
        if (this.#issued < due) setImmediate(() => this.#issue());
      });
    }
  }

  async stop(): Promise<OpenLoopFigures> {
    this.#stopAtMs = monotonicMs();
    const cpu = process.cpuUsage(this.#cpuAtStart);
    const seconds = (this.#stopAtMs - this.#startMs) / 1000;
    const due = Math.floor(seconds * this.#options.ratePerSecond);
    while (this.#latencies.length < due && monotonicMs() < this.#stopAtMs + drainMs) {
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    clearInterval(this.#timer);
    return {
      answeredAtMs: Float64Array.from(this.#answeredAt),
      latencyMs: Float64Array.from(this.#latencies),
      unanswered: Math.max(0, due - this.#latencies.length),
      cpuShare: (cpu.user + cpu.system) / 1e6 / seconds,
    };
  }
}
