/** Addresses as callers write them. Pure. */
import { MemferryError } from '../errors.js';

/** `host:port` or `[v6]:port`; throws INVALID_ARGUMENT. */
export function parseAddress(text: string): { host: string; port: number } {
  const match = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text);
  const port = Number(match?.[3]);
  const host = match?.[1] ?? match?.[2];
  if (!host || !(port >= 0 && port <= 65535)) {
    throw new MemferryError('INVALID_ARGUMENT', `'${text}' is not an address; write HOST:PORT or [V6]:PORT`);
  }
  return { host, port };
}
