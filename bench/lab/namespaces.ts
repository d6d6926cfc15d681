/**
 * A lab of hosts on one machine: network namespaces on a bridge, each behind a link of a fixed rate. Needs
 * root. Names carry this process's id; they are removed by close(), at the process's end however it comes
 * about, and, after a SIGKILL, by the next lab that starts.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';

/**
 * For the floors' sockets: explicit, because the system's default differs from machine to machine, and a
 * namespace's own default cannot be set everywhere.
 */
export const labCongestionControl = 'cubic';

export interface Host {
  readonly namespace: string;
  readonly address: string;
}

export interface LabOptions {
  hosts: number;
  /** Of every host's link in either direction, as tc writes it ("1gbit"); null: as fast as the machine. */
  rate: string | null;
}

function ip(...args: string[]): void {
  execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'pipe'] });
}

function quietly(...args: string[]): void {
  try {
    ip(...args);
  } catch {
    // Already gone.
  }
}

const prefix = 'mfbench';
/** A device's name has at most 15 characters; a pid at most 7. */
const namespaceOf = (pid: number, host: number): string => `${prefix}${pid}-${host}`;
const deviceOf = (pid: number, host: number): string => `mfb${pid}-${host}`;
const bridgeOf = (pid: number): string => `mfb${pid}`;

let labs = 0;

/** Why there can be no lab here, or null. */
export function labObstacle(): string | null {
  if (process.getuid?.() !== 0) return 'network namespaces need root';
  try {
    execFileSync('ip', ['netns', 'list'], { stdio: 'ignore' });
    execFileSync('tc', ['-V'], { stdio: 'ignore' });
  } catch {
    return 'ip and tc (iproute2) are not installed';
  }
  return null;
}

/** Ends what still runs in a namespace: processes keep it alive after its name is gone. */
function endProcessesIn(namespace: string): void {
  try {
    const pids = execFileSync('ip', ['netns', 'pids', namespace], { encoding: 'utf8' });
    for (const pid of pids.split('\n').filter((line) => line !== '')) process.kill(Number(pid), 'SIGKILL');
  } catch {
    // The namespace or a process went away meanwhile.
  }
}

/** What labs left whose process was killed before it could take them down. */
function removeAbandoned(): void {
  const names = existsSync('/run/netns') ? readdirSync('/run/netns') : [];
  for (const name of names) {
    const match = new RegExp(`^${prefix}(\\d+)-(\\d+)$`).exec(name);
    if (match === null || existsSync(`/proc/${match[1]}`)) continue;
    endProcessesIn(name);
    quietly('link', 'del', deviceOf(Number(match[1]), Number(match[2])));
    quietly('netns', 'del', name);
    quietly('link', 'del', bridgeOf(Number(match[1])));
  }
}

export class Lab implements Disposable {
  readonly hosts: readonly Host[];
  readonly #atExit = (): void => this.close();
  #closed = false;

  private constructor(hosts: Host[]) {
    this.hosts = hosts;
    process.once('exit', this.#atExit);
  }

  static open({ hosts: count, rate }: LabOptions): Lab {
    const obstacle = labObstacle();
    if (obstacle !== null) throw new Error(obstacle);
    if (++labs > 1) throw new Error('one lab a process at a time');
    removeAbandoned();
    const hosts = Array.from({ length: count }, (_, host) => ({
      namespace: namespaceOf(process.pid, host),
      address: `10.77.0.${host + 1}`,
    }));
    const lab = new Lab(hosts);
    try {
      const bridge = bridgeOf(process.pid);
      ip('link', 'add', bridge, 'type', 'bridge');
      ip('link', 'set', bridge, 'up');
      for (const [index, host] of hosts.entries()) {
        const outside = deviceOf(process.pid, index);
        ip('netns', 'add', host.namespace);
        ip('link', 'add', outside, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', host.namespace);
        ip('link', 'set', outside, 'master', bridge, 'up');
        ip('-n', host.namespace, 'addr', 'add', `${host.address}/24`, 'dev', 'eth0');
        ip('-n', host.namespace, 'link', 'set', 'eth0', 'up');
        ip('-n', host.namespace, 'link', 'set', 'lo', 'up');
      }
      if (rate !== null) lab.setRate(rate);
      return lab;
    } catch (error) {
      lab.close();
      throw error;
    }
  }

  /** Of what each host sends; all of them send, so that either direction has it. */
  setRate(rate: string): void {
    for (const host of this.hosts) this.setHostRate(host, 'send', rate);
  }

  /**
   * One direction of one host's link, also while traffic runs; null: as fast as the machine. What a host
   * receives is limited where the bridge sends it.
   */
  setHostRate(host: Host, direction: 'send' | 'receive', rate: string | null): void {
    const index = this.hosts.indexOf(host);
    if (index < 0) throw new Error(`${host.namespace} is no host of this lab`);
    const where = direction === 'send' ? ['-n', host.namespace] : [];
    const device = direction === 'send' ? 'eth0' : deviceOf(process.pid, index);
    const shape = rate === null ? [] : ['tbf', 'rate', rate, 'burst', '512kb', 'latency', '50ms'];
    try {
      execFileSync(
        'tc',
        [...where, 'qdisc', rate === null ? 'del' : 'replace', 'dev', device, 'root', ...shape],
        { stdio: ['ignore', 'ignore', 'pipe'] },
      );
    } catch (error) {
      // There was no limit to take away.
      if (rate !== null) throw error;
    }
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    labs--;
    process.off('exit', this.#atExit);
    // Links first: a namespace takes its devices down some time after it is deleted.
    for (const [index, host] of this.hosts.entries()) {
      endProcessesIn(host.namespace);
      quietly('link', 'del', deviceOf(process.pid, index));
      quietly('netns', 'del', host.namespace);
    }
    quietly('link', 'del', bridgeOf(process.pid));
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
