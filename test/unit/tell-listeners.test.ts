import { EventEmitter, once } from 'node:events';
import { expect, test } from 'vitest';
import { callOut, tellListeners } from '../../src/tell-listeners.js';

test('what a listener throws is a warning, and the listeners behind it hear all the same', async () => {
  const emitter = new EventEmitter();
  const heard: unknown[] = [];
  emitter.on('state', () => {
    throw new Error('not mine');
  });
  emitter.once('state', (...args) => heard.push(args));
  const warned = once(process, 'warning');
  tellListeners(emitter, 'state', 'active', 'setup');
  tellListeners(emitter, 'state', 'device', 'active');
  expect(heard).toEqual([['active', 'setup']]);
  const [warning] = await warned;
  expect(warning).toMatchObject({
    code: 'MEMFERRY_LISTENER',
    message: "a listener of 'state' threw: not mine",
  });
});

test('nobody listens', () => {
  tellListeners(new EventEmitter(), 'error', new Error('nobody is interested'));
});

test('what an asynchronous listener rejects with is a warning, and ends no process', async () => {
  const emitter = new EventEmitter();
  emitter.on('state', async () => {
    throw new Error('not mine either');
  });
  emitter.once('state', () => Promise.reject(new Error('nor this')));
  const said: string[] = [];
  const hear = (warning: Error) => said.push(warning.message);
  process.on('warning', hear);
  tellListeners(emitter, 'state', 'active', 'setup');
  // vitest fails the run for a rejection that nobody has heard of.
  await expect.poll(() => said).toHaveLength(2);
  process.off('warning', hear);
  expect(said).toEqual([
    "a listener of 'state' rejected: not mine either",
    "a listener of 'state' rejected: nor this",
  ]);
});

test('a callback that throws, rejects, or is none', async () => {
  const failed: string[] = [];
  const called: unknown[] = [];
  const outside = (what: string) => ({ what, code: 'MEMFERRY_X', failed: () => failed.push(what) });
  callOut(outside('none'), undefined);
  callOut(outside('fine'), (...args: unknown[]) => called.push(args), 1, 'two');
  callOut(outside('threw'), () => {
    throw Object.create(null);
  });
  callOut(outside('rejected'), () => Promise.reject(null));
  callOut(outside('thenable'), () => ({
    // biome-ignore lint/suspicious/noThenProperty: what a caller may give
    then: (_: unknown, reject: (why: Error) => void) => reject(new Error('x')),
  }));
  await expect.poll(() => failed).toEqual(['threw', 'rejected', 'thenable']);
  expect(called).toEqual([[1, 'two']]);
});
