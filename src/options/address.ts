/** Addresses as callers write them. Pure. */
import { isIPv4 } from 'node:net';
import { MemferryError } from '../errors.js';

/** `host:port` or `[v6]:port`; throws INVALID_ARGUMENT. */
export function parseAddress(text: string): { host: string; port: number } {
  if (typeof text !== 'string') {
    throw new MemferryError('INVALID_ARGUMENT', 'an address is missing; write HOST:PORT or [V6]:PORT');
  }
  const match = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text);
  const port = Number(match?.[3]);
  const host = match?.[1] ?? match?.[2];
  if (!host || !(port >= 0 && port <= 65535)) {
    throw new MemferryError('INVALID_ARGUMENT', `'${text}' is not an address; write HOST:PORT or [V6]:PORT`);
  }
  return { host, port };
}

/** What `parseAddress` reads. */
export function formatAddress(host: string, port: number | undefined): string {
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`;
}

/** `group:port` of a multicast group; throws INVALID_ARGUMENT. */
export function parseGroup(text: string): { host: string; port: number } {
  const group = parseAddress(text);
  if (group.port === 0) throw new MemferryError('INVALID_ARGUMENT', `'${text}' names no port of the group`);
  const first = Number(group.host.split('.')[0]);
  if (isIPv4(group.host) && first >= 224 && first <= 239) return group;
  throw new MemferryError(
    'INVALID_ARGUMENT',
    `${group.host} is not an IPv4 multicast group (224.0.0.0 to 239.255.255.255)`,
  );
}
