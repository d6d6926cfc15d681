/** Timers of what depends on a peer: one, and named ones as the commit's state machines start and stop them. */

/** Node runs timers that are due before it reads from any socket: after a stop of this process, all of them. */
const lateMs = 250;
const longestMs = 2 ** 31 - 1;

/**
 * Rings once. When it is late, this thread did not run: what came from others meanwhile is taken first, and may be
 * what stops it.
 */
export class Alarm {
  #timer: NodeJS.Timeout | null;
  #late: NodeJS.Immediate | null = null;

  constructor(afterMs: number, ring: () => void) {
    const ms = Math.min(afterMs, longestMs);
    const dueMs = performance.now() + ms;
    this.#timer = setTimeout(() => {
      this.#timer = null;
      if (performance.now() - dueMs < lateMs) ring();
      // The turn of the loop that reads sockets comes between.
      else this.#late = setImmediate(ring);
    }, ms);
  }

  stop(): void {
    if (this.#timer) clearTimeout(this.#timer);
    if (this.#late) clearImmediate(this.#late);
  }
}

export class NamedTimers<Name extends string> {
  readonly #running = new Map<Name, Alarm>();
  #closed = false;

  constructor(
    private readonly durationsMs: Record<Name, number>,
    private readonly fire: (name: Name) => void,
  ) {}

  start(name: Name): void {
    this.stop(name);
    if (this.#closed) return;
    this.#running.set(
      name,
      new Alarm(this.durationsMs[name], () => {
        this.#running.delete(name);
        this.fire(name);
      }),
    );
  }

  stop(name: Name): void {
    this.#running.get(name)?.stop();
    this.#running.delete(name);
  }

  stopAll(): void {
    for (const name of [...this.#running.keys()]) this.stop(name);
  }

  /** None is started any more. */
  close(): void {
    this.#closed = true;
    this.stopAll();
  }
}
