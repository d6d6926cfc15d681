/** What `QemuGuest.attach` and `QemuDestination` may be told. */
import { z } from 'zod';
import type { QemuArrivalOptions } from '../qemu/arriving-guest.js';
import type { QemuGuestOptions } from '../qemu/source-guest.js';
import { bytes, callback, label, milliseconds, parse, type Same } from './fields.js';

const socket = z.string('expected the path of a socket').min(1, 'expected the path of a socket');
const sockets = { qmp: socket, shim: socket, signal: z.instanceof(AbortSignal).optional() };

const guestSchema = z.strictObject({
  ...sockets,
  name: label.optional(),
  maxStateBytes: bytes.default(64 * 2 ** 20),
  stateTimeoutMs: milliseconds.default(10_000),
  afterwards: z.enum(['quit', 'stay']).default('quit'),
});
true satisfies Same<z.input<typeof guestSchema>, QemuGuestOptions>;

const arrivalSchema = z.strictObject({
  ...sockets,
  stateTimeoutMs: milliseconds.default(10_000),
  resumeTimeoutMs: milliseconds.default(30_000),
  onResumed: callback<[]>().optional(),
  onWarning: callback<[error: Error]>().optional(),
});
true satisfies Same<z.input<typeof arrivalSchema>, QemuArrivalOptions>;

export type ResolvedQemuGuestOptions = z.output<typeof guestSchema>;
export type ResolvedQemuArrivalOptions = z.output<typeof arrivalSchema>;

export function resolveQemuGuestOptions(options: QemuGuestOptions): ResolvedQemuGuestOptions {
  return parse(guestSchema, options, 'QemuGuest.attach');
}

export function resolveQemuArrivalOptions(options: QemuArrivalOptions): ResolvedQemuArrivalOptions {
  return parse(arrivalSchema, options, 'QemuDestination');
}
