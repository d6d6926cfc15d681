/**
 * A guest of one's own: a counter whose digits live in a heap that moves page by page, and whose history is
 * JavaScript state that moves at the switchover.
 */
import { defineGuest } from 'memferry/worker';

const HEAP_BYTES = 64 * 2 ** 20;

function build(context) {
  const [bytes] = context.heap(HEAP_BYTES);
  return { counters: new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4), history: [] };
}

export default defineGuest({
  /** The first life. */
  create(context) {
    const app = build(context);
    app.history.push('created');
    return app;
  },

  /** The destination, before the first page: the same heap, still empty. */
  receive: build,

  /** The source, at the safepoint: what JavaScript alone knows. */
  save: ({ history }) => ({ history }),

  /** The destination: the memory is the source's now. */
  adopt(app, { history }) {
    app.history = [...history, `moved to process ${process.pid}`];
  },

  /** `{"add": 3}`, `{"add": 1, "slot": 7}`, "read", "history". */
  handle({ counters, history }, request) {
    if (request === 'history') return history;
    if (request === 'read') return counters[0];
    const { add, slot = 0 } = Object(request);
    if (!Number.isInteger(add) || !(slot >= 0 && slot < counters.length)) {
      throw new RangeError('write {"add": N}, {"add": N, "slot": N}, "read" or "history"');
    }
    counters[slot] += add;
    return counters[slot];
  },
});
