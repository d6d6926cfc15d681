/** A host of the trial `python`, through the public API: an interpreter that leaves, or arrives. */
import { type Listening, listen, type MigrationReport, type Mode, migrate } from 'memferry';
import { WorkerGuest, workerGuests } from 'memferry/worker';
import { answerCalls } from './peer.js';

const module = { name: 'python', url: new URL('../../../examples/python/python.mjs', import.meta.url) };
const patientMs = 120_000;
let guest: WorkerGuest | null = null;
let listening: Listening | null = null;

function running(): WorkerGuest {
  if (guest === null) throw new Error('no interpreter here');
  return guest;
}

answerCalls(
  {
    start: async ({ program }: { program: string }) => {
      guest = await WorkerGuest.start({ module });
      await guest.request({ run: program });
    },
    listen: async () => {
      const modules = { [module.name]: module.url };
      const onGuest = (arrived: WorkerGuest): void => {
        guest = arrived;
      };
      listening = await listen({
        host: '127.0.0.1',
        port: 0,
        prepareTimeoutMs: patientMs,
        accept: workerGuests({ modules, onGuest }),
      });
      void (async () => {
        for await (const arrival of listening) void arrival.complete.catch(() => {});
      })();
      return listening.port;
    },
    run: ({ code }: { code: string }) => running().request({ run: code }),
    /** The interpreter works all the while: `step` over and over, until it is gone. */
    migrate: async ({ port, mode, step }: { port: number; mode: Mode; step: string }) => {
      const leaving = running();
      let gone = false;
      let steps = 0;
      const working = (async () => {
        while (!gone) {
          try {
            await leaving.request({ run: step });
            steps++;
          } catch (error) {
            if ((error as { code?: string }).code === 'GUEST_MOVED') return;
            throw error;
          }
        }
      })();
      try {
        const migration = migrate(leaving, {
          to: { host: '127.0.0.1', port },
          mode,
          prepareTimeoutMs: patientMs,
        });
        const report: MigrationReport = await migration.done;
        return { report, steps };
      } finally {
        gone = true;
        await working;
      }
    },
  },
  () => void listening?.close(),
);
