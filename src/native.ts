/**
 * The boundary to the C++ addon: every export of the addon is typed in native/, and nowhere else; one file an engine.
 * What crosses is plain data and handles; pages never do. Absent values are `null`. Page numbers are JavaScript
 * numbers (regions stay below 2^53 pages), migration ids and tokens are Uint8Arrays.
 */
export type * from './native/addon.js';
export type * from './native/fd-channel.js';
export type * from './native/foreign-memory.js';
export type * from './native/receiver.js';
export type * from './native/region.js';
export type * from './native/sender.js';
export type * from './native/share.js';
export type * from './native/stage.js';
export type * from './native/tracker.js';
export type * from './native/transfer.js';
