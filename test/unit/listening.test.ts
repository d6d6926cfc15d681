/** What a listener decides before there is an arrival: does the guest fit, can the offer be, who waits for whom. */
import { describe, expect, it } from 'vitest';
import { ArrivalQueue, maxUntaken } from '../../src/destination/arrival-queue.js';
import { offeredBytes } from '../../src/destination/check-offer.js';
import { MemoryBudget } from '../../src/destination/memory-budget.js';

describe('the memory of a listener', () => {
  it('is given back by whoever booked it, once', () => {
    const budget = new MemoryBudget(100);
    const one = budget.book(60, 'one');
    expect(() => budget.book(41, 'two')).toThrow('two; 40 of 100 are free');
    const two = budget.book(40, 'two');
    one.release();
    one.release();
    expect(budget.tryBook(61)).toBeNull();
    expect(budget.tryBook(60)?.bytes).toBe(60);
    expect(two.bytes).toBe(40);
  });

  it('counts what guests grow by', () => {
    const budget = new MemoryBudget(100);
    const guest = budget.book(60, 'a guest');
    guest.grow(30, 'it');
    expect(guest.bytes).toBe(90);
    try {
      guest.grow(11, 'it');
      expect.unreachable();
    } catch (error) {
      expect(error).toMatchObject({ code: 'NO_MEMORY', facts: { bytes: 11, free: 10, limit: 100 } });
    }
    expect(guest.bytes).toBe(90);
    guest.release();
    expect(budget.tryBook(100)).not.toBeNull();
  });

  it('has room for one replay at a time', () => {
    const budget = new MemoryBudget(100);
    expect(budget.tryBookReplay(101)).toBeNull();
    const first = budget.tryBookReplay(10);
    expect(first).not.toBeNull();
    expect(budget.tryBookReplay(10)).toBeNull();
    first?.release();
    expect(budget.tryBookReplay(10)).not.toBeNull();
  });
});

describe('an offer', () => {
  const region = { name: 'heap', lengthBytes: 8192, capacityBytes: 8192, pageSize: 4096 };
  const refused = (changed: Partial<typeof region>) => () =>
    offeredBytes([region, { ...region, name: 'odd', ...changed }], 4096);

  it('is as long as its regions', () => {
    expect(offeredBytes([region, { ...region, lengthBytes: 4096 }], 4096)).toBe(12288);
  });

  it('has pages of this machine', () => {
    expect(refused({ pageSize: 16384 })).toThrow(expect.objectContaining({ code: 'LIMIT_EXCEEDED' }));
  });

  it('has regions of whole pages, at least one, and room for what is in them', () => {
    for (const changed of [{ lengthBytes: 0 }, { lengthBytes: 4097 }, { capacityBytes: 4096 }]) {
      expect(refused(changed)).toThrow(expect.objectContaining({ code: 'PROTOCOL_ERROR' }));
    }
  });
});

describe('arrivals that wait to be taken', () => {
  const arrival = (id: number) => ({ id });

  it('come in their order, to those who asked first', async () => {
    const queue = new ArrivalQueue<{ id: number }>();
    queue.put(arrival(1));
    queue.put(arrival(2));
    const taker = queue[Symbol.asyncIterator]();
    expect(await taker.next()).toEqual({ done: false, value: arrival(1) });
    expect(await taker.next()).toEqual({ done: false, value: arrival(2) });
    const third = taker.next();
    const fourth = queue[Symbol.asyncIterator]().next();
    queue.put(arrival(3));
    queue.put(arrival(4));
    expect([(await third).value.id, (await fourth).value.id]).toEqual([3, 4]);
  });

  it('can still be taken after the end', async () => {
    const queue = new ArrivalQueue<{ id: number }>();
    const waiting = queue[Symbol.asyncIterator]().next();
    queue.close();
    expect((await waiting).done).toBe(true);
    queue.put(arrival(1));
    const taken: number[] = [];
    for await (const { id } of queue) taken.push(id);
    expect(taken).toEqual([1]);
  });

  it('are so many, and then one that is over makes room', async () => {
    const queue = new ArrivalQueue<{ id: number }>();
    for (let id = 0; id < maxUntaken; id++) {
      expect(queue.makeRoom(() => false)).toBe(true);
      queue.put(arrival(id));
    }
    expect(queue.makeRoom(() => false)).toBe(false);
    expect(queue.makeRoom(({ id }) => id > 0)).toBe(true);
    const taker = queue[Symbol.asyncIterator]();
    expect([(await taker.next()).value.id, (await taker.next()).value.id]).toEqual([0, 2]);
  });
});
