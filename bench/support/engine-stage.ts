/** The process of a VMD server below the public API: its memory, a listener, and one image at a time. */
import type { NativeImageStats, NativeListener, NativeStage, NativeStageStats } from '../../lib/native.js';
import { loadAddon } from './addon.js';
import { answerCalls } from './peer.js';
import { residentBytes } from './resident.js';

const addon = loadAddon();
let stage: NativeStage | null = null;
let listener: NativeListener | null = null;
let image: Uint8Array = new Uint8Array(0);

function must<T>(value: T | null): T {
  if (value === null) throw new Error('called too early');
  return value;
}

export interface ListenParameters {
  host: string;
  memoryBytes: number;
  preallocate: boolean;
}

export interface StageSession {
  session: number;
  /** Bit n for the role of connections that the protocol numbers n. */
  roles: number;
  tokens: Uint8Array;
}

export interface ImageParameters {
  image: Uint8Array;
  pages: number;
  ordinal: number;
  /** Of its deduplication domain. */
  domainKey: Uint8Array | null;
  sessions: readonly StageSession[];
}

export interface StageFigures {
  image: NativeImageStats;
  stage: NativeStageStats;
  residentBytes: number;
}

answerCalls(
  {
    listen: async ({ host, memoryBytes, preallocate }: ListenParameters) => {
      stage = addon.createStage({ memoryBytes, bandwidth: 0 });
      if (preallocate) await stage.preallocate();
      listener = addon.createListener(host, 0, () => {});
      listener.serveStage(stage);
      return listener.port;
    },
    createImage: (parameters: ImageParameters) => {
      image = parameters.image;
      if (!must(stage).createImage(image, [parameters.pages], parameters.ordinal, parameters.domainKey)) {
        throw new Error('no room for the index');
      }
      for (const { session, roles, tokens } of parameters.sessions) {
        must(stage).addSession(image, session, roles, tokens);
      }
      return must(stage).identity();
    },
    figures: (): StageFigures => ({
      image: must(must(stage).image(image)),
      stage: must(stage).stats(),
      residentBytes: residentBytes().now,
    }),
  },
  () => {
    listener?.close();
    stage?.close();
  },
);
