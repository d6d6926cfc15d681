/** A command whose guest has lost pages says so at once, and ends when no other page comes any more. */
import { beforeEach, expect, test } from 'vitest';
import { reportOrRest } from '../../src/cli/await-rest.js';
import { memferryError } from '../../src/errors.js';
import type { GuestOffer } from '../../src/guest.js';
import { deferred } from '../../src/protocol/deferred.js';
import type { ArrivalReport } from '../../src/report.js';

const offer: GuestOffer = { name: 'g', module: null, description: null, regions: [] };
const runs = [{ region: 0, first: 5, count: 2 }];
const lost = memferryError('PAGES_LOST', 'they were with two', { facts: { runs, pages: 2 } });

let lines: object[];
const output = {
  json: true,
  say: () => {},
  line: (value: object) => void lines.push(value),
  result: () => {},
};
beforeEach(() => {
  lines = [];
});

function start() {
  const [complete, restHere, stopped] = [deferred<ArrivalReport>(), deferred<void>(), deferred<never>()];
  const arriving = { offer, complete: complete.promise, restHere: restHere.promise };
  let end = 'none';
  const ended = reportOrRest(arriving, output, stopped.promise).then(
    () => {
      end = 'report';
    },
    (error: { code: string }) => {
      end = error.code;
    },
  );
  const now = async () => {
    await new Promise(setImmediate);
    return end;
  };
  return { complete, restHere, stopped, ended, now };
}

test('the report is given', async () => {
  const { complete, now } = start();
  complete.resolve({} as ArrivalReport);
  expect([await now(), lines]).toEqual(['report', []]);
});

test('a loss is told at once, and ends it when the rest is here', async () => {
  const { complete, restHere, now } = start();
  complete.reject(lost);
  expect(await now()).toBe('none');
  expect(lines).toEqual([{ type: 'lost', guest: 'g', pages: 2, runs, message: 'they were with two' }]);
  restHere.resolve();
  expect(await now()).toBe('PAGES_LOST');
});

test('whoever stops it then is told of the loss all the same', async () => {
  const { complete, stopped, now } = start();
  complete.reject(lost);
  expect(await now()).toBe('none');
  stopped.reject(memferryError('CANCELLED', 'interrupted'));
  expect(await now()).toBe('PAGES_LOST');
});

test('anything else ends it at once', async () => {
  const one = start();
  one.complete.reject(memferryError('VERIFICATION_FAILED', 'the digests differ'));
  const other = start();
  other.stopped.reject(memferryError('CANCELLED', 'interrupted'));
  expect([await one.now(), await other.now(), lines]).toEqual(['VERIFICATION_FAILED', 'CANCELLED', []]);
});
