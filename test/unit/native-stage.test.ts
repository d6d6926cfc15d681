/**
 * A VMD server's native part through its handle: what crosses the boundary, and that it ends with its owner. What it
 * does with pages is tested natively (test/native/stage_test.cc).
 */
import net from 'node:net';
import { Worker } from 'node:worker_threads';
import { afterEach, describe, expect, it } from 'vitest';

import { loadAddon } from '../../src/addon.js';
import type { NativeHeldState, NativeListener, NativeStage } from '../../src/native.js';

const addon = loadAddon();
const MEMORY = 16 * 1024 * 1024;
const ROLE_SCATTER = 0;
const image = new Uint8Array(16).fill(7);
const unknown = new Uint8Array(16).fill(8);
const closing: { close(): void }[] = [];

afterEach(() => {
  for (const each of closing.splice(0)) each.close();
});

function makeStage(): NativeStage {
  const stage = addon.createStage({ memoryBytes: MEMORY, bandwidth: 0 });
  closing.push(stage);
  return stage;
}

function serve(stage: NativeStage | null): NativeListener {
  const listener = addon.createListener('127.0.0.1', 0, () => {});
  closing.push(listener);
  if (stage !== null) listener.serveStage(stage);
  return listener;
}

function tokens(attempts: number): Uint8Array {
  return new Uint8Array(attempts * 6 * 32).fill(3);
}

function hello(id: Uint8Array, session: number, attempt: number): Buffer {
  const bytes = Buffer.alloc(64);
  bytes.write('MFERRYS1');
  bytes.set(id, 8);
  bytes.writeUInt16LE(1, 24);
  bytes.writeUInt16LE(ROLE_SCATTER, 26);
  bytes.writeUInt32LE(session * 0x10000 + attempt, 28);
  bytes.fill(3, 32);
  return bytes;
}

/** The status that answers a hello; null: hung up. */
function say(port: number, words: Buffer): Promise<{ status: number | null; socket: net.Socket }> {
  return new Promise((resolve) => {
    const socket = net.connect(port, '127.0.0.1', () => socket.write(words));
    closing.push({ close: () => socket.destroy() });
    socket.on('error', () => {});
    socket.once('data', (data) => resolve({ status: data.readUInt32LE(4), socket }));
    socket.once('close', () => resolve({ status: null, socket }));
  });
}

function ended(socket: net.Socket): Promise<void> {
  return new Promise((resolve) => {
    if (socket.closed) resolve();
    else socket.once('close', () => resolve());
    socket.resume();
  });
}

