/**
 * VMD servers announce themselves by UDP multicast, so that nobody has to keep a list of them. These are hints:
 * what a server really is shows on the control connection, where both sides prove that they know the secret.
 *
 * A datagram is `HMAC-SHA256(HMAC(secret; "memferry announce"); JSON) | JSON`, at most 1200 bytes. Against replay it
 * says when it was made (clocks may differ by a minute), and carries the number of its server's start (`boot`) and a
 * counter, which only goes up: of one start no older datagram is taken, of an earlier start none.
 */
import { createHmac, timingSafeEqual } from 'node:crypto';
import { createSocket, type Socket } from 'node:dgram';
import { isIPv4 } from 'node:net';
import { z } from 'zod';
import { isLoopback } from '../control/address.js';
import { loadSecret } from '../control/secret.js';
import { MemferryError } from '../errors.js';
import {
  type ConnectionOptions,
  connectionShape,
  milliseconds,
  parse,
  type Same,
} from '../options/fields.js';
import { defaultAnnounceGroup, parseGroup } from '../options.js';
import { untilAborted } from '../protocol/bounded.js';
import { type Announcement, announcementSchema } from '../protocol/stage-messages.js';

/** Fits an Ethernet frame with room to spare: fragments would be lost together. */
export const maxDatagramBytes = 1200;
const macBytes = 32;
/** How old a datagram may be, and how far ahead the sender's clock. */
export const windowMs = 60_000;
/** Servers that one listener keeps in mind; more than a migration can use. */
const maxServersHeard = 1024;

const datagramSchema = announcementSchema.extend({
  version: z.literal(1),
  /** Of this start of the server: the time of it in ms, then something random, both in hex. */
  boot: z.string().regex(/^[0-9a-f]{12}-[0-9a-f]{16}$/),
  counter: z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER),
  atMs: z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER),
  /** Where it listens; null: at the address that the datagram comes from. */
  host: z.string().min(1).max(255).nullable(),
  port: z.number().int().min(1).max(65535),
});
export type AnnouncementDatagram = z.infer<typeof datagramSchema>;

/** A server as heard: where it can be reached, and what it said of itself. */
export interface HeardServer extends Announcement {
  /** Its address: what it listens on, or where it was heard from. */
  readonly host: string;
  /** TCP. */
  readonly port: number;
}

export function encodeAnnouncement(secret: Uint8Array, datagram: AnnouncementDatagram): Buffer {
  const json = Buffer.from(JSON.stringify(datagram), 'utf8');
  return Buffer.concat([macOf(secret, json), json]);
}

/** What a datagram says; null for anything that is not authentic, in the window and well-formed. */
export function decodeAnnouncement(
  secret: Uint8Array,
  bytes: Uint8Array,
  nowMs: number,
): AnnouncementDatagram | null {
  if (bytes.length <= macBytes || bytes.length > maxDatagramBytes) return null;
  const json = Buffer.from(bytes.subarray(macBytes));
  if (!timingSafeEqual(bytes.subarray(0, macBytes), macOf(secret, json))) return null;
  let value: unknown;
  try {
    value = JSON.parse(json.toString('utf8'));
  } catch {
    return null;
  }
  const parsed = datagramSchema.safeParse(value);
  if (!parsed.success || Math.abs(nowMs - parsed.data.atMs) > windowMs) return null;
  return parsed.data;
}

/** Who was heard, each newer than before. Bounded; nothing in it is older than the window. */
export class HeardServers {
  readonly #heard = new Map<string, { datagram: AnnouncementDatagram; server: HeardServer }>();

  constructor(private readonly secret: Uint8Array) {}

