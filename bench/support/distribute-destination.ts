/** The destination of the trial `distribute`: a host whose page share was primed, and that receives guests. */
import {
  type Distribution,
  type DistributionStats,
  distribute,
  type Listening,
  listen,
  Share,
  type ShareFill,
} from 'memferry';
import { answerCalls } from './peer.js';

let share: Share | null = null;
let listener: Listening | null = null;
let distribution: Distribution | null = null;

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
    /** The share is filled with what the servers count as popular. */
    spread: async ({ via, domain }: { via: string[]; domain: string }): Promise<void> => {
      if (share) distribution = await distribute(share, { via, dedup: { domain }, intervalMs: 2000 });
    },
    spreading: (): DistributionStats | null => distribution?.stats() ?? null,
    listen: async ({ domain, file }: { domain: string; file: string }): Promise<number> => {
      listener = await listen({ dedup: { domain }, share: file });
      void (async () => {
        // Regions of their own, and nobody who runs in them.
        for await (const arrival of listener) void arrival.complete.catch(() => {});
      })();
      return listener.port;
    },
    end: async () => {
      await distribution?.close();
      await listener?.close();
      await share?.close({ discard: true });
    },
  },
  () => {},
);
