/**
 * A parked guest beside its pages, as one piece of bytes in the server's memory, where it counts against the cap:
 * `u32 length | JSON of the guest | execution state`. Pure.
 */
import type { ParkedGuest } from '../protocol/stage-messages.js';

export function packState(guest: ParkedGuest, state: Uint8Array): Uint8Array {
  const json = Buffer.from(JSON.stringify(guest), 'utf8');
  const packed = new Uint8Array(4 + json.length + state.length);
  Buffer.from(packed.buffer).writeUInt32LE(json.length, 0);
  packed.set(json, 4);
  packed.set(state, 4 + json.length);
  return packed;
}

/** Of what `packState` made: the schema has checked it on arrival. */
export function unpackState(packed: Uint8Array): { guest: ParkedGuest; state: Uint8Array } {
  const bytes = Buffer.from(packed.buffer, packed.byteOffset, packed.length);
  const end = 4 + bytes.readUInt32LE(0);
  return {
    guest: JSON.parse(bytes.toString('utf8', 4, end)) as ParkedGuest,
    state: packed.subarray(end),
  };
}
