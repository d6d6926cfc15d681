import { setImmediate as turn } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

import { collectGarbage, Wrappers } from '../../src/worker/wrappers.js';

const Native = globalThis.FinalizationRegistry;
const wrappers = new Wrappers();
beforeAll(() => wrappers.intercept());
afterAll(() => {
  globalThis.FinalizationRegistry = Native;
});

class Statement {}

async function collected(): Promise<void> {
  for (let i = 0; i < 5; i++) {
    collectGarbage();
    await turn();
  }
}

describe('objects with finalizers', () => {
  it('count from when the guest was built, until they are let go of or collected', async () => {
    const finalized: unknown[] = [];
    const registry = new FinalizationRegistry((held) => finalized.push(held));
    expect(FinalizationRegistry.name).toBe('FinalizationRegistry');
    const built = new Statement();
    registry.register(built, 'built');
    wrappers.built();
    expect(wrappers.names()).toEqual([]);
    const held = new Statement();
    registry.register(held, 'held', held);
    (() => registry.register(new Statement(), 'garbage'))();
    expect(wrappers.names()).toEqual([
      '2 objects with finalizers (Statement) that JavaScript holds, made after the guest was built',
    ]);
    await collected();
    expect(finalized).toEqual(['garbage']);
    expect(wrappers.names()).toHaveLength(1);
    expect(registry.unregister(held)).toBe(true);
    expect(registry.unregister(held)).toBe(false);
    expect(wrappers.names()).toEqual([]);
    expect([built, held]).toHaveLength(2);
  });

  it('of before an arrival never free what came', async () => {
    const finalized: unknown[] = [];
    const registry = new FinalizationRegistry((held) => finalized.push(held));
    (() => registry.register(new Statement(), 'of the destination'))();
    wrappers.forget();
    (() => registry.register(new Statement(), 'of the guest'))();
    await collected();
    expect(finalized).toEqual(['of the guest']);
  });
});
