/** Which addresses may be spoken to in plain text. Pure. */
import { BlockList, isIP } from 'node:net';
import { MemferryError } from '../errors.js';

const loopback = new BlockList();
loopback.addSubnet('127.0.0.0', 8, 'ipv4');
loopback.addAddress('::1', 'ipv6');

/**
 * Whether `host` can only mean this machine. Names other than `localhost` are not looked up: what they mean may
 * change between the question and the connection. `0.0.0.0` and `::` listen to everyone and are not loopback.
 */
export function isLoopback(host: string): boolean {
  const address = host.startsWith('[') && host.endsWith(']') ? host.slice(1, -1) : host;
  const family = isIP(address);
  if (family === 0) return address.toLowerCase() === 'localhost';
  // An IPv4 address mapped into IPv6 (::ffff:127.0.0.1) is checked as what it maps.
  return loopback.check(address, family === 6 ? 'ipv6' : 'ipv4');
}

/** Throws PLAINTEXT_REQUIRED unless the address is loopback, or plain text was asked for, or it is not plain. */
export function checkAddressPolicy(
  host: string,
  { plaintext = false, encrypted = false }: { plaintext?: boolean; encrypted?: boolean } = {},
): void {
  if (plaintext || encrypted || isLoopback(host)) return;
  throw new MemferryError(
    'PLAINTEXT_REQUIRED',
    `${host} is not a loopback address, and the connection would not be encrypted: memory and state could be ` +
      'read and changed on the way. Say so with plaintext: true (--plaintext) if the network is trusted.',
    { facts: { host } },
  );
}
