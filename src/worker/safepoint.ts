/**
 * What a worker must have finished before it may stand still: a timer, socket or file request that is open
 * would be lost with the worker, so any of them refuses the pause, by name. Node counts them.
 */

const NAMES: Record<string, string> = {
  Timeout: 'timer',
  Immediate: 'immediate',
  MessagePort: 'message port',
  TCPSocketWrap: 'TCP socket',
  TCPServerWrap: 'TCP server',
  TCPConnectWrap: 'TCP connection being made',
  PipeWrap: 'pipe',
  PipeServerWrap: 'unix socket server',
  UDPWRAP: 'UDP socket',
  FSReqCallback: 'file request',
  FSReqPromise: 'file request',
  FSEventWrap: 'file watcher',
  StatWatcher: 'file watcher',
  GetAddrInfoReqWrap: 'name lookup',
  ProcessWrap: 'child process',
  SignalWrap: 'signal handler',
  WorkerHandle: 'worker',
  Worker: 'worker',
};

let ownTurns = 0;

/** Waits for another turn of the event loop. What is open then is the guest's alone: such a wait does not count. */
export function afterTurns(turns: number, then: () => void): void {
  if (turns === 0) {
    then();
    return;
  }
  ownTurns++;
  setImmediate(() => {
    ownTurns--;
    afterTurns(turns - 1, then);
  });
}

export class OpenResources {
  readonly #baseline: Map<string, number>;

  /** What is open now is the runtime's own, unless it is said what is. */
  constructor(baseline = count()) {
    this.#baseline = baseline;
  }

  /** What was opened since, by name, e.g. `2 timers`. */
  names(): string[] {
    const found: string[] = [];
    for (const [kind, open] of count()) {
      const more = open - (this.#baseline.get(kind) ?? 0);
      const name = NAMES[kind] ?? kind;
      if (more > 0) found.push(more === 1 ? name : `${more} ${name}s`);
    }
    return found;
  }
}

function count(): Map<string, number> {
  const counts = new Map<string, number>();
  for (const kind of process.getActiveResourcesInfo()) {
    // A timer that fired or a handle that is closing needs the event loop once more, not the guest.
    if (kind !== 'CloseReq') counts.set(kind, (counts.get(kind) ?? 0) + 1);
  }
  counts.set('Immediate', (counts.get('Immediate') ?? 0) - ownTurns);
  return counts;
}
