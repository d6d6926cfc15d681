/** What both sides say of regions that are not what left the source. Pure. */
import { MemferryError } from '../errors.js';

/** `mismatched`: indexes in `regions`, as far as these go. */
export function verificationFailed(
  regions: readonly { name: string }[],
  mismatched: readonly number[],
): MemferryError {
  const names = mismatched.map((index) => regions[index]?.name ?? String(index));
  return new MemferryError('VERIFICATION_FAILED', `the digests of ${names.join(', ')} differ`, {
    facts: { regions: names },
  });
}
