/**
 * The Z3 solver (npm: z3-solver) as a guest: a session of SMT-LIB that goes on where it was, with all that the solver has
 * learnt. Z3 works in threads over one shared memory (Emscripten's pthreads), which it starts and parks itself. Nothing
 * of z3-solver is changed.
 *
 *     { "run": "(check-sat)" }     what the commands print
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

export default defineGuest({
  create: build,

  /** A pthread that has ended leaves a parked thread: the next one to run there gets a stack and all else afresh. */
  statelessThreads: true,

  /** The address of the session: all that JavaScript keeps. */
  layout: ({ Z3, context }) => [Z3.get_full_version(), `context at ${context}`],

  /** Those that have not ended, whatever they are doing. */
  busy: ({ em }) => em.PThread.runningWorkers.map(({ workerID }) => `pthread ${workerID} of Z3`),

  handle: ({ Z3, context }, { run }) => Z3.eval_smtlib2_string(context, run),
});
