/** The destination process of a trial of whole migrations, through the public API. */
import { type Listening, listen } from 'memferry';
import { answerCalls } from './peer.js';
import { residentBytes } from './resident.js';

let idleBytes = 0;
let listener: Listening | null = null;

answerCalls(
  {
    listen: async () => {
      listener = await listen({ host: '127.0.0.1', port: 0 });
      idleBytes = residentBytes().now;
      void (async () => {
        // Regions of their own, and nobody who runs in them.
        for await (const arrival of listener) void arrival.complete;
      })();
      return listener.port;
    },
    extraBytes: ({ lengthBytes }: { lengthBytes: number }) => residentBytes().peak - idleBytes - lengthBytes,
  },
  () => {},
);