  /** False for what was not taken. */
  take(bytes: Uint8Array, from: string, nowMs: number): boolean {
    const datagram = decodeAnnouncement(this.secret, bytes, nowMs);
    if (!datagram) return false;
    const { version: _version, boot: _boot, counter: _counter, atMs: _atMs, ...said } = datagram;
    const server = { ...said, host: said.host ?? from };
    const key = `${server.host} ${server.port}`;
    const before = this.#heard.get(key)?.datagram;
    // The boot's first part is its time: an earlier start's datagrams are old, whatever their counters say.
    if (before && datagram.boot < before.boot) return false;
    if (before && datagram.boot === before.boot && datagram.counter <= before.counter) return false;
    if (!before && this.#heard.size >= maxServersHeard) {
      this.servers(nowMs);
      if (this.#heard.size >= maxServersHeard) return false;
    }
    this.#heard.set(key, { datagram, server });
    return true;
  }

  /** In order of host and port; those that have said nothing for the window are forgotten. */
  servers(nowMs: number): HeardServer[] {
    for (const [key, { datagram }] of this.#heard) {
      if (Math.abs(nowMs - datagram.atMs) > windowMs) this.#heard.delete(key);
    }
    return [...this.#heard].sort(([a], [b]) => (a < b ? -1 : 1)).map(([, { server }]) => server);
  }
}

export interface AnnouncerConfig {
  group: { host: string; port: number };
  secret: Uint8Array;
  /** 16 random hex digits. */
  boot: string;
  /** Where the server listens. */
  host: string;
  port: number;
}

/** The sending side, owned by a server. Failing to announce is no failure of the server: it can be named. */
export class Announcer {
  readonly #socket: Socket;
  readonly #boot: string;
  #counter = 0;
  #ready = false;
  #last: Announcement | null = null;
  #closed = false;

  constructor(private readonly config: AnnouncerConfig) {
    this.#boot = `${Date.now().toString(16).padStart(12, '0')}-${config.boot}`;
    this.#socket = createSocket({ type: 'udp4', reuseAddr: true });
    this.#socket.unref();
    this.#socket.on('error', () => {});
    const from = interfaceOf(config.host);
    this.#socket.bind({ address: from ?? '0.0.0.0', port: 0 }, () => {
      try {
        this.#socket.setMulticastTTL(1);
        this.#socket.setMulticastLoopback(true);
        if (from) this.#socket.setMulticastInterface(from);
        this.#ready = true;
      } catch {
        return;
      }
      if (this.#last) this.announce(this.#last);
    });
  }

  announce(announcement: Announcement): void {
    this.#last = announcement;
    if (!this.#ready || this.#closed) return;
    const { group, secret, host, port } = this.config;
    const everywhere = host === '0.0.0.0' || host === '::';
    const bytes = encodeAnnouncement(secret, {
      ...announcement,
      version: 1,
      boot: this.#boot,
      counter: this.#counter++,
      atMs: Date.now(),
      host: everywhere ? null : host,
      port,
    });
    if (bytes.length > maxDatagramBytes) return;
    // No route for multicast, a full buffer: the next one is a second away.
    this.#socket.send(bytes, group.port, group.host, () => {});
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#socket.close();
  }
}

/** What `discover` may be told; `secret` or `secretFile` as for `migrate`. */
export interface DiscoverOptions extends Pick<ConnectionOptions, 'secret' | 'secretFile'> {
  /** `group:port` of the announcements. Default `239.255.77.77:7077`. */
  group?: string;
  /** How long to listen, in ms, above 0 and up to a day: servers announce themselves each second. Default 2500. */
  timeoutMs?: number;
  /** The IPv4 address of the interface to listen on; default: loopback, and the one that the system chooses. */
  interface?: string;
  /** Aborting it rejects with CANCELLED. */
  signal?: AbortSignal;
}

const discoverSchema = z.strictObject({
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  group: z.string().default(defaultAnnounceGroup),
  timeoutMs: milliseconds.max(24 * 3600 * 1000).default(2500),
  interface: z.ipv4().optional(),
  signal: z.instanceof(AbortSignal).optional(),
});
true satisfies Same<z.input<typeof discoverSchema>, DiscoverOptions>;

/**
 * The servers that are heard within `timeoutMs`. Hints only: they may be gone, or full, when they are asked.
 * @throws INVALID_ARGUMENT, AUTH_FAILED (secret file), SYSTEM (the port cannot be bound), CANCELLED
 */
export async function discover(given: DiscoverOptions = {}): Promise<HeardServer[]> {
  const options = parse(discoverSchema, given, 'discover');
  const { timeoutMs, signal = new AbortController().signal } = options;
  const group = parseGroup(options.group);
  // On loopback the automatic secret will do; elsewhere nobody else has it, and nobody is heard.
  const secret = await loadSecret(options, { loopback: true });
  const heard = new HeardServers(secret);
  const socket = createSocket({ type: 'udp4', reuseAddr: true });
  let timer: NodeJS.Timeout | undefined;
  try {
    const over = new Promise<void>((resolve, reject) => {
      socket.on('error', (cause) =>
        reject(
          new MemferryError('SYSTEM', `announcements cannot be heard: ${cause.message}`, {
            cause,
            facts: { group: group.host, port: group.port },
          }),
        ),
      );
      socket.on('message', (bytes, { address }) => heard.take(bytes, address, Date.now()));
      socket.bind({ port: group.port, address: group.host }, () => {
        const interfaces = options.interface === undefined ? ['127.0.0.1', undefined] : [options.interface];
        const joined = interfaces.map((address) => join(socket, group.host, address));
        if (!joined.includes(true)) {
          reject(
            new MemferryError('SYSTEM', `the multicast group ${group.host} cannot be joined`, {
              facts: { group: group.host, interface: options.interface ?? null },
            }),
          );
        }
        timer = setTimeout(resolve, timeoutMs);
      });
    });
    await untilAborted(over, signal);
  } finally {
    clearTimeout(timer);
    socket.close();
  }
  return heard.servers(Date.now());
}

function join(socket: Socket, group: string, address: string | undefined): boolean {
  try {
    socket.addMembership(group, address);
    return true;
  } catch {
    return false;
  }
}

/** Loopback stays on loopback; a server that listens on one address announces itself there. */
function interfaceOf(host: string): string | null {
  if (isLoopback(host)) return '127.0.0.1';
  return isIPv4(host) && host !== '0.0.0.0' ? host : null;
}

function macOf(secret: Uint8Array, json: Uint8Array): Buffer {
  const key = createHmac('sha256', secret).update('memferry announce').digest();
  return createHmac('sha256', key).update(json).digest();
}
