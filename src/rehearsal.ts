/**
 * A switchover played through once, in this process and with nothing behind it, while nobody waits. V8 compiles
 * a function when it is first called, and a schema builds its checker when it first checks; left to the real
 * switchover, that is most of the time in which a guest stands still. No effect but on time.
 */
import { FrameKind, FrameOpener, FrameSealer } from './control/frame.js';
import { untilAborted, within } from './protocol/bounded.js';
import { initialDestination, stepDestination } from './protocol/commit-destination.js';
import {
  type DestinationMessage,
  destinationMessage,
  type SourceMessage,
  sourceMessage,
} from './protocol/messages.js';
import type { Guest } from './guest.js';
import { CommitDriver } from './source/commit-driver.js';

/** Compiled after the first, cheaper after a few. */
const repeats = 4;

const fromSource: SourceMessage[] = [
  { type: 'grow', region: 0, lengthBytes: 0 },
  { type: 'state', paging: true },
  { type: 'prepare', epoch: 0 },
  { type: 'grant', epoch: 0 },
  { type: 'evicted', digests: ['0'.repeat(32)] },
  { type: 'goodbye' },
];

const fromDestination: DestinationMessage[] = [
  { type: 'grown', region: 0 },
  { type: 'prepared', prepareMs: 0.5 },
  { type: 'ready', epoch: 0 },
  { type: 'resumed', epoch: 0 },
  { type: 'complete' },
  {
    type: 'summary',
    remoteFaults: { count: 0, p50Us: 0.5, p99Us: 0.5, maxUs: 0.5 },
    extraMemoryBytes: 0,
    mismatched: [],
  },
];

let rehearsed = false;

/** Both sides' parts: a process is seldom only one of them. A second call does nothing. */
export function rehearseSwitchover(): void {
  if (rehearsed) return;
  rehearsed = true;
  for (let i = 0; i < repeats; i++) {
    const key = new Uint8Array(32);
    const sealer = new FrameSealer(key);
    const opener = new FrameOpener(key);
    for (const [messages, schema] of [
      [fromSource, sourceMessage],
      [fromDestination, destinationMessage],
    ] as const) {
      for (const message of messages) {
        const [header, ...body] = sealer.seal(FrameKind.Json, Buffer.from(JSON.stringify(message)));
        const payload = opener.open(Buffer.from(header as Uint8Array), Buffer.concat(body));
        schema.parse(JSON.parse(payload.toString('utf8')));
      }
    }
    let destination = initialDestination();
    for (const message of fromSource) {
      if (message.type !== 'prepare' && message.type !== 'grant') continue;
      destination = stepDestination(destination, { type: 'message', message }).state;
      if (message.type === 'prepare') destination = stepDestination(destination, { type: 'prepared' }).state;
    }
    void commit();
  }
}

const minuteMs = 60_000;

/** The source's commit of a guest that is nothing, to a destination that says yes. */
async function commit(): Promise<void> {
  const guest: Guest = {
    name: '',
    module: null,
    regions: [],
    pause: async () => new Uint8Array(0),
    unpause() {},
  };
  const driver = new CommitDriver(guest, {
    timeoutsMs: { pause: minuteMs, ready: minuteMs, doubt: minuteMs, retry: minuteMs },
    send({ type, epoch }) {
      if (type === 'prepare') driver.message({ type: 'ready', epoch });
      if (type === 'grant') driver.message({ type: 'resumed', epoch });
    },
    redial: () => Promise.reject(new Error('nobody is there')),
  });
  const never = new AbortController().signal;
  await within(untilAborted(driver.pause(), never), minuteMs, 'PAUSE_TIMEOUT', '');
  driver.transferred();
  await driver.settled;
}
