/** Which encodings a source offers, and what the two ends agree on. */
import { describe, expect, test } from 'vitest';
import { MemferryError } from '../../src/errors.js';
import { resolveMigrateOptions, resolveParkOptions } from '../../src/options.js';
import {
  agreedEncodings,
  decodedByServers,
  decodedHere,
  encodingFlags,
  packedByServers,
  wantedEncodings,
} from '../../src/protocol/encodings.js';
import { destinationMessage, offerSchema } from '../../src/protocol/messages.js';

const to = '127.0.0.1:7000';

describe('encodings', () => {
  test('a source offers what its options may need', () => {
    const offered = (options: object) => wantedEncodings(resolveMigrateOptions({ to, ...options }));
    expect(offered({})).toEqual(['lz4', 'zstd']);
    expect(offered({ compress: 'off' })).toEqual([]);
    expect(offered({ compress: 'zstd' })).toEqual(['zstd']);
    expect(offered({ compress: 'lz4', deltaCacheBytes: 1e6 })).toEqual(['lz4', 'delta']);
    expect(offered({ compress: 'off', deltaCacheBytes: 1e6, mode: 'pre-copy' })).toEqual(['delta']);
    // One round, or none: nothing is sent again.
    expect(offered({ deltaCacheBytes: 1e6, mode: 'stop-and-copy' })).toEqual(['lz4', 'zstd']);
    expect(offered({ deltaCacheBytes: 1e6, mode: 'post-copy' })).toEqual(['lz4', 'zstd']);
    expect(offered({ deltaCacheBytes: 1e6, mode: 'scatter' })).toEqual(['lz4', 'zstd']);
    expect(offered({ deltaCacheBytes: 1e6, mode: 'scatter-hybrid' })).toEqual(['lz4', 'zstd', 'delta']);
    expect(wantedEncodings(resolveParkOptions({ via: [to] }))).toEqual(['lz4', 'zstd']);
  });

  test('only what both know is used, whatever else is named', () => {
    expect(agreedEncodings(['zstd', 'brotli', 'delta'], decodedHere)).toEqual(['zstd', 'delta']);
    expect(agreedEncodings(['zstd', 'delta'], decodedByServers)).toEqual(['zstd', 'delta']);
    // What a server answers a reader with is no delta: it does not know what that one has.
    expect(agreedEncodings(['zstd', 'delta'], packedByServers)).toEqual(['zstd']);
    expect(agreedEncodings([], decodedHere)).toEqual([]);
    expect(encodingFlags(['lz4', 'zstd', 'delta'])).toBe(32 + 64 + 128);
    expect(encodingFlags([])).toBe(0);
  });

  test('a peer that says nothing of encodings knows none', () => {
    expect(destinationMessage.parse({ type: 'accepted' })).toMatchObject({ type: 'accepted', encodings: [] });
    const offer = {
      type: 'offer',
      migrationId: '0'.repeat(32),
      mode: 'hybrid',
      mayPage: true,
      verify: true,
      channels: 1,
      guest: {
        name: 'g',
        module: null,
        description: null,
        regions: [{ name: 'm', lengthBytes: 4096, capacityBytes: 4096, pageSize: 4096 }],
      },
    };
    expect(offerSchema.parse(offer).encodings).toEqual([]);
    expect(offerSchema.parse({ ...offer, encodings: ['lz4', 'new'] }).encodings).toEqual(['lz4', 'new']);
    expect(() => offerSchema.parse({ ...offer, encodings: Array(17).fill('lz4') })).toThrow();
  });

  test.each([
    { compress: 'gzip' },
    { compress: true },
    { deltaCacheBytes: -1 },
    { deltaCacheBytes: 1.5 },
    { deltaCacheBytes: 2 ** 41 },
  ])('what cannot be meant is refused: %j', (options) => {
    expect(() => resolveMigrateOptions({ to, ...(options as object) })).toThrow(MemferryError);
  });
});