describe('NativeStage', () => {
  it('touches next to nothing of a large memory at its start', () => {
    const before = process.memoryUsage.rss();
    const stage = addon.createStage({ memoryBytes: 2 ** 40, bandwidth: 0 });
    closing.push(stage);
    // The counts of its slots alone are 1.5 GiB.
    expect(process.memoryUsage.rss() - before).toBeLessThan(256 * 2 ** 20);
    expect(stage.createImage(image, [1024], 0, null)).toBe(true);
  });

  it('keeps images, sessions and states', async () => {
    const stage = makeStage();
    expect(stage.createImage(image, [1024, 10], 2, null)).toBe(true);
    expect(stage.addSession(image, 1, 1 << ROLE_SCATTER, tokens(4))).toBe(true);
    expect(stage.setChain(image, 1, '127.0.0.1', 4000, new Uint8Array(64))).toBe(true);
    expect(stage.state(image)).toBe(null);
    const state = Uint8Array.from({ length: 10_001 }, (_, i) => i);
    const made = stage.makeState(state.length) as NativeHeldState;
    made.write(0, state.subarray(0, 5000));
    made.write(5000, state.subarray(5000));
    expect(() => made.write(1, state)).toThrow(/not reach so far/);
    expect(stage.putState(image, made)).toBe(true);
    expect(() => made.write(0, state)).toThrow(/not to be written/);
    made.release();
    made.release();
    expect(() => stage.putState(image, made)).toThrow(/released/);
    expect(() => stage.putState(image, {} as NativeHeldState)).toThrow(/expected a state/);
    const held = stage.state(image) as NativeHeldState;
    expect(held.size()).toBe(state.length);
    expect(held.read(0, state.length)).toEqual(state);
    expect(held.read(4000, 200)).toEqual(state.subarray(4000, 4200));
    expect(() => held.read(1, state.length)).toThrow(/outside of the state/);
    held.release();
    expect(() => held.read(0, 1)).toThrow(/released/);
    expect(stage.makeState(MEMORY)).toBe(null);
    expect(stage.whole(image, [0, 0])).toBe(true);
    expect(stage.whole(image, [1, 0])).toBe(false);
    expect(stage.seal(image)).toBe(true);
    expect(stage.image(image)).toEqual({
      pagesHeld: 0,
      pagesShared: 0,
      pagesZero: 0,
      pagesKnown: 0,
      // 4 + 1 blocks of index and 3 of state.
      bytes: 8 * addon.pageSize,
      bytesIn: 0,
      bytesOut: 0,
      sealed: true,
    });
    const stats = stage.stats();
    expect(stats).toMatchObject({ memoryBytes: MEMORY, images: 1, connections: 0, bytesIn: 0, bytesOut: 0 });
    expect(stats.slabBytes).toBeLessThan(MEMORY);
    expect(stats.freeBytes).toBe(stats.slabBytes - 8 * addon.pageSize);
    expect(stage.removeSession(image, 1)).toBe(true);
    // Who reads a state reads on when its image goes.
    const last = stage.state(image) as NativeHeldState;
    await stage.drop(image);
    expect(stage.stats().freeBytes).toBe(stats.slabBytes - 3 * addon.pageSize);
    expect(last.read(0, state.length)).toEqual(state);
    last.release();
    expect(stage.stats().freeBytes).toBe(stats.slabBytes);
  });

  it('says which images it has not', () => {
    const stage = makeStage();
    expect(stage.addSession(unknown, 1, 1, tokens(1))).toBe(false);
    expect(stage.removeSession(unknown, 1)).toBe(false);
    expect(stage.setChain(unknown, 1, '127.0.0.1', 4000, new Uint8Array(32))).toBe(false);
    const state = stage.makeState(1) as NativeHeldState;
    expect(stage.putState(unknown, state)).toBe(false);
    state.release();
    expect(stage.state(unknown)).toBe(null);
    expect(stage.seal(unknown)).toBe(false);
    expect(stage.drop(unknown)).toBe(null);
    expect(stage.image(unknown)).toBe(null);
    expect(stage.whole(unknown, [1])).toBe(null);
  });

  it('takes its memory at the start when it is told to, and holds no less then', async () => {
    const stage = makeStage();
    const before = process.memoryUsage.rss();
    await stage.preallocate();
    expect(process.memoryUsage.rss() - before).toBeGreaterThan(stage.stats().slabBytes / 2);
    expect(stage.stats().freeBytes).toBe(stage.stats().slabBytes);
    expect(stage.createImage(image, [16], 0, null)).toBe(true);
    await stage.drop(image);
    expect(stage.stats().freeBytes).toBe(stage.stats().slabBytes);
  });

  it('throws where something cannot be meant', () => {
    const invalid = expect.objectContaining({ code: 'INVALID_ARGUMENT' });
    expect(() => addon.createStage({ memoryBytes: MEMORY - 1, bandwidth: 0 })).toThrow(invalid);
    const stage = makeStage();
    expect(stage.createImage(image, [16], 0, null)).toBe(true);
    expect(() => stage.createImage(image, [16], 0, null)).toThrow(invalid);
    expect(() => stage.createImage(unknown, [2 ** 50], 0, null)).toThrow(invalid);
    expect(() => stage.createImage(unknown, [16], 300, null)).toThrow(invalid);
    expect(() => stage.createImage(unknown, [16], 0, new Uint8Array(31))).toThrow(invalid);
    expect(() => stage.createImage(new Uint8Array(15), [16], 0, null)).toThrow(invalid);
    expect(() => stage.addSession(image, 65_536, 1, tokens(1))).toThrow(invalid);
    expect(() => stage.addSession(image, 1, 64, tokens(1))).toThrow(invalid);
    expect(() => stage.addSession(image, 1, 1, new Uint8Array(33))).toThrow(invalid);
    expect(() => stage.setChain(image, 1, 'localhost', 4000, new Uint8Array(32))).toThrow(invalid);
    expect(() => stage.setChain(image, 1, '127.0.0.1', 0, new Uint8Array(32))).toThrow(invalid);
    expect(() => serve(null).serveStage({} as NativeStage)).toThrow(invalid);
    stage.close();
    stage.close();
    const closed = expect.objectContaining({ code: 'CLOSED' });
    expect(() => stage.createImage(unknown, [16], 0, null)).toThrow(closed);
    expect(() => stage.drop(image)).toThrow(closed);
    expect(() => stage.preallocate()).toThrow(closed);
    expect(() => serve(stage)).toThrow(closed);
    expect(stage.stats().images).toBe(0);
  });

  it('is reached through a listener', async () => {
    const stage = makeStage();
    const { port } = serve(stage);
    stage.createImage(image, [16], 0, null);
    stage.addSession(image, 9, 1 << ROLE_SCATTER, tokens(4));
    expect((await say(port, hello(unknown, 9, 0))).status).toBe(3);
    expect((await say(port, hello(image, 8, 0))).status).toBe(2);
    const first = await say(port, hello(image, 9, 0));
    expect(first.status).toBe(1);
    // It is counted after the answer, and until after its end.
    await expect.poll(() => stage.stats().connections).toBe(1);
    expect((await say(port, hello(image, 9, 0))).status).toBe(2);
    stage.removeSession(image, 9);
    await ended(first.socket);
    await expect.poll(() => stage.stats().connections).toBe(0);
    expect((await say(serve(null).port, hello(image, 9, 1))).status).toBe(null);
  });

  it('ends with its worker', async () => {
    const code = `
      const { parentPort, workerData } = require('node:worker_threads');
      const addon = require(workerData.addon);
      const stage = addon.createStage({ memoryBytes: ${MEMORY}, bandwidth: 0 });
      const listener = addon.createListener('127.0.0.1', 0, () => {});
      listener.serveStage(stage);
      const image = new Uint8Array(16).fill(7);
      stage.createImage(image, [16], 0, null);
      stage.addSession(image, 9, 1, new Uint8Array(192).fill(3));
      parentPort.postMessage(listener.port);
      setInterval(() => {}, 1000);
    `;
    const path =
      process.env['MEMFERRY_ADDON'] ?? new URL('../../build/Release/memferry.node', import.meta.url).pathname;
    const worker = new Worker(code, { eval: true, workerData: { addon: path } });
    const port = await new Promise<number>((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
    });
    const connection = await say(port, hello(image, 9, 0));
    expect(connection.status).toBe(1);
    await worker.terminate();
    await ended(connection.socket);
  });
});
