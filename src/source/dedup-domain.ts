/**
 * Whose pages a guest's may be equal to: the key of its deduplication domain. Whoever has it can ask what the domain's
 * images hold, so it goes to the servers sealed, and to nobody else. Pure but for the fresh key and the secret file.
 *
 *     key     HMAC(secret; "memferry dedup domain", domain's name)
 *
 * HMAC is HMAC-SHA256; the secret is the domain's own where there is one, else the hosts'.
 */
import { createHmac, randomBytes } from 'node:crypto';
import { loadSecret } from '../control/secret.js';
import type { DedupOptions } from '../options.js';

export const domainKeyBytes = 32;

/** Null: nothing is deduplicated. Throws AUTH_FAILED (secret file), INVALID_ARGUMENT (a secret that is too short). */
export async function dedupDomainKey(
  dedup: boolean | DedupOptions,
  hostsSecret: Uint8Array,
): Promise<Uint8Array | null> {
  if (dedup === false) return null;
  // The guest's own domain: nobody else can have this key, so its pages meet only each other.
  if (dedup === true) return Uint8Array.from(randomBytes(domainKeyBytes));
  const { domain, secret, secretFile } = dedup;
  const own = secret !== undefined || secretFile !== undefined;
  const from = own ? await loadSecret({ secret, secretFile }, { loopback: false }) : hostsSecret;
  return domainKey(from, domain);
}

export function domainKey(secret: Uint8Array, domain: string): Uint8Array {
  const mac = createHmac('sha256', secret).update('memferry dedup domain').update(domain, 'utf8');
  return Uint8Array.from(mac.digest());
}
