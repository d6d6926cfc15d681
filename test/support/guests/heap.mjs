/** A guest whose memory is a plain region, without WebAssembly. */
import { defineGuest } from 'memferry/worker';

export default defineGuest({
  create: (context) => ({ heap: context.heap(context.data.heapBytes)[0], length: 0 }),
  save: ({ length }) => ({ length }),
  adopt: (app, state) => {
    app.length = state.length;
  },
  handle(app, request) {
    if (request.op === 'append') {
      app.heap.set(Buffer.from(request.text), app.length);
      app.length += Buffer.byteLength(request.text);
    }
    return Buffer.from(app.heap.subarray(0, app.length)).toString();
  },
});
