/** How fast this host's link is, as its interface says: what servers that are chosen together should fill. */
import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { isIPv6 } from 'node:net';
import { networkInterfaces } from 'node:os';
import { join } from 'node:path';
import type { ResolvedMigrateOptions } from '../options.js';

type Address = { host: string; port: number };

/**
 * In bytes/s: what the caller says, or else the rate of the link to the first server, but no more than the migration may
 * take of it. Null where nobody knows. Asked only where servers are chosen.
 */
export async function linkToFill(
  {
    discover,
    linkBytesPerSecond,
    bandwidth,
  }: Pick<ResolvedMigrateOptions, 'discover' | 'linkBytesPerSecond' | 'bandwidth'>,
  servers: readonly Address[],
): Promise<number | null> {
  const [first] = servers;
  if (linkBytesPerSecond !== null || discover === false || !first) return linkBytesPerSecond;
  const rate = await interfaceRate(first);
  if (bandwidth === 0) return rate;
  return Math.min(bandwidth, rate ?? bandwidth);
}

/** Of the interface by which that host is reached; null when it does not say (loopback, most virtual machines). */
export async function interfaceRate(to: Address, sysfs = '/sys/class/net'): Promise<number | null> {
  try {
    const local = await localAddress(to);
    const found = Object.entries(networkInterfaces()).find(([, addresses]) =>
      addresses?.some(({ address }) => address === local),
    );
    if (!found) return null;
    const megabits = Number((await readFile(join(sysfs, found[0], 'speed'), 'utf8')).trim());
    return megabits > 0 ? (megabits * 1e6) / 8 : null;
  } catch {
    return null;
  }
}

/** Nothing is sent: the kernel only looks up the route. */
async function localAddress({ host, port }: Address): Promise<string> {
  const socket = createSocket(isIPv6(host) ? 'udp6' : 'udp4');
  try {
    const connected = once(socket, 'connect');
    socket.connect(port, host);
    await connected;
    return socket.address().address;
  } finally {
    socket.close();
  }
}
