/** The example's guest, and what a test wants to know of it: its memory, its threads, one that goes on running. */
import { createHash } from 'node:crypto';
import { defineGuest } from 'memferry/worker';
import z3, { run } from '../../../examples/z3/z3.mjs';

const PIECE = 2 ** 26;

export default defineGuest({
  ...z3,
  async handle(app, request, context) {
    const { Z3, em } = app;
    switch (request.op) {
      case 'digest': {
        // Threads that have just ended are freed by a message to this one.
        while (em.PThread.runningWorkers.length > 0) await new Promise(setImmediate);
        const hash = createHash('sha256');
        const { buffer } = em.HEAPU8;
        for (let at = 0; at < buffer.byteLength; at += PIECE) hash.update(new Uint8Array(buffer, at, PIECE));
        return { sha256: hash.digest('hex'), bytes: buffer.byteLength };
      }
      case 'threads':
        return em.PThread.unusedWorkers.length + em.PThread.runningWorkers.length;
      case 'begin':
        app.running = run(app, request.run);
        return null;
      case 'interrupt':
        Z3.interrupt(app.context);
        return app.running;
      default:
        return z3.handle(app, request, context);
    }
  },
});
