/** A guest that holds what cannot move, as a test asks, and lets go of it again. */
import { closeSync, openSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { Worker } from 'node:worker_threads';
import { defineGuest } from 'memferry/worker';

export class Cursor {}

const registry = new FinalizationRegistry(() => {});

function asWasmFunction(fn) {
  const bytes = Uint8Array.of(
    ...[0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 127],
    ...[2, 7, 1, 1, 101, 1, 102, 0, 0, 7, 5, 1, 1, 102, 0, 0],
  );
  return new WebAssembly.Instance(new WebAssembly.Module(bytes), { e: { f: fn } }).exports.f;
}

async function build(context, names) {
  const memory = new WebAssembly.Memory({ initial: 2 });
  const functions = new WebAssembly.Table({ element: 'anyfunc', initial: 4 });
  const objects = new WebAssembly.Table({ element: 'externref', initial: 6 });
  const bytes = Buffer.from(context.data.wasm, 'base64');
  const { instance } = await WebAssembly.instantiate(bytes, { e: { memory, functions, objects } });
  for (const name of names) context.hostFunctions.register(name, () => 99);
  const config = context.hostFunctions.register('config', { answer: 42 });
  // What building puts there, every host has.
  const built = { built: true };
  objects.set(0, built);
  const cursor = new Cursor();
  registry.register(cursor, null, cursor);
  return { memory, functions, objects, exports: instance.exports, built, config, cursor, kept: null };
}

export default defineGuest({
  create: (context) => build(context, ['ninety-nine', ...(context.data.namesAtSource ?? [])]),
  receive: (context) => build(context, ['ninety-nine']),
  layout: (_app) => [`built with ${process.env.HOLDING_LAYOUT ?? 'nothing'}`],
  handle(app, request, context) {
    const { objects, functions } = app;
    switch (request.op) {
      case 'alive':
        return true;
      case 'cursor':
        app.kept = new Cursor();
        registry.register(app.kept, null, app.kept);
        return null;
      case 'forget':
        registry.unregister(app.kept);
        app.kept = null;
        return null;
      case 'garbage':
        registry.register(new Cursor(), null);
        return null;
      case 'open':
        app.kept = openSync(request.path, 'r');
        return null;
      case 'close':
        closeSync(app.kept);
        return null;
      case 'open-handle':
        return open(request.path).then((handle) => {
          app.kept = handle;
          return null;
        });
      case 'close-handle':
        return app.kept.close().then(() => null);
      case 'thread':
        app.kept = new Worker('setInterval(() => {}, 1000)', { eval: true });
        app.kept.unref();
        return null;
      case 'end-thread':
        return app.kept.terminate().then(() => null);
      case 'function':
        functions.set(1, asWasmFunction(Object.defineProperty(() => 7, 'name', { value: 'onRow' })));
        return null;
      case 'no-function':
        functions.set(1, null);
        return null;
      case 'object':
        objects.set(5, { of: 'this host' });
        return null;
      case 'no-object':
        objects.set(5, null);
        return null;
      case 'values':
        objects.set(1, app.built);
        objects.set(2, app.config);
        objects.set(3, 'a string');
        objects.set(4, 2n ** 70n);
        objects.set(5, undefined);
        return null;
      case 'are-values':
        return [
          objects.get(0) === app.built && objects.get(1) === app.built,
          objects.get(2) === app.config && objects.get(2) === context.hostFunctions.get('config'),
          objects.get(3) === 'a string' && objects.get(4) === 2n ** 70n && objects.get(5) === undefined,
        ];
      default:
        throw new TypeError(`no ${request.op}`);
    }
  },
});
