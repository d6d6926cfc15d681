/**
 * The other end of libmemferry-shim.so, which runs inside of QEMU: asks it for its shared memory (addresses and files)
 * and for a userfaultfd over it. A question a line, an answer of JSON with descriptors. JavaScript thread.
 */
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { memferryError } from '../errors.js';
import { closeDescriptors, FdConnection, type FdPiece } from '../fd-channel.js';

const version = 1;
const maxAnswerBytes = 64 * 1024;
const maxFiles = 16;
const timeoutMs = 5_000;

const hex = z.string().regex(/^[0-9a-f]{1,16}$/);
const failure = z.object({
  version: z.literal(version),
  error: z.string().max(256),
  errno: z.number().int(),
});
const helloSchema = z.object({
  version: z.literal(version),
  pid: z.number().int().positive(),
  uid: z.number().int().nonnegative(),
  pageSize: z.number().int().positive(),
});
const memorySchema = z.object({
  version: z.literal(version),
  mappings: z
    .array(
      z.object({
        address: hex,
        lengthBytes: z.number().int().positive().max(Number.MAX_SAFE_INTEGER),
        offset: z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER),
        file: z.number().int().nonnegative(),
      }),
    )
    .max(64),
});
const userfaultfdSchema = z.object({
  version: z.literal(version),
  features: hex,
  offered: hex,
  new: z.boolean(),
});

/** A shared mapping of QEMU's, in QEMU's addresses. */
export interface ShimMapping {
  address: bigint;
  lengthBytes: number;
  /** In its file. */
  offset: number;
  /** Which of the descriptors is its file. */
  file: number;
}

/** Where the object lies that QEMU is started with, as `LD_PRELOAD`. */
export function shimPath(): string {
  return join(dirname(fileURLToPath(import.meta.url)), '../../build/Release/libmemferry-shim.so');
}

export class Shim implements Disposable {
  readonly pid: number;
  readonly uid: number;
  /** QEMU's, the connection's own: closed with it. */
  readonly pidfd: number;
  readonly #connection: FdConnection;

  private constructor(connection: FdConnection, hello: z.output<typeof helloSchema>, pidfd: number) {
    this.#connection = connection;
    this.pid = hello.pid;
    this.uid = hello.uid;
    this.pidfd = pidfd;
  }

  /**
   * @throws CONNECT_FAILED when QEMU was not started with the shim, or not with this socket; PROTOCOL_ERROR
   */
  static async connect(path: string): Promise<Shim> {
    let connection: FdConnection;
    try {
      connection = await FdConnection.connect(path, timeoutMs);
    } catch (cause) {
      throw memferryError(
        'CONNECT_FAILED',
        `nobody answers at ${path}: start QEMU with LD_PRELOAD=${shimPath()} and MEMFERRY_SHIM_SOCKET=${path}, and ` +
          'without -daemonize',
        { cause },
      );
    }
    try {
      const { value } = await ask(connection, 'hello', helloSchema, 0);
      const { pid, pidfd } = connection.peer;
      // The process that listens is the one that answers: what it says of itself must fit to what the kernel says.
      if (pidfd === null || pid !== value.pid) {
        throw memferryError(
          'PROTOCOL_ERROR',
          `${path}: process ${value.pid} answers, the socket belongs to ${pid}; both must be of one pid namespace`,
          { facts: { pid, said: value.pid } },
        );
      }
      return new Shim(connection, value, pidfd);
    } catch (error) {
      connection.close();
      throw error;
    }
  }

  /** Who answers there, and no more. @throws as `connect` */
  static async identify(path: string): Promise<{ pid: number; uid: number }> {
    using shim = await Shim.connect(path);
    const { pid, uid } = shim;
    return { pid, uid };
  }

  /** The descriptors are the caller's to close. */
  async memory(): Promise<{ mappings: ShimMapping[]; files: number[] }> {
    const { value, descriptors } = await ask(this.#connection, 'memory', memorySchema, maxFiles);
    if (value.mappings.some(({ file }) => file >= descriptors.length)) {
      closeDescriptors(descriptors);
      throw memferryError('PROTOCOL_ERROR', 'the shim names a file that it has not sent');
    }
    const mappings = value.mappings.map((mapping) => ({
      ...mapping,
      address: BigInt(`0x${mapping.address}`),
    }));
    return { mappings, files: descriptors };
  }

  /**
   * A userfaultfd over QEMU's memory with these features; the caller's to close, QEMU keeps another one. Asked for the
   * same features again it gives the same one again.
   * @throws USERFAULTFD_UNAVAILABLE when QEMU may have none, or this kernel lacks a feature
   */
  async userfaultfd(features: bigint): Promise<number> {
    const { descriptors } = await ask(
      this.#connection,
      `userfaultfd ${features.toString(16)}`,
      userfaultfdSchema,
      1,
    );
    const [fd] = descriptors;
    if (fd === undefined) throw memferryError('PROTOCOL_ERROR', 'the shim has sent no userfaultfd');
    return fd;
  }

  close(): void {
    this.#connection.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

async function ask<Schema extends z.ZodType>(
  connection: FdConnection,
  question: string,
  schema: Schema,
  mostDescriptors: number,
): Promise<{ value: z.output<Schema>; descriptors: number[] }> {
  await connection.send(Buffer.from(`${version} ${question}\n`), [], timeoutMs);
  const piece: FdPiece = await connection.receiveWhole(
    { mostBytes: maxAnswerBytes, mostDescriptors, timeoutMs },
    (bytes) => bytes.at(-1) === 10,
  );
  try {
    return { value: parse(piece.bytes, question, schema), descriptors: piece.descriptors };
  } catch (error) {
    closeDescriptors(piece.descriptors);
    throw error;
  }
}

function parse<Schema extends z.ZodType>(bytes: Buffer, question: string, schema: Schema): z.output<Schema> {
  let said: unknown;
  try {
    said = JSON.parse(bytes.toString('utf8'));
  } catch (cause) {
    throw memferryError('PROTOCOL_ERROR', 'the shim ends in the middle of an answer, or is none', { cause });
  }
  const refused = failure.safeParse(said);
  if (refused.success) {
    const { error, errno } = refused.data;
    const isUserfaultfd = question.startsWith('userfaultfd');
    throw memferryError(
      isUserfaultfd ? 'USERFAULTFD_UNAVAILABLE' : 'SYSTEM',
      `QEMU's shim: ${error} failed (errno ${errno})` +
        (isUserfaultfd
          ? ': run QEMU as root, or grant its user /dev/userfaultfd; "memferry doctor" says more'
          : ''),
      { facts: { errno, syscall: error } },
    );
  }
  const answer = schema.safeParse(said);
  if (!answer.success)
    throw memferryError('PROTOCOL_ERROR', 'the shim answers with something else than asked for');
  return answer.data;
}
