/** What a guest says of itself, and is too long or missing: it is refused at its source, before anything is sent. */
import { afterEach, describe, expect, it } from 'vitest';
import { type Guest, listen, migrate, park, Region } from '../../lib/index.js';

const secret = 'a secret of sixteen bytes, or more';
const wrong = (message: RegExp) =>
  expect.objectContaining({ code: 'INVALID_ARGUMENT', message: expect.stringMatching(message) });

const regions: Region[] = [];
afterEach(() => {
  for (const region of regions.splice(0)) region.close();
});

function guest(more: object = {}, regionName = 'r'): Guest & { steps: string[] } {
  const region = Region.allocate({ lengthBytes: 4 * 4096 });
  regions.push(region);
  const steps: string[] = [];
  return {
    name: 'g',
    module: null,
    regions: [{ name: regionName, region }],
    pause: async () => {
      steps.push('pause');
      return new Uint8Array(1000);
    },
    unpause: () => void steps.push('unpause'),
    steps,
    ...more,
  };
}

describe('a guest that nobody could be told of', () => {
  const sha256 = 'a'.repeat(64);
  it.each<[string, () => Guest, RegExp]>([
    ['has no name', () => guest({ name: undefined }), /guest\.name: expected a name/],
    ['has a long name', () => guest({ name: 'n'.repeat(65) }), /guest\.name: longer than 64/],
    ['has a region with a long name', () => guest({}, 'n'.repeat(65)), /guest\.regions\.0\.name: longer/],
    ['has a region without one', () => guest({}, ''), /guest\.regions\.0\.name: expected/],
    ['has no module', () => guest({ module: undefined }), /guest\.module: expected .* null/],
    ['has a bad digest', () => guest({ module: { name: 'm', sha256: 'AB' } }), /sha256: expected 64 hex/],
    ['has a long module', () => guest({ module: { name: 'm'.repeat(65), sha256 } }), /module\.name: longer/],
  ])('%s: it is refused here', async (_, make, message) => {
    const of = make();
    const to = '127.0.0.1:1';
    expect(() => migrate(of, { to, secret })).toThrow(wrong(message));
    // Nobody listens: it is refused before anybody is dialled.
    await expect(park(of, { via: [to], secret })).rejects.toEqual(wrong(message));
  });

  it('has more state than the destination takes: that is said, and the guest runs on', async () => {
    await using listening = await listen({ secret, maxStateBytes: 100 });
    const of = guest();
    const { done } = migrate(of, { to: `127.0.0.1:${listening.port}`, secret, mode: 'stop-and-copy' });
    await expect(done).rejects.toMatchObject({
      code: 'LIMIT_EXCEEDED',
      message: expect.stringContaining('1000 bytes; 100 are allowed'),
    });
    expect(of.steps).toEqual(['pause', 'unpause']);
  });
});
