/**
 * Every error that memferry throws or rejects with: one hierarchy, stable codes, the facts as data and the
 * `cause` kept. Errors of the addon and of its engines become these in one place, `fromNative`.
 */

/** A run of pages that an error is about; `region` is its index in the migration's region table. */
export interface PageRunFact {
  /** Its index in the order of the regions. */
  region: number;
  /** The first page, counted from the beginning of the region. */
  first: number;
  /** How many pages. */
  count: number;
}

/** Each code with what it means. The codes are stable; messages are for people and may change. */
const MEANING = {
  /** memferry runs on Linux (x86-64, arm64) only; the package installs and imports elsewhere. */
  UNSUPPORTED_PLATFORM: 'platform',
  /** The native addon is not built, or does not load; the message says how to build it. */
  ADDON_MISSING: 'platform',
  /** No dirty tracker (or not the one asked for) works on this kernel with these permissions. */
  TRACKER_UNAVAILABLE: 'platform',
  /** No userfaultfd, or one without a feature that the mode needs; the message says how to grant it. */
  USERFAULTFD_UNAVAILABLE: 'platform',

  /** The buffer does not start at a page boundary; the message says how to get one that does. */
  REGION_UNALIGNED: 'region',
  /** This handle of the region was closed. */
  REGION_CLOSED: 'region',
  /** The region is moving already: one migration at a time, and no close while it lasts. */
  REGION_BUSY: 'region',
  /** The region's memory went away: the thread that owned it ended, or closed it. */
  REGION_GONE: 'region',
  /** The process that owns the region's memory ended, or runs another program. */
  OWNER_GONE: 'region',

  /** The system has no memory (or address space) for what was asked. */
  NO_MEMORY: 'system',
  /** A system call failed; `errno` and `syscall` say which and how. */
  SYSTEM: 'system',

  /** The guest cannot pause now; `names` lists what is open (timers, sockets, requests, unsent replies). */
  GUEST_BUSY: 'guest',
  /** The guest holds something that cannot move at all; `names` lists it. */
  GUEST_UNMOVABLE: 'guest',
  /** `pause` threw; the guest runs on. */
  PAUSE_FAILED: 'guest',
  /** `pause` did not settle in time; the guest runs on. */
  PAUSE_TIMEOUT: 'guest',
  /** `prepare` threw at the destination; the guest runs on at the source. */
  PREPARE_FAILED: 'guest',
  /** `prepare` did not settle in time; the guest runs on at the source. */
  PREPARE_TIMEOUT: 'guest',
  /** The guest was granted to this side, and whoever runs it does not let it run: it stands here, and nowhere else. */
  RESUME_FAILED: 'guest',
  /** QEMU answered a QMP command with an error; `facts` has the command and the error's class. */
  QEMU_REFUSED: 'guest',
  /** The destination is not willing to run the module: not on its list, or another SHA-256. */
  MODULE_REFUSED: 'guest',

  /** The peer did not prove that it knows the shared secret. */
  AUTH_FAILED: 'channel',
  /** An address other than loopback needs plain text to be allowed explicitly. */
  PLAINTEXT_REQUIRED: 'channel',
  /** The peer said something that the protocol does not allow. */
  PROTOCOL_ERROR: 'channel',
  /** The peer speaks another version of the protocol. */
  VERSION_MISMATCH: 'channel',
  /** No connection to the peer could be made in time. */
  CONNECT_FAILED: 'channel',
  /** A connection was cut where it cannot be taken up again. */
  CHANNEL_LOST: 'channel',
  /** The peer is gone: its process ended, or it did not answer in time. */
  PEER_LOST: 'channel',
  /** A bound was exceeded (sizes, counts, connections); `facts` has the bound. */
  LIMIT_EXCEEDED: 'channel',

  /** Cancelled by the caller before the commit; the guest runs on at the source. */
  CANCELLED: 'migration',
  /** Pre-copy did not converge and the caller asked to fail then; the guest runs on at the source. */
  NOT_CONVERGED: 'migration',
  /** GRANT was sent and never answered: the destination may be running the guest, so the source never does. */
  MIGRATION_IN_DOUBT: 'migration',
  /** The digests of source and destination differ. */
  VERIFICATION_FAILED: 'migration',

  /** The guest was lost after the commit; `pages` says how many pages never arrived. */
  GUEST_LOST: 'loss',
  /** Pages cannot be had any more; `runs` has them. They are poisoned after this was reported. */
  PAGES_LOST: 'loss',

  /** The VMD's servers together, or one of them, have no room (memory, images); `facts` has the numbers. */
  VMD_CAPACITY: 'vmd',
  /** A VMD server no longer knows the image: it was dropped there, or the server was restarted. */
  VMD_LOST: 'vmd',
  /** A VMD server refused, and would again: somebody else has the claim, or it is not the time; `reason` says which. */
  VMD_REFUSED: 'vmd',

  /** A worker guest is leaving or has left this host, and the request was not begun. */
  GUEST_MOVED: 'moved',
  /** What a worker guest's `handle` threw; the guest runs on. */
  GUEST_REQUEST_FAILED: 'request',

  /** A call was made with arguments that make no sense; nothing happened. */
  INVALID_ARGUMENT: 'argument',
} as const;

