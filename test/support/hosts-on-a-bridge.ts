/**
 * Hosts with addresses of their own on this one machine, and terminals on them: for guides whose commands are typed as they
 * are written. Each host is a network and a mount namespace with an /etc, an /srv, a /var/log and a home directory of its
 * own; all are on a bridge in a namespace that nobody else sees, and in one namespace of processes, so that everything
 * ends with its first process. That one reads what only this process writes: they end together, however that comes about.
 */
import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { bounded } from './host.js';
import type { Line } from './command-line.js';

/** First in PATH. Users that a guide makes find their commands there, whoever may enter the directory for temporary files. */
const PROGRAMS = '/mnt';

const BOUND_MS = 60_000;
/** What a host has of its own: nothing that is done there may change this machine. */
const OWN = { etc: '/etc', srv: '/srv', log: '/var/log' } as const;

/** Why there can be no such hosts here, or null. */
export function hostsObstacle(): string | null {
  if (process.getuid?.() !== 0) return 'needs root';
  for (const program of ['ip', 'nsenter', 'unshare', 'setsid']) {
    if (spawnSync('sh', ['-c', `command -v ${program}`]).status !== 0) return `needs ${program}`;
  }
  const trial = 'mount --bind /tmp /etc && ip link add b0 type bridge && ip link add v0 type veth';
  const { status, stderr } = spawnSync(
    'unshare',
    [...'--mount --net --pid --fork --mount-proc sh -c'.split(' '), trial],
    { encoding: 'utf8' },
  );
  return status === 0 ? null : `needs namespaces, mounts and a bridge: ${stderr.trim()}`;
}

/** A shell with nobody's startup files: what is typed after a command goes to that command, as on any terminal. */
export class Terminal {
  readonly #child: ChildProcess;
  readonly #lines: string[] = [];
  /** Lines before this one were waited for, or passed over. */
  #next = 0;
  #runs = 0;
  #errors = '';
  #wake: () => void = () => {};
  readonly #closed: Promise<never>;

  constructor(command: readonly string[], env: NodeJS.ProcessEnv) {
    const [program, ...args] = command as [string, ...string[]];
    this.#child = spawn(program, [...args, 'bash', '--norc'], { stdio: 'pipe', env });
    createInterface({ input: this.#child.stdout as NodeJS.ReadableStream }).on('line', (line) => {
      this.#lines.push(line);
      this.#wake();
    });
    this.#child.stderr?.setEncoding('utf8').on('data', (text) => {
      this.#errors += text;
      this.#wake();
    });
    this.#closed = new Promise((_, reject) => {
      this.#child.once('error', reject);
      this.#child.once('close', () => reject(new Error(`the terminal has ended: ${this.#errors}`)));
    });
    this.#closed.catch(() => {});
    this.#child.stdin?.on('error', () => {}); // said by #closed
    // Whoever enters a namespace of mounts stands at its root.
    this.type('cd "$HOME" || exit');
  }

  get errors(): string {
    return this.#errors;
  }

  type(line: string): void {
    this.#child.stdin?.write(`${line}\n`);
  }

  /** What `look` gives once it gives something; it looks again at whatever has been said since. */
  async #until<T>(what: string, look: () => T | null): Promise<T> {
    const found = async () => {
      for (;;) {
        const value = look();
        if (value !== null) return value;
        await new Promise<void>((resolve) => {
          this.#wake = resolve;
        });
      }
    };
    return await bounded(
      Promise.race([found(), this.#closed]),
      BOUND_MS,
      () => `no ${what}: ${this.#lines.slice(-8).join('\n')}\n${this.#errors}`,
    );
  }

  /** The next line for which `wanted` gives something; those before it are passed over. */
  #line<T>(what: string, wanted: (line: string) => T | null): Promise<T> {
    return this.#until(what, () => {
      while (this.#next < this.#lines.length) {
        const value = wanted(this.#lines[this.#next++] as string);
        if (value !== null) return value;
      }
      return null;
    });
  }

  /** The next line of JSON of this type, unless the command fails or ends before it. */
  line(type: string): Promise<Line> {
    return this.#line(`line '${type}'`, (text) => {
      const line = text.startsWith('{') ? (JSON.parse(text) as Line) : null;
      if (line?.['type'] === type) return line;
      if (line?.['type'] === 'failed' || /^ended \d+: /.test(text)) {
        throw new Error(`no line '${type}', but ${text}\n${this.#errors}`);
      }
      return null;
    });
  }

  async ask(request: unknown): Promise<unknown> {
    this.type(JSON.stringify(request));
    const { reply, error } = await this.line('reply');
    return error ?? reply;
  }

  /** Types commands. The shell reads all of them before the first one runs, so that none takes another for its input. */
  start(commands: string): void {
    // Said on both, since what comes on one says nothing of what has come on the other.
    this.type(`(set -eu\n${commands}\n); end="ended ${++this.#runs}: $?"; echo "$end" >&2; echo "$end"`);
  }

  /** The exit code of what was started last: of its last command, or of the first that failed. */
  async ended(): Promise<number> {
    const end = new RegExp(`^ended ${this.#runs}: (\\d+)$`, 'm');
    const code = await this.#line('end of the command', (line) => end.exec(line)?.[1] ?? null);
    await this.#until('end of its errors', () => end.exec(this.#errors));
    return Number(code);
  }

  /** Gives what the commands wrote. */
  async run(commands: string): Promise<string> {
    const from = this.#lines.length;
    const errorsFrom = this.#errors.length;
    this.start(commands);
    const code = await this.ended();
    if (code !== 0) throw new Error(`exit code ${code}: ${commands}: ${this.#errors.slice(errorsFrom)}`);
    return this.#lines.slice(from, this.#next - 1).join('\n');
  }
}

