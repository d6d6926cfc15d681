/** What `superviseGuest` may be told. */
import { z } from 'zod';
import type { AttachOptions } from '../attach.js';
import { bytes, callback, milliseconds, parse, type Same } from './fields.js';

/** What `superviseGuest` takes. */
export interface SuperviseOptions {
  /** The guest's memory, as for `Region.attach`; `uffd` is needed. Keep the descriptors open until `done` settles. */
  attachment: AttachOptions;
  /** Where its pages come from, see `servePages`. Opened once: every pager has this very file. */
  snapshot: string;
  /** Where in the file they begin. Default 0. */
  offsetBytes?: number;
  /** Bring everything in order beside the faults. Default true; else only what is touched comes. */
  prepage?: boolean;
  /** What happens when a pager that has served dies: a new one goes on (default), or the guest is ended. */
  onPagerDeath?: 'hand-over' | 'end';
  /** So many pagers in all, 1 to 1000, and the guest is ended when the last one dies. Default 5. */
  mostPagers?: number;
  /**
   * A pager that says nothing for so long has died, in ms, from 1000: it says something twice a second. Its first word
   * may take 20 s. Default 5000.
   */
  stallMs?: number;
  /** Told of each pager as it begins to serve. What it throws is a warning of the process. */
  onPager?: (pager: { pid: number; turn: number }) => void;
}

const superviseSchema = z.strictObject({
  /** Checked where it is used. */
  attachment: z.custom<AttachOptions>(() => true),
  snapshot: z.string('expected the path of a file').min(1, 'expected the path of a file'),
  offsetBytes: bytes.default(0),
  prepage: z.boolean().default(true),
  onPagerDeath: z.enum(['hand-over', 'end']).default('hand-over'),
  mostPagers: z.int().min(1).max(1000).default(5),
  stallMs: milliseconds.min(1000).default(5000),
  onPager: callback<[pager: { pid: number; turn: number }]>().optional(),
});
true satisfies Same<z.input<typeof superviseSchema>, SuperviseOptions>;

export function resolveSuperviseOptions(options: SuperviseOptions): z.output<typeof superviseSchema> {
  return parse(superviseSchema, options, 'superviseGuest');
}
