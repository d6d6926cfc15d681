/**
 * The destination, as its source speaks with it over the control connection: each message goes to the part that waits
 * for it, and all of them hear when the connection is gone. JavaScript thread.
 */
import type { MemferryError } from '../errors.js';
import type { Guest } from '../guest.js';
import type { ResolvedMigrateOptions } from '../options.js';
import { deferred } from '../protocol/deferred.js';
import type { DestinationMessage, SourceMessage } from '../protocol/messages.js';
import { fromPeer } from '../protocol/peer-error.js';
import { DestinationAccount } from './account.js';
import type { CommitDriver } from './commit-driver.js';
import { GatherWait } from './gather-wait.js';
import { GrowthWait } from './growth.js';
import type { Measurements } from './measurements.js';
import { Negotiation } from './negotiation.js';
import type { Switchover } from './switchover.js';

export interface PeerContext {
  guest: Guest;
  options: ResolvedMigrateOptions;
  commit: CommitDriver;
  switchover: Switchover;
  measured: Measurements;
  signal: AbortSignal;
  send(message: SourceMessage): void;
}

export class Peer {
  readonly negotiation: Negotiation;
  readonly growth: GrowthWait;
  readonly gatherWait: GatherWait;
  readonly account = new DestinationAccount();
  readonly #refusal = deferred<MemferryError>();

  constructor(private readonly context: PeerContext) {
    const { guest, options, send, signal } = context;
    this.negotiation = new Negotiation(guest, options, send, signal);
    this.growth = new GrowthWait(send, signal, options.prepareTimeoutMs);
    this.gatherWait = new GatherWait(send, signal);
  }

  /** Why the destination does not take the guest, in its own words. */
  get refusal(): Promise<MemferryError> {
    return this.#refusal.promise;
  }

  onMessage(message: DestinationMessage): void {
    const { commit, measured, switchover } = this.context;
    switch (message.type) {
      case 'accepted':
        this.negotiation.onAccepted(message);
        break;
      case 'base-progress':
        this.negotiation.base?.onProgress(message);
        break;
      case 'base-ready':
        this.negotiation.base?.onReady(message);
        break;
      case 'declined':
        // At once: the destination closes the connection now, and that must not be taken for the reason.
        commit.fail(fromPeer(message.code, message.message, message.names));
        break;
      case 'grown':
        this.growth.onGrown();
        break;
      case 'missing':
        this.gatherWait.onMissing(message.pages, message.question);
        break;
      case 'prepared':
        measured.prepared(message.prepareMs);
        break;
      case 'summary':
        measured.complete();
        this.account.onMessage(message);
        break;
      case 'complete':
        measured.complete();
        break;
      case 'lost':
      case 'over':
        this.account.onMessage(message);
        break;
      case 'session-resumed':
        break;
      default:
        // At once: what the machine makes of them takes a while to get back here.
        if (message.type === 'ready') {
          measured.ready();
          switchover.onReady(message);
          break;
        }
        if (message.type === 'resumed') measured.resumed();
        if (message.type === 'refused') this.#refusal.resolve(fromPeer(message.code, message.message));
        commit.message(message);
    }
  }

  onLost(error: MemferryError): void {
    this.negotiation.fail(error);
    this.growth.fail(error);
    this.gatherWait.fail(error);
    // Its own word, by which the caller knows what to do. Else the machine's would stand, that the connection is gone, or
    // the engine's, when the data connections are cut first.
    if (error.code === 'LIMIT_EXCEEDED') {
      this.#refusal.resolve(error);
      this.context.commit.fail(error);
    }
    this.context.commit.connectionLost(error);
  }
}
