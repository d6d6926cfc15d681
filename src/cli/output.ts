/**
 * How every command speaks: figures for people on a terminal, one JSON object a line elsewhere or when asked
 * to; errors as one line on standard error. What a command says on the way goes to standard error too, unless
 * it is JSON.
 */
import { CommanderError } from 'commander';
import { isErrorCode } from '../errors.js';

export interface Output {
  readonly json: boolean;
  /** A step, for people. */
  say(text: string): void;
  /** A line of JSON; nothing for people. */
  line(value: object): void;
  /** The result: text for people, the same as the last line of JSON. */
  result(text: string, value: object): void;
}

/**
 * Names and messages come from peers: nothing of them may move a terminal's cursor or colour it. Line breaks and tabs stay.
 */
export function printable(text: string): string {
  return text.replace(/[^\t\n\x20-\x7e\u00a0-\uffff]/g, '?');
}

/** To people, on standard error. */
export function complain(text: string): void {
  process.stderr.write(`${printable(text)}\n`);
}

/** People get text wherever they look at it: on a terminal. */
export function makeOutput(json: boolean | undefined, stdout: NodeJS.WriteStream = process.stdout): Output {
  const asJson = json ?? stdout.isTTY !== true;
  return {
    json: asJson,
    say: (text) => {
      if (!asJson) complain(text);
    },
    line: (value) => {
      if (asJson) stdout.write(`${JSON.stringify(value)}\n`);
    },
    result: (text, value) => {
      stdout.write(asJson ? `${JSON.stringify(value)}\n` : `${printable(text)}\n`);
    },
  };
}

/** A reader that ends (`| head -1`) must not end the guests in this process with it: what is said then is lost. */
export function outliveReaders(): void {
  for (const stream of [process.stdout, process.stderr]) stream.on('error', () => {});
}

/** What the shell gets. */
export const exitCodes = {
  failed: 1,
  usage: 2,
  /** The machine or its permissions do not allow it. */
  unsupported: 3,
  /** The guest may be running elsewhere, or is lost: not something to try again blindly. */
  inDoubt: 4,
  interrupted: 130,
} as const;

const codesWithTheirOwnExit: Record<string, number> = {
  INVALID_ARGUMENT: exitCodes.usage,
  UNSUPPORTED_PLATFORM: exitCodes.unsupported,
  ADDON_MISSING: exitCodes.unsupported,
  TRACKER_UNAVAILABLE: exitCodes.unsupported,
  USERFAULTFD_UNAVAILABLE: exitCodes.unsupported,
  MIGRATION_IN_DOUBT: exitCodes.inDoubt,
  GUEST_LOST: exitCodes.inDoubt,
  RESUME_FAILED: exitCodes.inDoubt,
  PAGES_LOST: exitCodes.inDoubt,
  CANCELLED: exitCodes.interrupted,
};

/** `memferry: CODE: message`, and the exit code. */
export function describeError(error: unknown, debug: boolean): { text: string; exitCode: number } {
  // commander has said what was wrong, or printed the help that was asked for.
  if (error instanceof CommanderError) {
    return { text: '', exitCode: error.exitCode === 0 ? 0 : exitCodes.usage };
  }
  const { code, message, stack, cause, facts } = Object(error) as {
    code?: unknown;
    message?: unknown;
    stack?: unknown;
    cause?: unknown;
    facts?: { fromPeer?: unknown };
  };
  const name = typeof code === 'string' ? code : 'ERROR';
  const firstLine = String(typeof message === 'string' ? message : error).replace(/\s*\n\s*/g, ' ');
  // Node's own begin with it.
  const text = firstLine.startsWith(`${name}: `) ? firstLine : `${name}: ${firstLine}`;
  const lines = [`memferry: ${text}`];
  if (debug && typeof stack === 'string') lines.push(stack);
  if (debug && cause instanceof Error) lines.push(`caused by: ${cause.stack ?? cause.message}`);
  // That the other side was interrupted is no reason to say so of this one.
  const theirs = name === 'CANCELLED' && facts?.fromPeer === true;
  const known = !theirs && (isErrorCode(name) || name in codesWithTheirOwnExit);
  const exitCode = known ? codesWithTheirOwnExit[name] : undefined;
  return { text: `${printable(lines.join('\n'))}\n`, exitCode: exitCode ?? exitCodes.failed };
}

/** What commander says of a wrong command line, in our form. */
export function describeUsageError(text: string): string {
  const said = text
    .replace(/^error: /, '')
    .replace(/\s*\n\s*/g, ' ')
    .trim();
  return `memferry: INVALID_ARGUMENT: ${said}\n`;
}

export function reportError(error: unknown, debug: boolean): number {
  const { text, exitCode } = describeError(error, debug);
  process.stderr.write(text);
  return exitCode;
}
