/**
 * What every byte of the guest's RAM has to be, from its registers alone: which tick it is in, and how far it has come in
 * it. Written from what guest.S does, not from what it has done.
 */
import { program } from './vmm.js';

const page = 4096;
const code = 0x1000;
const parameters = 0x2000;
const counterAt = 0x2010;
const ring = 0x4000;
const ringPages = 8;
const sweep = 0x10000;
const step = 0x9e3779b1;

export interface Registers {
  counter: number;
  /** Where in the program it stands. */
  at: number;
  /** Of the fill under way: words still to come. */
  left: number;
  /** What the device has put out last. */
  last: number;
}

const headBytes = 24;
const sectionOf = { registers: 1, device: 10 };

/** Reads them out of a state that the VMM has saved. */
export function registersOf(state: Uint8Array): Registers {
  const view = new DataView(state.buffer, state.byteOffset, state.byteLength);
  const sections = new Map<number, number>();
  for (let at = headBytes; at < state.byteLength; at += 8 + view.getUint32(at + 4, true)) {
    sections.set(view.getUint32(at, true), at + 8);
  }
  const registers = sections.get(sectionOf.registers) as number;
  const device = sections.get(sectionOf.device) as number;
  const register = (index: number) => Number(view.getBigUint64(registers + 8 * index, true));
  return {
    counter: register(1), // rbx
    left: register(2) & 0xffffffff, // rcx
    at: register(16) - code, // rip
    last: view.getUint32(device + 8, true),
  };
}

export function expectedRam({ counter, at, left, last }: Registers, ramBytes: number): Uint8Array {
  const words = new Uint32Array(ramBytes / 4);
  const pages = (ramBytes - sweep) / page;
  new Uint8Array(words.buffer).set(program.bytes, code);
  words.set([pages, sweep, ramBytes, Math.imul(pages, step) >>> 0], parameters / 4);
  // At its first instruction the tick before is over; anywhere else one is under way.
  const whole = at === 0 ? counter : counter - 1;
  words[counterAt / 4] = at > program.store ? counter : whole;
  for (let count = Math.max(1, last - ringPages + 1); count <= last; count++) {
    const start = (ring + (count % ringPages) * page) / 4;
    words.fill(count, start, start + page / 4);
  }

  let random = 0;
  const fill = (tick: number, length: number) => {
    const start = sweep / 4 + ((tick - 1) % pages) * (page / 4);
    words.fill(Math.imul(tick, step) >>> 0, start, start + length);
  };
  const scribble = (tick: number) => {
    const start = sweep / 4 + ((random >>> 8) % pages) * (page / 4);
    words[start + ((tick & 1023) | 1)] = tick;
  };
  // What is older than one sweep over everything has been overwritten.
  for (let tick = 1; tick <= whole; tick++) {
    random = (Math.imul(random, 1664525) + 1013904223) >>> 0;
    if (tick <= whole - pages) continue;
    fill(tick, page / 4);
    scribble(tick);
  }
  if (at > 0) {
    random = (Math.imul(random, 1664525) + 1013904223) >>> 0;
    if (at >= program.fill) fill(counter, at === program.fill ? page / 4 - left : page / 4);
    if (at > program.scribble) scribble(counter);
  }
  return new Uint8Array(words.buffer);
}

/** What is wrong with the RAM of a guest that stands, at most `limit` findings; none when every byte is right. */
export function findWrong(state: Uint8Array, ram: Uint8Array, limit = 5): string[] {
  const registers = registersOf(state);
  const { counter, at, last } = registers;
  const wrong: string[] = [];
  const out = at === 0 || at > program.out ? counter : counter - 1;
  if (last !== out) wrong.push(`the device has put out ${last}, the guest ${out}`);
  const expected = expectedRam(registers, ram.byteLength);
  for (let start = 0; start < ram.byteLength && wrong.length < limit; start += page) {
    const found = ram.subarray(start, start + page);
    const wanted = expected.subarray(start, start + page);
    if (Buffer.compare(found, wanted) === 0) continue;
    const at = found.findIndex((byte, index) => byte !== wanted[index]) & ~3;
    const word = (bytes: Uint8Array) =>
      new DataView(bytes.buffer, bytes.byteOffset + at, 4).getUint32(0, true);
    wrong.push(
      `address ${(start + at).toString(16)} has ${word(found)}, not ${word(wanted)}, at count ${counter}`,
    );
  }
  return wrong;
}
