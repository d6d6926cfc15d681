/**
 * What the demo's client and its hosts say to each other: one JSON object a line. A host answers every request
 * once, in any order; `elsewhere` means that the guest is not here and nothing was done.
 */
import type { Socket } from 'node:net';

export interface LineRequest {
  number: number;
  request: unknown;
}

export type LineReply =
  | { number: number; value: unknown }
  | { number: number; elsewhere: true }
  | { number: number; error: { code: string; message: string } };

/** A peer that sends more than this without a line's end is cut off. */
const MAX_LINE_CHARACTERS = 16 * 2 ** 20;

export function sendLine(socket: Socket, message: LineRequest | LineReply): void {
  if (socket.writable) socket.write(`${JSON.stringify(message)}\n`);
}

/** Calls `onMessage` for each line; one that is not JSON, or too long, destroys the socket. */
export function receiveLines(socket: Socket, onMessage: (message: unknown) => void): void {
  let rest = '';
  socket.setEncoding('utf8');
  socket.on('data', (text: string) => {
    const lines = (rest + text).split('\n');
    rest = lines.pop() ?? '';
    if (rest.length > MAX_LINE_CHARACTERS) {
      socket.destroy(new Error('a line without an end'));
      return;
    }
    for (const line of lines) {
      let message: unknown;
      try {
        message = JSON.parse(line);
      } catch (error) {
        socket.destroy(error as Error);
        return;
      }
      onMessage(message);
    }
  });
}
