/** What `kvm-log` refuses, and the marks. With a VM it is tested in test/native and test/migration/kvm.test.ts. */
import { closeSync, openSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadAddon } from '../../src/addon.js';
import { type KvmLog, WriteMarks } from '../../src/kvm-log.js';
import { Region } from '../../src/region.js';
import { DirtyTracker } from '../../src/trackers.js';

const { pageSize } = loadAddon();
const coded = (code: string, message: RegExp) =>
  expect.objectContaining({ code, message: expect.stringMatching(message) });

describe('kvm-log', () => {
  let region: Region;
  let file: number;
  beforeEach(() => {
    region = Region.allocate({ lengthBytes: 100 * pageSize });
    file = openSync('/dev/null', 'r');
  });
  afterEach(() => {
    closeSync(file);
    region.close();
  });
  const create = (log: Partial<KvmLog>, name?: Parameters<typeof DirtyTracker.create>[1]) =>
    DirtyTracker.create(region, name, {
      kvmLog: { kind: 'kvm-log', vmFd: file, slots: [{ slot: 0 }], marks: new WriteMarks(region), ...log },
    });

  it('needs the descriptor of a VM', () => {
    expect(() => create({})).toThrow(coded('SYSTEM', /not that of a KVM VM/));
    expect(() => create({ marks: undefined })).toThrow(coded('SYSTEM', /not that of a KVM VM/));
    for (const vmFd of [-1, 1.5, Number.NaN]) expect(() => create({ vmFd })).toThrow();
  });

  it('is asked for by name only where the region names a VM', () => {
    expect(() => DirtyTracker.create(region, 'kvm-log')).toThrow(coded('TRACKER_UNAVAILABLE', /descriptor/));
    expect(() => create({}, 'kvm-log')).toThrow(coded('SYSTEM', /not that of a KVM VM/));
  });

  it('gives way to another that is asked for by name', () => {
    using tracker = create({}, 'hash-diff');
    expect(tracker.name).toBe('hash-diff');
  });

  it('takes no slots that make no sense', () => {
    for (const slots of [
      [],
      [{ slot: -1 }],
      [{ slot: 2 ** 32 }],
      [{ slot: 0.5 }],
      [{ slot: 0, first: -1 }],
      [{ slot: 0, count: Number.NaN }],
      [{ slot: 0, first: 101 }],
    ]) {
      expect(() => create({ slots })).toThrow(coded('INVALID_ARGUMENT', /slot/));
    }
    expect(() => create({ slots: undefined as unknown as [] })).toThrow(coded('INVALID_ARGUMENT', /slots/));
  });

  it('takes no marks of other things', () => {
    expect(() => create({ marks: { native: {} } as WriteMarks })).toThrow(coded('INVALID_ARGUMENT', /marks/));
  });
});

describe('marks', () => {
  it('are a bit for each page', () => {
    using region = Region.allocate({ lengthBytes: 130 * pageSize });
    const marks = new WriteMarks(region);
    expect(marks.words).toHaveLength(3);
    marks.mark(63, 2);
    marks.mark(129);
    expect([...marks.words]).toEqual([1n << 63n, 1n, 2n]);
    for (const [first, count] of [
      [130, 1],
      [0, 131],
      [-1, 1],
      [0.5, 1],
    ] as const) {
      expect(() => marks.mark(first, count)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    }
  });
});
