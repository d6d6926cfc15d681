/**
 * The commit of a park, with the image's home server as the destination: the source's machine and driver are the
 * same as for a migration. `prepare` is that every page and the execution state are at the servers, `resume` that
 * the home server owns the guest. Owned by one image; JavaScript thread.
 */
import { DestinationCommit } from '../destination/commit-driver.js';
import { MemferryError } from '../errors.js';
import type { DestinationMessage, SourceMessage } from '../protocol/commit.js';
import type { DestinationState } from '../protocol/commit-destination.js';

/** A control connection, as far as a commit cares. */
export interface CommitLink {
  send(message: DestinationMessage): void;
}

export interface ParkCommitConfig {
  grantTimeoutMs: number;
  /** Throws why the guest cannot be parked; when it returns, nothing that can fail is left. */
  prepare(): void;
  /** The guest is the home server's. Must not fail. */
  park(): void;
  /** The guest is its source's again, and never this server's. */
  abandon(): void;
  /** The commit has an outcome: remember it. */
  decided(state: DestinationState): void;
}

export class ParkCommit {
  readonly #commit: DestinationCommit;
  #link: CommitLink | null = null;

  constructor(private readonly config: ParkCommitConfig) {
    this.#commit = new DestinationCommit(
      { grant: config.grantTimeoutMs },
      {
        prepare: () => this.#prepare(),
        resume: () => config.park(),
        abandon: () => config.abandon(),
        send: (message) => this.#link?.send(message),
        decided: (state) => config.decided(state),
        abandoned: () => {},
      },
    );
  }

  /** Answers go to the connection that spoke last. */
  message(link: CommitLink, message: SourceMessage): void {
    this.#link = link;
    this.#commit.message(message);
  }

  /**
   * The connection is gone. One that has said nothing of the commit yet can be taken up again: until PREPARE it is
   * the image's lease that ends what its source has left.
   */
  detached(link: CommitLink): void {
    if (this.#link !== link) return;
    this.#link = null;
    this.#commit.connectionLost();
  }

  /** The image goes, for whatever reason. Nothing happens once the guest is parked. */
  fail(error: MemferryError): void {
    this.#commit.fail(error);
  }

  #prepare(): void {
    try {
      this.config.prepare();
    } catch (error) {
      this.fail(error instanceof MemferryError ? error : new MemferryError('PREPARE_FAILED', String(error)));
      return;
    }
    this.#commit.prepared();
  }
}
