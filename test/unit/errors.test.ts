import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import {
  ArgumentError,
  ERROR_CODES,
  fromNative,
  fromNativeEvent,
  GuestError,
  isErrorCode,
  LossError,
  MemferryError,
  MigrationError,
  memferryError,
  RegionError,
  SystemCallError,
} from '../../src/errors.js';

describe('errors', () => {
  it('have one class a code, however they are made', () => {
    for (const code of ERROR_CODES) {
      const made = memferryError(code, 'text');
      const plain = new MemferryError(code, 'text');
      expect(plain.constructor).toBe(made.constructor);
      expect(made.constructor).not.toBe(MemferryError);
      expect(made).toBeInstanceOf(MemferryError);
      expect(made).toBeInstanceOf(Error);
      expect(made.code).toBe(code);
      expect(made.name).toBe(made.constructor.name);
      expect(made.message).toBe('text');
    }
    expect(new MemferryError('REGION_BUSY', '')).toBeInstanceOf(RegionError);
    expect(new MemferryError('PAGES_LOST', '')).toBeInstanceOf(MigrationError);
  });

  it('are in the README, each of them', () => {
    const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8');
    expect(ERROR_CODES.filter((code) => !readme.includes(`\`${code}\``))).toEqual([]);
  });

  it('carry their facts', () => {
    const busy = memferryError('GUEST_BUSY', 'busy', { facts: { names: ['a timer'] } });
    expect(busy).toBeInstanceOf(GuestError);
    expect(busy.names).toEqual(['a timer']);
    const lost = memferryError('PAGES_LOST', 'lost', {
      facts: {
        runs: [
          { region: 0, first: 3, count: 2 },
          { region: 1, first: 0, count: 5 },
        ],
      },
    });
    expect(lost).toBeInstanceOf(LossError);
    expect(lost.pages).toBe(7);
    expect(lost.runs).toHaveLength(2);
    expect(memferryError('GUEST_LOST', 'lost', { facts: { pages: 12 } }).pages).toBe(12);
  });

  it('keep their cause, and print as plain data', () => {
    const cause = new Error('below');
    const error = memferryError('PREPARE_FAILED', 'above', { cause });
    expect(error.cause).toBe(cause);
    expect(JSON.parse(JSON.stringify(error))).toEqual({
      name: 'GuestError',
      code: 'PREPARE_FAILED',
      message: 'above',
      facts: {},
      cause: 'below',
    });
  });

  it('are told from other strings', () => {
    expect(isErrorCode('CANCELLED')).toBe(true);
    for (const other of ['toString', '__proto__', 'ENOMEM', '', null, 3])
      expect(isErrorCode(other)).toBe(false);
  });
});

describe('what the addon throws', () => {
  it('becomes the class of its code', () => {
    const native = (code: string, more = {}) =>
      fromNative(Object.assign(new Error('text'), { code, ...more }));
    expect(native('UNALIGNED').code).toBe('REGION_UNALIGNED');
    expect(native('REGION_GONE')).toBeInstanceOf(RegionError);
    expect(native('SYSTEM', { errno: 12, syscall: 'mmap' }).code).toBe('NO_MEMORY');
    const denied = native('SYSTEM', { errno: 13, syscall: 'open' });
    expect(denied).toBeInstanceOf(SystemCallError);
    expect(denied).toMatchObject({ code: 'SYSTEM', errno: 13, syscall: 'open', message: 'text' });
    expect(denied.cause).toBeInstanceOf(Error);
    expect(native('SYSTEM', { errno: 1, syscall: 'userfaultfd' }).code).toBe('USERFAULTFD_UNAVAILABLE');
    expect(fromNative(new TypeError('x'))).toBeInstanceOf(ArgumentError);
    expect(fromNative('nonsense').code).toBe('SYSTEM');
    expect(fromNative(undefined).code).toBe('SYSTEM');
    const own = memferryError('CANCELLED', 'x');
    expect(fromNative(own)).toBe(own);
  });

  it('becomes the same for the failures of engines', () => {
    const expected = {
      CHANNEL_LOST: 'CHANNEL_LOST',
      CONNECT_FAILED: 'CONNECT_FAILED',
      PROTOCOL: 'PROTOCOL_ERROR',
      REFUSED: 'AUTH_FAILED',
      CHECKSUM: 'PROTOCOL_ERROR',
      RECOVERY_TIMEOUT: 'PEER_LOST',
      REGION_GONE: 'REGION_GONE',
      SYSTEM: 'SYSTEM',
    };
    for (const [code, mapped] of Object.entries(expected)) {
      expect(fromNativeEvent({ code, message: 'm' })).toMatchObject({ code: mapped, message: 'm' });
    }
  });
});
