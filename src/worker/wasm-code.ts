/**
 * Finds out which tables the code of a module writes: `table.set`, `table.grow`, `table.fill`, `table.copy` and
 * `table.init`. Most programs leave that to JavaScript, where writes are seen; then what stands in a table is known
 * at any time, and reading some ten thousand slots is no part of a pause. Steps over every instruction once (about
 * 100 MB/s). Whatever it does not know ends in `null`: any table may be written.
 * Instructions: WebAssembly core specification, "Binary Format", and the threads, exceptions and tail call proposals.
 */
import type { WasmShape } from './wasm-shape.js';

class Unknown extends Error {}

/** Numbers of the tables, or null when it cannot be told. */
export function tablesWritten(bytes: Uint8Array, shape: WasmShape): Set<number> | null {
  const code = shape.sections.find((section) => section.id === 10);
  const found = new Set<number>();
  // Nothing to write, and nothing to decode.
  if (code === undefined || shape.tables.length === 0) return found;
  try {
    new CodeWalk(bytes, code.bodyStart, code.end, found).run();
    return found;
  } catch (error) {
    if (error instanceof Unknown) return null;
    throw error;
  }
}

/** What follows an opcode of one byte. */
const NOTHING = 0;
const ONE = 1;
const TWO = 2;
const MEMORY = 3;
const SIGNED = 4;
const OTHER = 5;
const UNKNOWN = 6;

const SHAPES = new Uint8Array(256).fill(UNKNOWN);
const fill = (shape: number, from: number, to = from): void => void SHAPES.fill(shape, from, to + 1);
fill(NOTHING, 0x00, 0x01);
fill(SIGNED, 0x02, 0x04); // block, loop, if: a block type
fill(NOTHING, 0x05);
fill(SIGNED, 0x06); // try
fill(ONE, 0x07, 0x09);
fill(NOTHING, 0x0a, 0x0b);
fill(ONE, 0x0c, 0x0d);
fill(OTHER, 0x0e); // br_table
fill(NOTHING, 0x0f);
fill(ONE, 0x10);
fill(TWO, 0x11);
fill(ONE, 0x12);
fill(TWO, 0x13);
fill(ONE, 0x14, 0x15);
fill(ONE, 0x18);
fill(NOTHING, 0x19, 0x1b);
fill(OTHER, 0x1c); // select with types
fill(OTHER, 0x1f); // try_table
fill(ONE, 0x20, 0x25);
fill(OTHER, 0x26); // table.set
fill(MEMORY, 0x28, 0x3e);
fill(ONE, 0x3f, 0x40);
fill(SIGNED, 0x41, 0x42);
fill(OTHER, 0x43, 0x44);
fill(NOTHING, 0x45, 0xc4);
fill(SIGNED, 0xd0);
fill(NOTHING, 0xd1);
fill(ONE, 0xd2);
fill(NOTHING, 0xd3, 0xd4);
fill(ONE, 0xd5, 0xd6);
fill(OTHER, 0xfc, 0xfe);

class CodeWalk {
  constructor(
    private readonly bytes: Uint8Array,
    private at: number,
    private readonly end: number,
    private readonly found: Set<number>,
  ) {}

  run(): void {
    for (let count = this.u32(); count > 0; count--) {
      const size = this.u32();
      const end = this.at + size;
      if (end > this.end) throw new Unknown();
      for (let groups = this.u32(); groups > 0; groups--) {
        this.leb();
        this.valueType();
      }
      while (this.at < end) this.instruction();
      if (this.at !== end) throw new Unknown();
    }
  }

  private instruction(): void {
    const opcode = this.bytes[this.at++] as number;
    switch (SHAPES[opcode]) {
      case NOTHING:
        return;
      case ONE:
      case SIGNED:
        // A block type of a reference with a heap type of its own has two parts.
        if (opcode <= 0x06 && opcode >= 0x02) this.valueType();
        else this.leb();
        return;
      case TWO:
        this.leb();
        this.leb();
        return;
      case MEMORY:
        this.memoryArgument();
        return;
      case OTHER:
        this.other(opcode);
        return;
      default:
        throw new Unknown();
    }
  }

  private other(opcode: number): void {
    if (opcode === 0x0e) for (let count = this.u32() + 1; count > 0; count--) this.leb();
    else if (opcode === 0x1c) for (let count = this.u32(); count > 0; count--) this.valueType();
    else if (opcode === 0x1f) {
      this.valueType();
      for (let count = this.u32(); count > 0; count--) {
        const kind = this.bytes[this.at++] as number;
        if (kind > 3) throw new Unknown();
        if (kind < 2) this.leb();
        this.leb();
      }
    } else if (opcode === 0x26) this.found.add(this.u32());
    else if (opcode === 0x43) this.at += 4;
    else if (opcode === 0x44) this.at += 8;
    else if (opcode === 0xfc) this.bulk(this.u32());
    else if (opcode === 0xfd) this.vector(this.u32());
    else this.atomic(this.u32());
  }

  private bulk(opcode: number): void {
    if (opcode <= 7) return;
    if (opcode > 17) throw new Unknown();
    if (opcode === 12) {
      this.leb();
      this.found.add(this.u32());
    } else if (opcode === 14) {
      this.found.add(this.u32());
      this.leb();
    } else if (opcode === 15 || opcode === 17) this.found.add(this.u32());
    else {
      this.leb();
      if (opcode === 8 || opcode === 10) this.leb();
    }
  }

  private vector(opcode: number): void {
    if (opcode > 0x113) throw new Unknown();
    if (opcode <= 11 || (opcode >= 84 && opcode <= 93)) this.memoryArgument();
    if (opcode === 12 || opcode === 13) this.at += 16;
    if ((opcode >= 21 && opcode <= 34) || (opcode >= 84 && opcode <= 91)) this.at += 1;
  }

  private atomic(opcode: number): void {
    if (opcode === 3) this.at += 1;
    else if (opcode <= 2 || (opcode >= 0x10 && opcode <= 0x4e)) this.memoryArgument();
    else throw new Unknown();
  }

  private memoryArgument(): void {
    const align = this.u32();
    if (align & 64) this.leb();
    this.leb();
  }

  private valueType(): void {
    const code = this.bytes[this.at] as number;
    if (code === 0x63 || code === 0x64) this.at++;
    this.leb();
  }

  /** Steps over a number of any kind. */
  private leb(): void {
    const { bytes } = this;
    let at = this.at;
    while ((bytes[at++] as number) >= 0x80);
    this.at = at;
    if (at > this.end) throw new Unknown();
  }

  private u32(): number {
    let value = 0;
    for (let shift = 0; shift < 35; shift += 7) {
      if (this.at >= this.end) throw new Unknown();
      const byte = this.bytes[this.at++] as number;
      value += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return value;
    }
    throw new Unknown();
  }
}
