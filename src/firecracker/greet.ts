/** A connection that has said what it wants, with its descriptors, until somebody takes them over or lets them go. */
import { closeDescriptors, type FdConnection } from '../fd-channel.js';
import { type Handshake, receiveHandshake } from './handshake.js';

export interface Greeted {
  readonly connection: FdConnection;
  readonly handshake: Handshake;
  /** Closes all of it; once. */
  discard(): void;
}

/** Null: it closed without a word. Closes the connection where it comes to nothing. Throws as `receiveHandshake`. */
export async function greet(connection: FdConnection, timeoutMs: number): Promise<Greeted | null> {
  try {
    const handshake = await receiveHandshake(connection, timeoutMs);
    if (handshake) {
      const { uffd, memfd } = handshake;
      let open = true;
      const discard = () => {
        if (!open) return;
        open = false;
        closeDescriptors(memfd === null ? [uffd] : [uffd, memfd]);
        connection.close();
      };
      return { connection, handshake, discard };
    }
  } catch (error) {
    connection.close();
    throw error;
  }
  connection.close();
  return null;
}
