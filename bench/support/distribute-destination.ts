/** The destination of the trial `distribute`: a host whose page share was primed, and that receives guests. */
import { type Listening, listen, Share, type ShareFill } from 'memferry';
import { answerCalls } from './peer.js';

let share: Share | null = null;
let listener: Listening | null = null;

export interface Primed {
  domain: string;
  file: string;
  budgetBytes: number;
  images: string[];
}

answerCalls(
  {
    prime: async ({ domain, file, budgetBytes, images }: Primed): Promise<ShareFill[]> => {
      share = await Share.open({ budgetBytes, file, dedup: { domain } });
      const filled: ShareFill[] = [];
      for (const image of images) filled.push(await share.fill(image));
      return filled;
    },
    listen: async ({ domain, file }: { domain: string; file: string }): Promise<number> => {
      listener = await listen({ dedup: { domain }, share: file });
      void (async () => {
        // Regions of their own, and nobody who runs in them.
        for await (const arrival of listener) void arrival.complete.catch(() => {});
      })();
      return listener.port;
    },
    end: async () => {
      await listener?.close();
      await share?.close({ discard: true });
    },
  },
  () => {},
);
