/** What the two engines of a migration have in common: their events, and the VMD servers they know. */
import type { NativeRun } from './region.js';

export interface NativeEvent {
  kind:
    | 'connected'
    | 'round-done'
    | 'switched'
    | 'evicted'
    | 'first-channel'
    | 'filled'
    | 'complete'
    | 'lost'
    | 'rest-here'
    | 'paused'
    | 'recovered'
    | 'failed';
  tag: number;
  suspects: number;
  code: string;
  message: string;
  lost: NativeRun[];
}

/** A VMD server of a migration, with this side's tokens for it: [attempt * 6 + role], 32 bytes each. */
export interface NativeStageServer {
  name: string;
  host: string;
  port: number;
  session: number;
  tokens: Uint8Array;
  /** 16 hex digits, see `NativeStage.identity`; null: nothing is deduplicated there. */
  identity: string | null;
}

export interface NativeServerStats {
  pages: number;
  bytes: number;
  /** Why it was given up, or null. */
  failed: string | null;
}
