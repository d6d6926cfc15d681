import { EventEmitter, once } from 'node:events';
import { expect, test } from 'vitest';
import { tellListeners } from '../../src/tell-listeners.js';

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
