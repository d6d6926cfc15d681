/** Arrivals between their making and whoever iterates over the listener. JavaScript thread. */

/** Where so many wait and none of them may go, further offers are declined. */
export const maxUntaken = 64;

export class ArrivalQueue<Arrival extends object> implements AsyncIterable<Arrival> {
  readonly #untaken: Arrival[] = [];
  readonly #takers: ((arrival: Arrival | null) => void)[] = [];
  #closed = false;

  /** Room for one more; where there is none, one that `mayGo` makes it. */
  makeRoom(mayGo: (arrival: Arrival) => boolean): boolean {
    if (this.#untaken.length < maxUntaken) return true;
    const at = this.#untaken.findIndex(mayGo);
    if (at >= 0) this.#untaken.splice(at, 1);
    return at >= 0;
  }

  put(arrival: Arrival): void {
    const taker = this.#takers.shift();
    if (taker) taker(arrival);
    else this.#untaken.push(arrival);
  }

  /** Ends every iteration, when what is there has been taken. */
  close(): void {
    this.#closed = true;
    for (const taker of this.#takers.splice(0)) taker(null);
  }

  async *[Symbol.asyncIterator](): AsyncIterator<Arrival> {
    for (;;) {
      const next = this.#untaken.shift();
      if (next) {
        yield next;
        continue;
      }
      if (this.#closed) return;
      const arrival = await new Promise<Arrival | null>((resolve) => this.#takers.push(resolve));
      if (!arrival) return;
      yield arrival;
    }
  }
}
