/** What becomes of an arrival: compared with what left the source, and reported. JavaScript thread. */
import type { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import type { NativeReceiver } from '../native.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import { verificationFailed } from '../protocol/verification.js';
import type { ArrivalReport } from '../report.js';
import type { ImageSet } from '../staging/image-set.js';
import { arrivalReport } from './arrived.js';

export interface OutcomeContext {
  migrationId: string;
  offer: GuestOffer;
  guest: ArrivingGuest;
  verify: boolean;
  receiver: NativeReceiver;
  images: ImageSet | null;
  /** All is here, and as it was. */
  completed(): void;
  failed(error: MemferryError): void;
}

export class ArrivalOutcome {
  prepareMs = 0;
  gatherMs = 0;
  /** As resumeHere gives it. */
  notRunning: string | null | Promise<string | null> = null;
  readonly #complete: Deferred<ArrivalReport> = deferred();
  #verified: boolean | null = null;
  /** Complete, as far as the migration goes; who runs the guest may still have to say that it does. */
  #finished = false;

  constructor(private readonly context: OutcomeContext) {}

  get complete(): Promise<ArrivalReport> {
    return this.#complete.promise;
  }

  get concluded(): boolean {
    return this.#finished || this.#complete.settled;
  }

  /** Gives the regions whose content is not what left the source. */
  async verify(digests: readonly string[] | null): Promise<number[]> {
    const { guest, receiver, verify } = this.context;
    const mismatched: number[] = [];
    if (digests && verify) {
      for (const [index, digest] of digests.entries()) {
        if (index >= guest.regions.length) break;
        if ((await receiver.digest(index)) !== digest) mismatched.push(index);
      }
      this.#verified = digests.length === guest.regions.length && mismatched.length === 0;
    }
    return mismatched;
  }

  conclude(mismatched: readonly number[]): void {
    const { offer, failed } = this.context;
    if (mismatched.length > 0) failed(verificationFailed(offer.regions, mismatched));
    else this.finish();
  }

  finish(): void {
    if (this.concluded) return;
    this.#finished = true;
    const { migrationId, offer, guest, receiver, images } = this.context;
    const stats = receiver.stats();
    this.context.completed();
    const told = {
      migrationId,
      guest: offer.name,
      verified: this.#verified,
      prepareMs: this.prepareMs,
      gatherMs: this.gatherMs,
      intermediaries: images?.account(stats.servers) ?? [],
    };
    const report = arrivalReport({ ...told, notRunning: null }, guest.regions, stats);
    const tell = (notRunning: string | null) => this.#complete.resolve({ ...report, notRunning });
    if (this.notRunning instanceof Promise) void this.notRunning.then(tell);
    else tell(this.notRunning);
  }

  reject(error: MemferryError): void {
    this.#complete.reject(error);
  }
}
