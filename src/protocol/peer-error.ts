/** Errors on their way over the control connection: a code, a text and names, never more. */
import { isErrorCode, MemferryError } from '../errors.js';

/** What a peer says went wrong there. An unknown code becomes PEER_LOST with the code in the facts. */
export function fromPeer(code: string, message: string, names: readonly string[] = []): MemferryError {
  return new MemferryError(isErrorCode(code) ? code : 'PEER_LOST', message, {
    facts: { ...(names.length > 0 ? { names } : {}), fromPeer: true, ...(isErrorCode(code) ? {} : { code }) },
  });
}

/** Any thrown value as what may be told a peer: our own codes as they are, the rest under `otherwise`. */
export function toPeer(
  error: unknown,
  otherwise: string,
): { code: string; message: string; names: string[] } {
  const names = error instanceof MemferryError ? error.facts['names'] : undefined;
  return {
    code: error instanceof MemferryError ? error.code : otherwise,
    message: String(error instanceof Error ? error.message : error).slice(0, 4096),
    names: Array.isArray(names) ? names.slice(0, 256).map((name) => String(name).slice(0, 256)) : [],
  };
}
