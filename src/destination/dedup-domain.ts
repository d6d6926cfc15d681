/** The deduplication domain of a listener: whose sources may refer to what is here. */
import type { ResolvedListenOptions } from '../options.js';
import type { OfferMessage } from '../protocol/messages.js';
import { type AgreedReferences, agreeOnReferences } from '../protocol/references.js';
import { sharePath } from '../share/share-path.js';
import { dedupDomainKey } from '../source/dedup-domain.js';

export interface Domain {
  /** The page share's file, and the domain's key; null: none. */
  share: { path: string; key: Uint8Array } | null;
  agree(offer: OfferMessage, sessionKey: Uint8Array, migration: Uint8Array): AgreedReferences | null;
}

/** Rejects with AUTH_FAILED (secret file), INVALID_ARGUMENT (a secret that is too short). */
export async function domainOf({ dedup, share }: ResolvedListenOptions, secret: Uint8Array): Promise<Domain> {
  if (dedup === false) return { share: null, agree: () => null };
  const key = dedup === true ? null : await dedupDomainKey(dedup, secret);
  return {
    share: key && share !== undefined ? { path: sharePath(share === 'auto' ? null : share, key), key } : null,
    agree: (offer, sessionKey, migration) => agreeOnReferences(offer.references, key, sessionKey, migration),
  };
}
