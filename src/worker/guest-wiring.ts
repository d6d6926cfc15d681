/** From the workers' links to the guest that they make up. */
import type { LinkEvents } from './worker-link.js';

type Connected = {
  message(worker: number, value: unknown): void;
  shape(): void;
  trapped: LinkEvents['trapped'];
  ended(error: Error): void;
};

/** Links exist before their guest does: what they tell until then is kept. */
export class GuestWiring {
  #to: Connected | null = null;
  #early: ((to: Connected) => void)[] = [];

  events(worker: number): LinkEvents {
    return {
      message: (value) => this.#tell((to) => to.message(worker, value)),
      shape: () => this.#tell((to) => to.shape()),
      trapped: (error) => this.#to?.trapped(error) ?? null,
      ended: (error) => this.#tell((to) => to.ended(error)),
    };
  }

  connect(to: Connected): void {
    this.#to = to;
    for (const tell of this.#early.splice(0)) tell(to);
  }

  #tell(tell: (to: Connected) => void): void {
    if (this.#to) tell(this.#to);
    else this.#early.push(tell);
  }
}
