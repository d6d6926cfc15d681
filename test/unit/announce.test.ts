/** Announcements: authentic, fresh, bounded; heard over multicast on loopback where this host has it. */
import { createHmac } from 'node:crypto';
import { afterEach, describe, expect, it } from 'vitest';
import {
  type AnnouncementDatagram,
  Announcer,
  decodeAnnouncement,
  discover,
  encodeAnnouncement,
  HeardServers,
  maxDatagramBytes,
  windowMs,
} from '../../src/staging/announce.js';

const secret = Buffer.from('the secret of a whole VMD');
const nowMs = 1_764_000_000_000;
const datagram: AnnouncementDatagram = {
  version: 1,
  boot: `${nowMs.toString(16).padStart(12, '0')}-0123456789abcdef`,
  counter: 5,
  atMs: nowMs,
  host: '10.0.0.7',
  port: 7000,
  name: 'a',
  identity: '00112233aabbccdd',
  rack: 'r1',
  memoryBytes: 2 ** 30,
  freeBytes: 2 ** 29,
  bandwidth: 0,
  images: 1,
};
const bytes = (more: Partial<AnnouncementDatagram> = {}, key: Uint8Array = secret) =>
  encodeAnnouncement(key, { ...datagram, ...more });

describe('an announcement', () => {
  it('is what its server has said', () => {
    expect(decodeAnnouncement(secret, bytes(), nowMs)).toEqual(datagram);
    expect(bytes().length).toBeLessThan(maxDatagramBytes);
  });

  it('is nothing from anybody without the secret, or altered', () => {
    expect(decodeAnnouncement(Buffer.from('another secret, long enough'), bytes(), nowMs)).toBeNull();
    const good = bytes();
    for (let at = 0; at < good.length; at++) {
      const bad = Buffer.from(good);
      bad[at] = (bad[at] as number) ^ 1;
      expect(decodeAnnouncement(secret, bad, nowMs)).toBeNull();
      expect(decodeAnnouncement(secret, good.subarray(0, at), nowMs)).toBeNull();
    }
    // The shared secret itself is no key here: what is signed for another purpose is no announcement.
    const json = Buffer.from(JSON.stringify(datagram));
    const signed = Buffer.concat([createHmac('sha256', secret).update(json).digest(), json]);
    expect(decodeAnnouncement(secret, signed, nowMs)).toBeNull();
  });

  it('is nothing when it is authentic and makes no sense', () => {
    const sign = (json: Buffer) => {
      const key = createHmac('sha256', secret).update('memferry announce').digest();
      return Buffer.concat([createHmac('sha256', key).update(json).digest(), json]);
    };
    expect(decodeAnnouncement(secret, sign(Buffer.from(JSON.stringify(datagram))), nowMs)).toEqual(datagram);
    const wrong: unknown[] = [
      null,
      [],
      { ...datagram, more: 1 },
      { ...datagram, version: 2 },
      { ...datagram, port: 0 },
      { ...datagram, freeBytes: -1 },
      { ...datagram, name: 'x'.repeat(65) },
      { ...datagram, boot: 'x' },
    ];
    for (const value of wrong) {
      expect(decodeAnnouncement(secret, sign(Buffer.from(JSON.stringify(value))), nowMs)).toBeNull();
    }
    expect(decodeAnnouncement(secret, sign(Buffer.from('{')), nowMs)).toBeNull();
    const long = { ...datagram, host: 'x'.repeat(255), rack: '\u0001'.repeat(64), name: '\u0001'.repeat(64) };
    const padded = Buffer.concat([Buffer.from(JSON.stringify(long)), Buffer.alloc(1200, 0x20)]);
    expect(decodeAnnouncement(secret, sign(padded), nowMs)).toBeNull();
  });

  it('is taken from clocks that differ by a minute, not by more', () => {
    for (const skewMs of [-windowMs, windowMs]) {
      expect(decodeAnnouncement(secret, bytes(), nowMs + skewMs)).toEqual(datagram);
      expect(decodeAnnouncement(secret, bytes(), nowMs + skewMs + Math.sign(skewMs))).toBeNull();
    }
  });
});