/** The code of an error. Stable; the README says what each means. */
export type ErrorCode = keyof typeof MEANING;
type CodeOf<Kind extends string> = {
  [Code in ErrorCode]: (typeof MEANING)[Code] extends Kind ? Code : never;
}[ErrorCode];

/** Every code. */
export const ERROR_CODES: readonly ErrorCode[] = Object.freeze(Object.keys(MEANING) as ErrorCode[]);

/** For codes that come from a peer or from a log. */
export function isErrorCode(value: unknown): value is ErrorCode {
  return typeof value === 'string' && Object.hasOwn(MEANING, value);
}

/** What an error knows, as plain data; which facts there are depends on the code. */
export type ErrorFacts = Readonly<Record<string, unknown>>;

/** What an error is made with beside code and message. */
export interface ErrorOptionsWithFacts {
  /** What led to it. */
  cause?: unknown;
  /** Default none. */
  facts?: ErrorFacts;
}

/**
 * The base of all. `facts` holds plain data: what was expected, what was found, addresses, bounds.
 * `new MemferryError(code, ...)` gives an instance of the class that the code belongs to.
 */
export class MemferryError extends Error {
  /** Says what happened; stable, while messages may change. */
  readonly code: ErrorCode;
  /** Never null; empty where nothing is known. */
  readonly facts: ErrorFacts;

  /** Gives an instance of the code's own class. */
  constructor(code: ErrorCode, message: string, options: ErrorOptionsWithFacts = {}) {
    if (!isErrorCode(code)) {
      throw memferryError('INVALID_ARGUMENT', `there is no code '${String(code)}' (of an error: ${message})`);
    }
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    this.facts = options.facts ?? {};
    this.name = new.target.name;
    // biome-ignore lint/correctness/noConstructorReturn: a code has one class, however its error is made
    if (new.target === MemferryError) return memferryError(code, message, options);
  }

  /** For reports and the command line: plain data, the chain of causes as text. */
  toJSON(): { name: string; code: ErrorCode; message: string; facts: ErrorFacts; cause: string | null } {
    const cause = this.cause;
    return {
      name: this.name,
      code: this.code,
      message: this.message,
      facts: this.facts,
      cause: cause === undefined ? null : cause instanceof Error ? cause.message : String(cause),
    };
  }
}

/** The machine, its kernel or its permissions do not allow it. */
export class PlatformError extends MemferryError {
  declare readonly code: CodeOf<'platform'>;
}

/** About a region's memory or its handles. */
export class RegionError extends MemferryError {
  declare readonly code: CodeOf<'region'>;
}

/** A system call failed. */
export class SystemCallError extends MemferryError {
  declare readonly code: CodeOf<'system'>;
  /** The kernel's number, null where none was known. */
  get errno(): number | null {
    return numberFact(this.facts, 'errno');
  }
  /** The operation as memferry names it: `mmap`, `UFFDIO_COPY`, ... */
  get syscall(): string | null {
    const value = this.facts['syscall'];
    return typeof value === 'string' ? value : null;
  }
}

/** The guest could not pause, be prepared, or move at all. */
export class GuestError extends MemferryError {
  declare readonly code: CodeOf<'guest'>;
  /** What is in the way, by name; empty where the code has no names. */
  get names(): readonly string[] {
    const value = this.facts['names'];
    return Array.isArray(value) ? value.map(String) : [];
  }
}

/** The peer, or the way to it. */
export class ChannelError extends MemferryError {
  declare readonly code: CodeOf<'channel'>;
}

/** The migration as a whole. */
export class MigrationError extends MemferryError {
  declare readonly code: CodeOf<'migration' | 'loss'>;
}

/** Something is lost for good. */
export class LossError extends MigrationError {
  declare readonly code: CodeOf<'loss'>;
  /** How many pages. */
  get pages(): number {
    return numberFact(this.facts, 'pages') ?? this.runs.reduce((sum, run) => sum + run.count, 0);
  }
  /** Which pages, where that is known. */
  get runs(): readonly PageRunFact[] {
    const value = this.facts['runs'];
    return Array.isArray(value) ? (value as PageRunFact[]) : [];
  }
}

/** About the VMD (the memory of `memferry stage` processes), or one of its servers. */
export class StagingError extends MemferryError {
  declare readonly code: CodeOf<'vmd'>;
  /** The server that said so; null where it is about all of them. */
  get server(): string | null {
    const value = this.facts['server'];
    return typeof value === 'string' ? value : null;
  }
  /** Which rule a refusal goes back to, as `claimed`, `resumed` or `stale`; null where there is none. */
  get reason(): string | null {
    const value = this.facts['reason'];
    return typeof value === 'string' ? value : null;
  }
}

