/**
 * A bounded cursor over the bytes of a WebAssembly binary, and the few encoders the rewrite needs. Every read
 * checks what is left; a malformed binary ends in a WasmFormatError with the offset, never in a loop.
 */

export class WasmFormatError extends Error {
  constructor(
    message: string,
    readonly offset: number,
  ) {
    super(`${message} (at byte ${offset})`);
    this.name = 'WasmFormatError';
  }
}

export class WasmReader {
  constructor(
    readonly bytes: Uint8Array,
    public at: number,
    readonly end: number,
  ) {}

  get done(): boolean {
    return this.at >= this.end;
  }

  fail(message: string): never {
    throw new WasmFormatError(message, this.at);
  }

  u8(): number {
    if (this.at >= this.end) this.fail('unexpected end');
    return this.bytes[this.at++] as number;
  }

  peek(): number {
    if (this.at >= this.end) this.fail('unexpected end');
    return this.bytes[this.at] as number;
  }

  skip(count: number): void {
    if (count > this.end - this.at) this.fail(`${count} bytes wanted, ${this.end - this.at} left`);
    this.at += count;
  }

  /** Unsigned LEB128 of at most 32 bits: five bytes, the last of which has four significant bits. */
  u32(): number {
    let value = 0;
    for (let i = 0; i < 5; i++) {
      const byte = this.u8();
      if (i === 4 && byte > 0x0f) this.fail('a 32-bit number is too long');
      value += (byte & 0x7f) * 2 ** (7 * i);
      if (byte < 0x80) return value;
    }
    return this.fail('a 32-bit number is too long');
  }

  /** Steps over a LEB128 number of at most `bits` bits, signed or not, whose value is of no interest. */
  skipLeb(bits: number): void {
    const most = Math.ceil(bits / 7);
    for (let i = 0; i < most; i++) if (this.u8() < 0x80) return;
    this.fail(`a ${bits}-bit number is too long`);
  }

  /** Unsigned LEB128 of at most 64 bits, as a double: limits of memories, beyond 2^53 of no use to anyone. */
  u64(): number {
    let value = 0;
    for (let i = 0; i < 10; i++) {
      const byte = this.u8();
      value += (byte & 0x7f) * 2 ** (7 * i);
      if (byte < 0x80) return value;
    }
    return this.fail('a 64-bit number is too long');
  }

  /** A vector's length; every element takes at least one byte, which bounds the loops over it. */
  count(): number {
    const count = this.u32();
    if (count > this.end - this.at)
      this.fail(`${count} elements announced, ${this.end - this.at} bytes left`);
    return count;
  }

  name(): string {
    const length = this.u32();
    const from = this.at;
    this.skip(length);
    return Buffer.from(this.bytes.buffer, this.bytes.byteOffset + from, length).toString('utf8');
  }
}

export function encodeU32(value: number): number[] {
  const out: number[] = [];
  let rest = value;
  do {
    const low = rest % 128;
    rest = Math.floor(rest / 128);
    out.push(rest > 0 ? low | 0x80 : low);
  } while (rest > 0);
  return out;
}

export function encodeName(name: string): number[] {
  const bytes = Buffer.from(name, 'utf8');
  return [...encodeU32(bytes.length), ...bytes];
}
