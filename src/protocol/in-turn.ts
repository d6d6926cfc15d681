/**
 * Events of a state machine, one at a time: an action that brings the next event about must not overtake the rest of
 * its own step. JavaScript thread.
 */
export class InTurn<Event> {
  readonly #events: Event[] = [];

  /** `step` takes one event: the new state first, its actions after that. */
  constructor(private readonly step: (event: Event) => void) {}

  /** Returns when the event has been dealt with, and all that came of it; within a step, at once. */
  dispatch(event: Event): void {
    this.#events.push(event);
    if (this.#events.length > 1) return;
    try {
      for (let next = this.#events[0]; next; this.#events.shift(), next = this.#events[0]) this.step(next);
    } finally {
      this.#events.length = 0;
    }
  }
}
