/**
 * The Z3 solver (npm: z3-solver) as a guest: a session of SMT-LIB that goes on where it was, with all that the solver has
 * learnt. Z3 works in threads over one shared memory (Emscripten's pthreads), which it starts and parks itself. Nothing
 * of z3-solver is changed.
 *
 *     { "run": "(check-sat)" }     what the commands print
 *
 * A session with a time limit (`:timeout`) does not move: Z3's clock is a thread that waits inside WebAssembly for good.
 */
import { defineGuest } from 'memferry/worker';
import { init } from 'z3-solver';

async function build() {
  const { Z3, em } = await init();
  const config = Z3.mk_config();
  const context = Z3.mk_context(config);
  Z3.del_config(config);
  return { Z3, em, context };
}

/** In a thread of its own. The commands' text is the thread's for so long, so it must not lie on this one's stack. */
export async function run({ em, context }, commands) {
  const text = new TextEncoder().encode(`${commands}\0`);
  const at = em._malloc(text.length);
  em.HEAPU8.set(text, at);
  try {
    return await em.async_call(em._async_Z3_eval_smtlib2_string, context, at);
  } finally {
    em._free(at);
  }
}

export default defineGuest({
  create: build,

  /** A pthread that has ended leaves a parked thread: the next one to run there gets a stack and all else afresh. */
  statelessThreads: true,

  /** The address of the session: all that JavaScript keeps. */
  layout: ({ Z3, context }) => [Z3.get_full_version(), `context at ${context}`],

  /** Those that have not ended, whatever they are doing. */
  busy: ({ em }) => em.PThread.runningWorkers.map(({ workerID }) => `pthread ${workerID} of Z3`),

  handle: (app, request) => run(app, request.run),
});
