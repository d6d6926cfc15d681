/** Which addresses may be spoken to without encryption. */
import { expect, it } from 'vitest';
import { checkAddressPolicy, isLoopback } from '../../src/control/address.js';

it('knows loopback in all its spellings', () => {
  for (const host of [
    '127.0.0.1',
    '127.255.255.254',
    '::1',
    '[::1]',
    '0:0:0:0:0:0:0:1',
    '::ffff:127.0.0.1',
    '::ffff:7f00:1',
    'localhost',
    'LOCALHOST',
  ]) {
    expect([host, isLoopback(host)]).toEqual([host, true]);
  }
});

it('takes nothing else for loopback', () => {
  for (const host of [
    '0.0.0.0',
    '::',
    '10.0.0.1',
    '128.0.0.1',
    '::ffff:10.0.0.1',
    'fe80::1',
    '127.0.0.1.example.org',
    'localhost.example.org',
    '127.1',
    '0x7f000001',
    '',
    ' 127.0.0.1',
  ]) {
    expect([host, isLoopback(host)]).toEqual([host, false]);
  }
});

it('asks for plaintext anywhere else', () => {
  expect(() => checkAddressPolicy('10.0.0.1')).toThrow(
    expect.objectContaining({ code: 'PLAINTEXT_REQUIRED' }),
  );
  expect(() => checkAddressPolicy('0.0.0.0')).toThrow(
    expect.objectContaining({ code: 'PLAINTEXT_REQUIRED' }),
  );
  expect(() => checkAddressPolicy('10.0.0.1', { plaintext: true })).not.toThrow();
  expect(() => checkAddressPolicy('10.0.0.1', { encrypted: true })).not.toThrow();
  expect(() => checkAddressPolicy('127.0.0.1')).not.toThrow();
});
