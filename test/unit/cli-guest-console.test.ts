/** A guest may answer when nobody types any more: that must not end the command in the middle of a migration. */
import { Interface } from 'node:readline';
import { PassThrough } from 'node:stream';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { GuestConsole } from '../../src/cli/guest-console.js';
import { type Deferred, deferred } from '../../src/protocol/deferred.js';

let input: PassThrough;
let replies: unknown[];
let asked: Deferred<unknown>[];
let ended: number;
let typed: GuestConsole;
const turn = () => new Promise(setImmediate);
const until = (holds: () => void) => vi.waitFor(holds, 10_000);

/** As readline of Node 24. */
function throwOnceClosed(name: 'pause' | 'resume') {
  const original = Interface.prototype[name];
  return vi.spyOn(Interface.prototype, name).mockImplementation(function (this: Interface) {
    if ((this as unknown as { closed: boolean }).closed) throw new Error('readline was closed');
    return original.call(this);
  });
}
let spies: ReturnType<typeof throwOnceClosed>[];
const thrown = () => spies.flatMap(({ mock }) => mock.results.filter(({ type }) => type === 'throw'));

beforeEach(() => {
  spies = [throwOnceClosed('pause'), throwOnceClosed('resume')];
  [input, replies, asked, ended] = [new PassThrough(), [], [], 0];
  typed = new GuestConsole({
    input,
    output: {
      json: true,
      say: () => {},
      line: (value) => void replies.push((value as { reply: unknown }).reply),
      result: () => {},
    },
    guest: () => ({
      request: () => {
        const answer = deferred<unknown>();
        asked.push(answer);
        return answer.promise;
      },
    }),
    onEnd: () => void ended++,
  });
});
afterEach(() => {
  typed.close();
  vi.restoreAllMocks();
});

test('a reply after the console was closed is told', async () => {
  input.write('"how are you"\n');
  await until(() => expect(asked).toHaveLength(1));
  typed.close();
  asked[0]?.resolve('well');
  await until(() => expect(replies).toEqual(['well']));
  await turn();
  expect(thrown()).toEqual([]);
  expect(ended).toBe(0);
});

test('a reply after the end of the input is told', async () => {
  input.end('"how are you"\n');
  await until(() => expect(ended).toBe(1));
  asked[0]?.resolve('well');
  await until(() => expect(replies).toEqual(['well']));
  await turn();
  expect(thrown()).toEqual([]);
});

test('lines wait while too many have no answer, and come when there is one', async () => {
  for (let line = 0; line < 1000; line++) input.write(`${line}\n`);
  await until(() => expect(asked).toHaveLength(1000));
  input.write('1000\n');
  await turn();
  expect(asked).toHaveLength(1000);
  asked[0]?.resolve(0);
  await until(() => expect(asked).toHaveLength(1001));
  typed.close();
  for (const answer of asked) answer.resolve(0);
  await turn();
  expect(thrown()).toEqual([]);
});