describe('who was heard', () => {
  it('is known by address, the newest word only', () => {
    const heard = new HeardServers(secret);
    expect(heard.take(bytes(), '10.9.9.9', nowMs)).toBe(true);
    expect(heard.take(bytes(), '10.9.9.9', nowMs)).toBe(false); // a replay
    expect(heard.take(bytes({ counter: 4 }), '10.9.9.9', nowMs)).toBe(false);
    expect(heard.take(bytes({ counter: 6, freeBytes: 1 }), '10.9.9.9', nowMs)).toBe(true);
    expect(heard.servers(nowMs)).toEqual([
      {
        host: '10.0.0.7',
        port: 7000,
        name: 'a',
        identity: '00112233aabbccdd',
        rack: 'r1',
        memoryBytes: 2 ** 30,
        freeBytes: 1,
        bandwidth: 0,
        images: 1,
      },
    ]);
  });

  it('takes a restarted server at its first word, and none of the start before', () => {
    const heard = new HeardServers(secret);
    heard.take(bytes({ counter: 1000 }), '', nowMs);
    const boot = `${(nowMs + 1000).toString(16).padStart(12, '0')}-0000000000000000`;
    expect(heard.take(bytes({ boot, counter: 0, images: 0 }), '', nowMs)).toBe(true);
    expect(heard.take(bytes({ counter: 1001 }), '', nowMs)).toBe(false);
    expect(heard.servers(nowMs)).toMatchObject([{ images: 0 }]);
  });

  it('is where the datagram came from, when the server listens everywhere', () => {
    const heard = new HeardServers(secret);
    heard.take(bytes({ host: null }), '10.9.9.9', nowMs);
    heard.take(bytes({ host: null, port: 7001 }), '10.9.9.9', nowMs);
    expect(heard.servers(nowMs).map(({ host, port }) => `${host}:${port}`)).toEqual([
      '10.9.9.9:7000',
      '10.9.9.9:7001',
    ]);
  });

  it('is forgotten when it says nothing more, and bounded', () => {
    const heard = new HeardServers(secret);
    for (let port = 1; port <= 1024; port++) heard.take(bytes({ port }), '', nowMs);
    expect(heard.take(bytes({ port: 2000 }), '', nowMs)).toBe(false);
    expect(heard.servers(nowMs)).toHaveLength(1024);
    const laterMs = nowMs + windowMs + 1;
    expect(heard.take(bytes({ port: 2000, atMs: laterMs }), '', laterMs)).toBe(true);
    expect(heard.servers(laterMs)).toHaveLength(1);
  });
});

describe('over multicast on loopback', () => {
  const open: Announcer[] = [];
  afterEach(() => {
    for (const one of open.splice(0)) one.close();
  });

  it('servers with the same secret are heard', async () => {
    const group = { host: '239.255.77.77', port: 20_000 + (process.pid % 20_000) };
    const said = { name: 'a', rack: null, memoryBytes: 9, freeBytes: 8, bandwidth: 7, images: 6 };
    const announcement = { ...said, identity: '00112233aabbccdd' };
    const make = (port: number, key: Uint8Array) => {
      const announcer = new Announcer({ group, secret: key, boot: 'ab'.repeat(8), host: '127.0.0.1', port });
      open.push(announcer);
      return announcer;
    };
    // The stranger speaks first: whoever has heard the others has heard it too.
    const announcers = [
      make(7003, Buffer.from('some other secret, not theirs')),
      make(7001, secret),
      make(7002, secret),
    ];
    const ticker = setInterval(() => {
      for (const one of announcers) one.announce(announcement);
    }, 20);
    try {
      const listen = () =>
        discover({
          secret,
          group: `${group.host}:${group.port}`,
          interface: '127.0.0.1',
          timeoutMs: 1000,
        });
      await expect.poll(listen).toEqual([
        { ...announcement, host: '127.0.0.1', port: 7001 },
        { ...announcement, host: '127.0.0.1', port: 7002 },
      ]);
    } finally {
      clearInterval(ticker);
    }
  });

  it('listening ends when its caller says so, and refuses what is no group', async () => {
    const group = `239.255.77.77:${20_001 + (process.pid % 20_000)}`;
    await expect(
      discover({ secret, group, timeoutMs: 10_000, signal: AbortSignal.timeout(50) }),
    ).rejects.toMatchObject({ code: 'CANCELLED' });
    await expect(discover({ secret, group: '10.0.0.1:7' })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    await expect(discover({ secret, group, interface: '203.0.113.7' })).rejects.toMatchObject({
      code: 'SYSTEM',
    });
  });
});
