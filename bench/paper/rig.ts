/**
 * The hosts of the evaluation: a source, a destination that may be put under pressure, a client, and intermediaries,
 * each in a network namespace behind a link of its own. One rig a process; all that it makes goes with it.
 */
import { randomBytes } from 'node:crypto';
import { existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { modes } from 'memferry';
import { removeAbandonedCgroups } from '../lab/cgroups.js';
import { removeAbandonedSwap } from '../lab/compressed-swap.js';
import { type Host, Lab, labCongestionControl, labObstacle } from '../lab/namespaces.js';
import { PressuredHost, pressureObstacle } from '../lab/pressured-host.js';
import { repositoryRoot } from '../support/paths.js';
import { runCommand, runFloor, type Server, startFloorServer, startServer } from '../support/processes.js';
import { linkMbits, type PaperOptions } from './options.js';

export const memferryCommand = join(repositoryRoot, 'lib', 'cli', 'main.js');
export const mostIntermediaries = 4;
/** Of the raw socket: what a second of 1 Gb/s carries, so that its start does not show. */
const lineBytes = 128 * 2 ** 20;

/** This machine lacks what a figure needs. */
export class Obstacle extends Error {}

export function rigObstacle(): string | null {
  return labObstacle();
}

export class Rig implements Disposable {
  readonly lab: Lab;
  readonly source: Host;
  readonly destination: Host;
  readonly client: Host;
  readonly intermediaries: readonly Host[];
  readonly secretFile: string;
  /** Why mode `scatter` cannot be run, or null. A migration that is refused sets it. */
  scatterObstacle: string | null;
  /** Migrations of the figure under way that failed and were repeated. */
  readonly failures: string[] = [];
  readonly #directory: string;
  readonly #atExit = (): void => this.close();
  #pressured: PressuredHost | null = null;

  private constructor(
    readonly options: PaperOptions,
    readonly tell: (text: string) => void,
    scatterObstacle: string | null,
  ) {
    this.scatterObstacle = scatterObstacle;
    this.#directory = mkdtempSync(join(tmpdir(), `${directoryPrefix}${process.pid}-`));
    process.once('exit', this.#atExit);
    this.secretFile = join(this.#directory, 'secret');
    writeFileSync(this.secretFile, randomBytes(32).toString('hex'), { mode: 0o600 });
    this.lab = Lab.open({ hosts: 3 + mostIntermediaries, rate: options.link });
    const [source, destination, client, ...intermediaries] = this.lab.hosts;
    if (!source || !destination || !client) throw new Error('a lab of at least three hosts');
    this.source = source;
    this.destination = destination;
    this.client = client;
    this.intermediaries = intermediaries;
  }

  static async open(options: PaperOptions, tell: (text: string) => void): Promise<Rig> {
    removeAbandoned();
    return new Rig(options, tell, await findScatterObstacle());
  }

  /** Bytes a second of a raw socket from the source to a host: by default to one whose link is not limited. */
  async goodput(to: Host = this.intermediaries[0] as Host): Promise<number> {
    const cc = ['--cc', labCongestionControl];
    const server = await startFloorServer(
      'link_floor',
      ['--role', 'server', '--host', to.address, ...cc],
      to.namespace,
    );
    const args = [
      '--role',
      'client',
      '--host',
      to.address,
      '--port',
      server.port,
      '--bytes',
      lineBytes,
      ...cc,
    ];
    const { bytesPerSecond } = await runFloor<{ bytesPerSecond: number }>('link_floor', args, {
      namespace: this.source.namespace,
    });
    await server.ended();
    return bytesPerSecond;
  }

  /** The destination as one that can be put under pressure, made when it is first asked for. */
  pressured(): PressuredHost {
    const obstacle = pressureObstacle();
    if (obstacle !== null) throw new Obstacle(obstacle);
    this.#pressured ??= PressuredHost.open(this.destination, 4 * this.options.guestBytes + 2 ** 30);
    return this.#pressured;
  }

  /** VMD servers, one on each of the first `count` intermediaries, that declare what their links carry. */
  async stage(
    count: number,
    memoryBytes: number,
    mbits: number = linkMbits(this.options.link),
  ): Promise<{ via: string[]; servers: Server[] }> {
    const servers: Server[] = [];
    const via: string[] = [];
    try {
      for (const host of this.intermediaries.slice(0, count)) {
        const args = [memferryCommand, 'stage', '--listen', `${host.address}:0`];
        args.push('--memory', String(memoryBytes), '--bandwidth', String((mbits * 1e6) / 8));
        args.push('--secret-file', this.secretFile, '--plaintext', '--json', ...quietFlags);
        const server = await startServer(process.execPath, args, { namespace: host.namespace });
        servers.push(server);
        const { port } = JSON.parse(server.first) as { port: number };
        via.push(`${host.address}:${port}`);
      }
      return { via, servers };
    } catch (error) {
      await Promise.all(servers.map((server) => server.stop()));
      throw error;
    }
  }

  /** Links as they were, the destination free: what a figure that broke left behind does not touch the next. */
  async reset(): Promise<void> {
    this.lab.setRate(this.options.link);
    for (const host of this.lab.hosts) this.lab.setHostRate(host, 'receive', null);
    await this.#pressured?.release();
  }

  close(): void {
    process.off('exit', this.#atExit);
    this.#pressured?.close();
    this.#pressured = null;
    this.lab?.close();
    rmSync(this.#directory, { recursive: true, force: true });
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

const directoryPrefix = 'memferry-paper-';

/** What a run left that was killed, whether or not this one would make the same; the lab does so for its own. */
function removeAbandoned(): void {
  removeAbandonedCgroups();
  removeAbandonedSwap();
  for (const name of readdirSync(tmpdir())) {
    const match = new RegExp(`^${directoryPrefix}(\\d+)-`).exec(name);
    if (match === null || existsSync(`/proc/${match[1]}`)) continue;
    rmSync(join(tmpdir(), name), { recursive: true, force: true });
  }
}

/** What else a server is told, as this version of it has it. */
const quietFlags: string[] = [];

async function findScatterObstacle(): Promise<string | null> {
  if (!(modes as readonly string[]).includes('scatter')) return 'this version has no mode scatter';
  try {
    const help = await runCommand(process.execPath, [memferryCommand, 'stage', '--help'], {
      timeoutMs: 20_000,
    });
    // A server is named here; in a namespace without a route for multicast it cannot announce itself.
    if (help.includes('--no-announce')) quietFlags.push('--no-announce');
    return null;
  } catch {
    return 'this version has no command `memferry stage`';
  }
}
