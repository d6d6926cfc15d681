/** Named one-shot timers, as the commit's state machine starts and stops them. */
export class NamedTimers<Name extends string> {
  readonly #running = new Map<Name, NodeJS.Timeout>();

  constructor(
    private readonly durationsMs: Record<Name, number>,
    private readonly fire: (name: Name) => void,
  ) {}

  start(name: Name): void {
    this.stop(name);
    const duration = Math.min(this.durationsMs[name], 2 ** 31 - 1);
    this.#running.set(
      name,
      setTimeout(() => {
        this.#running.delete(name);
        this.fire(name);
      }, duration),
    );
  }

  stop(name: Name): void {
    clearTimeout(this.#running.get(name));
    this.#running.delete(name);
  }

  stopAll(): void {
    for (const name of [...this.#running.keys()]) this.stop(name);
  }
}