export class BridgedHost {
  /** Also what its namespaces live in. */
  readonly shell: Terminal;
  readonly #groups = new Map<Terminal, string>();
  #pid = '';

  private constructor(
    /** Where its /etc, /srv, /var/log (`etc`, `srv`, `log`) and its user's home (`home`) are for this process. */
    readonly directory: string,
    private readonly lab: readonly string[],
    private readonly env: NodeJS.ProcessEnv,
  ) {
    this.shell = new Terminal([...lab, 'unshare', '--mount', '--net', 'setsid'], env);
  }

  static async start(
    directory: string,
    lab: readonly string[],
    env: NodeJS.ProcessEnv,
  ): Promise<BridgedHost> {
    for (const name of [...Object.keys(OWN), 'home']) mkdirSync(join(directory, name), { recursive: true });
    execFileSync('cp', ['-a', '/etc/.', join(directory, 'etc')]);
    const host = new BridgedHost(directory, lab, { ...env, HOME: join(directory, 'home') });
    const mounts = Object.entries(OWN).map(([name, at]) => `mount --bind ${join(directory, name)} ${at}`);
    await host.shell.run(mounts.join('\n'));
    host.#pid = await host.shell.run('echo $$');
    return host;
  }

  async join(bridge: string, port: string, address: string): Promise<void> {
    ip(this.lab, `link add ${port} type veth peer name eth0 netns ${this.#pid}`);
    ip(this.lab, `link set ${port} master ${bridge} up`);
    await this.shell.run(`ip addr add ${address}/24 dev eth0\nip link set eth0 up\nip link set lo up`);
  }

  async terminal(): Promise<Terminal> {
    const enter = ['nsenter', '--target', this.#pid, '--mount', '--net', 'setsid'];
    const terminal = new Terminal([...this.lab, ...enter], this.env);
    this.#groups.set(terminal, await terminal.run('echo $$'));
    // The shell itself is not to be ended by it.
    terminal.type('trap : INT');
    return terminal;
  }

  /** Ctrl-C: what runs in that terminal is told. */
  async interrupt(terminal: Terminal): Promise<void> {
    await this.shell.run(`kill -INT -- -${this.#groups.get(terminal)}`);
  }
}

const ip = (lab: readonly string[], command: string) => {
  const [program, ...args] = [...lab, 'ip', ...command.split(' ')] as [string, ...string[]];
  execFileSync(program, args, { stdio: ['ignore', 'ignore', 'pipe'] });
};

export class HostsOnABridge<Name extends string> {
  /** `bin` in it is `PROGRAMS` of every host. */
  readonly directory = mkdtempSync(join(tmpdir(), 'memferry-hosts-'));
  readonly #first: ChildProcess;
  #hosts = {} as Record<Name, BridgedHost>;

  private constructor() {
    mkdirSync(join(this.directory, 'bin'));
    chmodSync(join(this.directory, 'bin'), 0o755);
    // Says its number as this process sees it, before it sees only its own kind.
    const first = [
      'read -r pid _ < /proc/self/stat',
      `mount --bind "$1" ${PROGRAMS}`,
      'echo "$pid"',
      'mount -t proc proc /proc',
      'exec cat',
    ].join('; ');
    const apart = '--mount --net --pid --fork --kill-child sh -c'.split(' ');
    this.#first = spawn('unshare', [...apart, first, 'sh', join(this.directory, 'bin')], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
  }

  static async open<Name extends string>(addresses: Record<Name, string>): Promise<HostsOnABridge<Name>> {
    const hosts = new HostsOnABridge<Name>();
    try {
      await hosts.#open(addresses);
      return hosts;
    } catch (error) {
      await hosts.close();
      throw error;
    }
  }

  async #open(addresses: Record<Name, string>): Promise<void> {
    const said = new Promise<string>((resolve, reject) => {
      this.#first.stdout?.setEncoding('utf8').once('data', resolve);
      this.#first.once('error', reject);
      this.#first.once('exit', () => reject(new Error('no namespaces')));
    });
    const pid = (await bounded(said, BOUND_MS, () => 'no namespaces')).trim();
    const lab = ['nsenter', '--target', pid, '--mount', '--net', '--pid'];
    ip(lab, 'link add bridge type bridge');
    ip(lab, 'link set bridge up');
    const env = { ...process.env, PATH: `${PROGRAMS}:${process.env['PATH']}` };
    for (const [name, address] of Object.entries<string>(addresses)) {
      const host = await BridgedHost.start(join(this.directory, name), lab, env);
      await host.join('bridge', name, address);
      this.#hosts[name as Name] = host;
    }
  }

  host(name: Name): BridgedHost {
    return this.#hosts[name];
  }

  /** A command of every host: a script of the shell. */
  program(name: string, script: string): void {
    const file = join(this.directory, 'bin', name);
    writeFileSync(file, `#!/bin/sh\n${script}\n`);
    chmodSync(file, 0o755);
  }

  /** All that runs there ends, and what was there is gone. */
  async close(): Promise<void> {
    if (this.#first.exitCode === null) {
      const ended = new Promise((resolve) => this.#first.once('exit', resolve));
      this.#first.stdin?.end();
      await bounded(ended, BOUND_MS, () => 'the namespaces do not end');
    }
    rmSync(this.directory, { recursive: true, force: true });
  }
}
