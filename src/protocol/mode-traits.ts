/** What each mode is composed of. Pure. */
import type { Mode } from '../options.js';

export interface ModeTraits {
  /** Pre-copy rounds while the guest runs at the source. */
  rounds: boolean;
  /** Only so many rounds, then post-copy. */
  boundedRounds: boolean;
  /** It resumes at the destination before its pages are there. */
  paging: boolean;
  /** What the destination does not take in time goes through VMD servers. */
  scatter: boolean;
}

const traits: Record<Mode, ModeTraits> = {
  'stop-and-copy': { rounds: false, boundedRounds: false, paging: false, scatter: false },
  'pre-copy': { rounds: true, boundedRounds: false, paging: false, scatter: false },
  'post-copy': { rounds: false, boundedRounds: false, paging: true, scatter: false },
  hybrid: { rounds: true, boundedRounds: true, paging: true, scatter: false },
  scatter: { rounds: false, boundedRounds: false, paging: true, scatter: true },
  'scatter-pre-copy': { rounds: true, boundedRounds: false, paging: false, scatter: true },
  'scatter-hybrid': { rounds: true, boundedRounds: true, paging: true, scatter: true },
};

export function traitsOf(mode: Mode): ModeTraits {
  return traits[mode];
}

/** The destination has every page before it prepares, though not all of them come from the source. */
export function gathersFirst({ scatter, paging }: ModeTraits): boolean {
  return scatter && !paging;
}
