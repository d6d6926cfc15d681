/**
 * How source and destination find out that both are of one deduplication domain, before the one is told what the other
 * has. Neither says the domain's name, nor anything that who lacks its key could try names against: each shows that it
 * knows the key, on this session alone.
 *
 *     proof    HMAC(key; "memferry references source" or "... destination", session key, migration id)
 *
 * A guest's own domain (`dedup: true`) has a fresh key, which goes with the offer, sealed for this session.
 * HMAC is HMAC-SHA256. Pure but for the fresh key and a secret's file.
 */
import { createHmac, timingSafeEqual } from 'node:crypto';
import type { DedupOptions } from '../options.js';
import { dedupDomainKey } from '../source/dedup-domain.js';
import { sealDomainKey, unsealDomainKey } from '../staging/image-secret.js';

/** In an offer: the source's proof, and the key itself where it is the guest's own. */
export interface ReferencesOffer {
  proof: string;
  sealedKey: string | null;
}

type Side = 'source' | 'destination';

export function referencesProof(
  key: Uint8Array,
  side: Side,
  sessionKey: Uint8Array,
  migrationId: Uint8Array,
): string {
  return createHmac('sha256', key)
    .update(`memferry references ${side}`)
    .update(sessionKey)
    .update(migrationId)
    .digest('hex');
}

function proves(expected: string, given: string): boolean {
  const a = Buffer.from(expected, 'hex');
  const b = Buffer.from(given, 'hex');
  return a.length === b.length && timingSafeEqual(a, b);
}

/** The source's side of it. */
export class OfferedReferences {
  #agreed = false;

  private constructor(
    readonly key: Uint8Array,
    readonly offer: ReferencesOffer,
    private readonly expected: string,
  ) {}

  /** Rejects with AUTH_FAILED (secret file), INVALID_ARGUMENT (a secret that is too short). */
  static async make(
    dedup: true | DedupOptions,
    hostsSecret: Uint8Array,
    sessionKey: Uint8Array,
    migrationId: Uint8Array,
  ): Promise<OfferedReferences> {
    const key = (await dedupDomainKey(dedup, hostsSecret)) as Uint8Array;
    const proof = referencesProof(key, 'source', sessionKey, migrationId);
    const sealedKey = dedup === true ? sealDomainKey(sessionKey, migrationId, key) : null;
    const expected = referencesProof(key, 'destination', sessionKey, migrationId);
    return new OfferedReferences(key, { proof, sealedKey }, expected);
  }

  /** What the destination said to it; null, or a proof that is wrong: it is of no such domain, and has no references. */
  answered(proof: string | null): void {
    this.#agreed = proof !== null && proves(this.expected, proof);
  }

  get agreed(): boolean {
    return this.#agreed;
  }
}

export interface AgreedReferences {
  key: Uint8Array;
  /** Whether it is the destination's domain, whose page share counts too. */
  ofDomain: boolean;
  /** For the source. */
  proof: string;
}

/**
 * The destination's side. `domainKey` null: it is of no domain, and takes guests' own ones only. Null: no references.
 * Throws AUTH_FAILED: a key that was not sealed for this session.
 */
export function agreeOnReferences(
  offer: ReferencesOffer | null,
  domainKey: Uint8Array | null,
  sessionKey: Uint8Array,
  migrationId: Uint8Array,
): AgreedReferences | null {
  if (!offer) return null;
  const own = offer.sealedKey !== null;
  const key = own ? unsealDomainKey(sessionKey, migrationId, offer.sealedKey as string) : domainKey;
  if (!key) return null;
  if (!proves(referencesProof(key, 'source', sessionKey, migrationId), offer.proof)) return null;
  const proof = referencesProof(key, 'destination', sessionKey, migrationId);
  return { key, ofDomain: !own, proof };
}