/**
 * The guest is leaving or has left this host, and the request was not begun: whoever asked may ask again at
 * the destination.
 */
export class GuestMovedError extends MemferryError {
  declare readonly code: CodeOf<'moved'>;
}

/** What a guest's `handle` threw: the guest runs on. `message` is that of the error, and so is the `stack`. */
export class GuestRequestError extends MemferryError {
  declare readonly code: CodeOf<'request'>;
  /** That error's `name`. */
  get guestErrorName(): string {
    const value = this.facts['guestErrorName'];
    return typeof value === 'string' ? value : 'Error';
  }
  /** That error's `code`, where it has one. */
  get guestErrorCode(): string | null {
    const value = this.facts['guestErrorCode'];
    return typeof value === 'string' ? value : null;
  }
}

/** A caller's mistake. */
export class ArgumentError extends MemferryError {
  declare readonly code: CodeOf<'argument'>;
}

const CLASSES = {
  platform: PlatformError,
  region: RegionError,
  system: SystemCallError,
  guest: GuestError,
  channel: ChannelError,
  migration: MigrationError,
  loss: LossError,
  vmd: StagingError,
  moved: GuestMovedError,
  request: GuestRequestError,
  argument: ArgumentError,
} as const;

/** Makes the error of the class that its code belongs to, with that type. */
export function memferryError<Code extends ErrorCode>(
  code: Code,
  message: string,
  options: ErrorOptionsWithFacts = {},
): InstanceType<(typeof CLASSES)[(typeof MEANING)[Code]]> {
  const Class = CLASSES[MEANING[code]];
  return new Class(code, message, options) as InstanceType<(typeof CLASSES)[(typeof MEANING)[Code]]>;
}

/**
 * What the addon's exceptions and its engines' `failed` events call things, and what that is here. Codes that
 * are codes here already need no line.
 */
const NATIVE_CODES: Readonly<Record<string, ErrorCode>> = {
  UNALIGNED: 'REGION_UNALIGNED',
  PROTOCOL: 'PROTOCOL_ERROR',
  REFUSED: 'AUTH_FAILED',
  CHECKSUM: 'PROTOCOL_ERROR',
  RECOVERY_TIMEOUT: 'PEER_LOST',
  UNREADABLE: 'PAGES_LOST',
  ENOMEM: 'NO_MEMORY',
};

/** The names by which the kernel says that there is no memory. */
const NO_MEMORY_ERRNO = 12;

/**
 * An exception of the addon, or the `{ code, message }` of an engine's `failed` event, as a MemferryError.
 * MemferryErrors pass unchanged; a TypeError or RangeError of the addon is INVALID_ARGUMENT.
 */
export function fromNative(error: unknown): MemferryError {
  if (error instanceof MemferryError) return error;
  const { code, message, errno, syscall } = Object(error) as {
    code?: unknown;
    message?: unknown;
    errno?: unknown;
    syscall?: unknown;
  };
  const text = typeof message === 'string' ? message : String(error);
  const cause = error instanceof Error ? error : undefined;
  const facts: Record<string, unknown> = {};
  // Node's own are negative.
  if (typeof errno === 'number') facts['errno'] = Math.abs(errno);
  if (typeof syscall === 'string') facts['syscall'] = syscall;
  if (typeof code === 'string') facts['nativeCode'] = code;
  if (facts['errno'] === NO_MEMORY_ERRNO) return memferryError('NO_MEMORY', text, { cause, facts });
  if (typeof syscall === 'string' && syscall.startsWith('userfaultfd')) {
    const remedy =
      'run as root or with CAP_SYS_PTRACE, or grant /dev/userfaultfd; "memferry doctor" says more';
    return memferryError('USERFAULTFD_UNAVAILABLE', `${text}: ${remedy}`, { cause, facts });
  }
  if (isErrorCode(code)) return memferryError(code, text, { cause, facts });
  const mapped = typeof code === 'string' ? NATIVE_CODES[code] : undefined;
  if (mapped !== undefined) return memferryError(mapped, text, { cause, facts });
  // Node-API's own complaints about arguments (a wrong type, a missing property) carry no code of ours.
  if (error instanceof TypeError || error instanceof RangeError) {
    return memferryError('INVALID_ARGUMENT', text, { cause, facts });
  }
  return memferryError('SYSTEM', text, { cause, facts });
}

/** The error that an engine's `failed` event reports. */
export function fromNativeEvent(event: { code: string; message: string }): MemferryError {
  return fromNative({ code: event.code, message: event.message });
}

/** Runs a call into the addon; what it throws comes out as a MemferryError. */
export function native<T>(call: () => T): T {
  try {
    return call();
  } catch (error) {
    throw fromNative(error);
  }
}

/** The same for calls that give a promise. */
export async function nativeAsync<T>(call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (error) {
    throw fromNative(error);
  }
}

function numberFact(facts: ErrorFacts, name: string): number | null {
  const value = facts[name];
  return typeof value === 'number' ? value : null;
}
