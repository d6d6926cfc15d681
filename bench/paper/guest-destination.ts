/** The destination process of a trial: takes guests in, and runs them. */
import { type ListenOptions, type Listening, listen, rehearse } from 'memferry';
import { answerCalls } from '../support/peer.js';
import { type GuestSpec, makeReady } from './guests.js';

let listener: Listening | null = null;

export interface ListenParameters {
  host: string;
  spec: GuestSpec;
  /** As listen() takes them; of this version of memferry or of a later one. */
  options: Record<string, unknown>;
}

answerCalls(
  {
    listen: async ({ host, spec, options }: ListenParameters) => {
      await rehearse(); // a host that waits for guests has done so, as `memferry receive` does
      const accept = await makeReady(spec, host);
      const listening = await listen({
        ...options,
        host,
        port: 0,
        accept,
      } as ListenOptions);
      listener = listening;
      void (async () => {
        for await (const arrival of listening) {
          arrival.resumed.catch(() => {});
          // What goes wrong here the source's report or error tells as well.
          arrival.complete.catch((error) => process.stderr.write(`destination: ${String(error)}\n`));
        }
      })();
      return listening.port;
    },
  },
  () => {
    void listener?.close();
  },
);
