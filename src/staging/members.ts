/**
 * Who is in which domain at one server (page distribution): a membership lasts as long as the control connection that
 * made it, with one session of its own. Owned by one server; JavaScript thread.
 */
import { MemferryError, native } from '../errors.js';
import type { NativeStage } from '../native.js';
import { warn } from '../tell-listeners.js';
import { memberRoles, stageTokens } from './image-secret.js';

/** A guest each, or a host: more than a server has guests to hold. */
const maxMembers = 1024;
/** Of one connection: a host's guests. */
const maxOfOne = 64;
/** Of the domains that a server tells apart at a time: nobody takes them all. */
const maxDomainsOfOne = 4;
/** Every membership has one. */
const theSession = 1;

/** A control connection. */
export interface Joiner {
  readonly sessionKey: Uint8Array;
}

export class StagedMembers {
  /** With the domain's key, in hex. */
  readonly #members = new Map<string, { joiner: Joiner; domain: string }>();

  constructor(private readonly stage: NativeStage) {}

  get size(): number {
    return this.#members.size;
  }

  /** Gives the session's number. Throws VMD_REFUSED, VMD_CAPACITY, LIMIT_EXCEEDED; then nothing has happened. */
  join(joiner: Joiner, member: string, domainKey: Uint8Array, guest: string | null): number {
    if (this.#members.has(member)) {
      throw new MemferryError('VMD_REFUSED', 'a member with this id is here already', {
        facts: { reason: 'exists' },
      });
    }
    if (this.#members.size >= maxMembers) {
      throw new MemferryError('VMD_CAPACITY', `no more than ${maxMembers} members at a time`, {
        facts: { limit: maxMembers },
      });
    }
    const its = this.#of(joiner);
    if (its.length >= maxOfOne) {
      throw new MemferryError('LIMIT_EXCEEDED', `no more than ${maxOfOne} members on one connection`, {
        facts: { limit: maxOfOne },
      });
    }
    const domain = Buffer.from(domainKey).toString('hex');
    if (new Set([...its.map((each) => this.#members.get(each)?.domain), domain]).size > maxDomainsOfOne) {
      throw new MemferryError('LIMIT_EXCEEDED', `no more than ${maxDomainsOfOne} domains on one connection`, {
        facts: { limit: maxDomainsOfOne },
      });
    }
    const bytes = Buffer.from(member, 'hex');
    const tokens = stageTokens(joiner.sessionKey, bytes, theSession, memberRoles);
    const guestBytes = guest === null ? null : Buffer.from(guest, 'hex');
    if (!native(() => this.stage.join(bytes, domainKey, guestBytes))) {
      throw new MemferryError('VMD_CAPACITY', 'too many domains at a time');
    }
    try {
      native(() => this.stage.addSession(bytes, theSession, memberRoles, tokens));
    } catch (error) {
      this.#drop(bytes);
      throw error;
    }
    this.#members.set(member, { joiner, domain });
    return theSession;
  }

  /** Its own only. */
  leave(joiner: Joiner, member: string): boolean {
    if (this.#members.get(member)?.joiner !== joiner) return false;
    this.#members.delete(member);
    return native(() => this.#drop(Buffer.from(member, 'hex')));
  }

  leaveAll(joiner: Joiner): void {
    for (const member of this.#of(joiner)) {
      this.#members.delete(member);
      try {
        this.#drop(Buffer.from(member, 'hex'));
      } catch {
        // The stage is closed, and everything with it.
      }
    }
  }

  /** A membership holds next to nothing: nobody waits for it. */
  #drop(member: Uint8Array): boolean {
    const ended = this.stage.drop(member);
    ended?.catch((error) => warn('a membership was not ended', error, 'MEMFERRY_STAGE_DROP'));
    return ended !== null;
  }

  #of(joiner: Joiner): string[] {
    return [...this.#members].flatMap(([member, its]) => (its.joiner === joiner ? [member] : []));
  }
}
