/**
 * A guest around a WebAssembly binary that the test gives it (`data.wasm`, base64): calls exports, keeps host
 * functions in its table, makes further instances. `data` moves with it, so both sides build the same.
 */
import { defineGuest } from 'memferry/worker';

/** How Emscripten's addFunction does it: a module of one import and one export. */
function asWasmFunction(fn) {
  const bytes = Uint8Array.of(
    ...[0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 127],
    ...[2, 7, 1, 1, 101, 1, 102, 0, 0, 7, 5, 1, 1, 102, 0, 0],
  );
  return new WebAssembly.Instance(new WebAssembly.Module(bytes), { e: { f: fn } }).exports.f;
}

export default defineGuest({
  async create(context) {
    const { data } = context;
    const bytes = Buffer.from(data.wasm, 'base64');
    const memory = data.hostMemoryPages ? new WebAssembly.Memory({ initial: data.hostMemoryPages }) : null;
    const table = data.hostTable ? new WebAssembly.Table({ element: data.hostTable, initial: 2 }) : null;
    const { instance } = await WebAssembly.instantiate(bytes, { e: { memory, table } });
    const registered = context.hostFunctions.register('ninety-nine', () => 99);
    const app = { exports: instance.exports, table, registered, count: 0, arrivals: 0 };
    if (data.buildHostFunction)
      instance.exports.table.set(
        0,
        asWasmFunction(() => 77),
      );
    return app;
  },
  save: (app) => ({ count: app.count, arrivals: app.arrivals, unclonable: app.unclonable }),
  adopt: (app, state) => {
    app.count = state.count;
    app.arrivals = state.arrivals + 1;
  },
  handle(app, request, context) {
    app.count++;
    switch (request.op) {
      case 'call':
        return app.exports[request.name](...(request.args ?? []));
      case 'names':
        return Object.keys(app.exports);
      case 'count':
        return { count: app.count, arrivals: app.arrivals };
      case 'peek':
        return new Uint8Array((app.exports.memory ?? app.memory).buffer)[request.at];
      case 'poke':
        new Uint8Array(app.exports.memory.buffer)[request.at] = request.value;
        return null;
      case 'grow-memory':
        return app.exports.memory.grow(request.pages);
      case 'table':
        if (request.value === 'registered')
          app.exports.table.set(request.slot, asWasmFunction(app.registered));
        else if (request.value === 'anonymous')
          app.exports.table.set(
            request.slot,
            asWasmFunction(() => 1),
          );
        else if (request.value === 'null') app.exports.table.set(request.slot, null);
        else if (request.value === 'object') app.table.set(request.slot, { host: 'object' });
        return app.exports.table?.length ?? null;
      case 'grow-table':
        return app.exports.table.grow(request.by);
      case 'hold':
        app.unclonable = () => 1;
        return null;
      case 'instantiate-again': {
        const module = new WebAssembly.Module(Buffer.from(context.data.wasm, 'base64'));
        app.second = new WebAssembly.Instance(module, {});
        return app.second instanceof WebAssembly.Instance;
      }
      default:
        throw new TypeError(`no ${request.op}`);
    }
  },
});
