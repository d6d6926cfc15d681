/** Options that go over the wire as they are: what the peer's schema refuses is refused before anybody is dialled. */
import { describe, expect, it } from 'vitest';
import type { MemferryError } from '../../src/errors.js';
import { resolveMigrateOptions, resolveParkOptions } from '../../src/options.js';
import { stageRequest } from '../../src/protocol/stage-messages.js';

const told = (resolve: () => unknown) => {
  try {
    resolve();
  } catch (error) {
    const { code, message } = error as MemferryError;
    return { code, message };
  }
  return null;
};
const to = '127.0.0.1:7000';

describe('leaseMs', () => {
  const create = (leaseMs: number) => ({
    type: 'create',
    request: 1,
    image: 'ab'.repeat(16),
    sealedSecret: 'ab'.repeat(60),
    sealedDomain: null,
    name: 'guest',
    kind: 'migration',
    ordinal: 0,
    servers: [{ name: 'a', host: '127.0.0.1', port: 7000 }],
    replicas: 1,
    pageSize: 4096,
    regions: [{ name: 'heap', pages: 1, capacityPages: 1 }],
    leaseMs,
  });

  it.each([99, 100.5, 3_600_001, 4_000_000, 0, -1, Number.NaN])('of %d is no lease', (leaseMs) => {
    expect(stageRequest.safeParse(create(leaseMs)).success).toBe(false);
    for (const [what, resolve] of [
      ['migrate', () => resolveMigrateOptions({ to, leaseMs })],
      ['park', () => resolveParkOptions({ via: [to], leaseMs })],
    ] as const) {
      const refusal = told(resolve);
      expect(refusal?.code).toBe('INVALID_ARGUMENT');
      expect(refusal?.message).toContain(`${what}.leaseMs`);
    }
  });

  it.each([100, 60_000, 3_600_000])('of %d is one', (leaseMs) => {
    expect(stageRequest.safeParse(create(leaseMs)).success).toBe(true);
    expect(resolveMigrateOptions({ to, mode: 'scatter', leaseMs }).leaseMs).toBe(leaseMs);
    expect(resolveParkOptions({ via: [to], leaseMs }).leaseMs).toBe(leaseMs);
  });
});
