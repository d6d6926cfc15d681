/**
 * docs/evicting-a-host.md: its commands as they are written, in its order, each typed by root on the host that the text
 * says: four hosts with the addresses of the guide, on this one machine.
 */
import { spawnSync } from 'node:child_process';
import { copyFileSync, mkdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { HostsOnABridge, hostsObstacle, type Terminal } from '../support/hosts-on-a-bridge.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const guide = readFileSync(join(root, 'docs/evicting-a-host.md'), 'utf8');
const blocks = [...guide.matchAll(/^```(\w*)\n([\s\S]*?)^```$/gm)];
const blocksOf = (language: string) => blocks.filter((one) => one[1] === language).map((one) => one[2] ?? '');

const ADDRESSES = { src: '10.0.0.1', dst: '10.0.0.2', spare1: '10.0.0.11', spare2: '10.0.0.12' };
const SPARES = ['spare1', 'spare2'] as const;

/** What cannot be had here. All else is typed as the guide has it. */
const INSTEAD = {
  /** Of the unit: as much memory as a machine for tests has, and a command that is not put into its /usr/bin. */
  unit: (text: string) =>
    text.replace('--memory 16Gi', '--memory 192Mi').replace('/usr/bin/memferry', 'memferry'),
  /** No systemd runs in a namespace: the unit's command as its user, its output in place of the journal. */
  systemctl: `
    set -eu
    [ "$1 $2" = 'enable --now' ]
    unit=/etc/systemd/system/$3.service
    user=$(sed -n 's/^User=//p' "$unit")
    command=$(sed -n '/^ExecStart=/,/[^\\\\]$/p' "$unit" | sed 's/^ExecStart=//; s/\\\\$//' | tr '\\n' ' ')
    setsid runuser -u "$user" -- $command > "/var/log/$3" 2>&1 < /dev/null &`,
  /** No host runs sshd: into the other one's /etc or its user's home, by the directory behind it. */
  scp: (directory: string) => `
    set -eu
    [ "$1" = -p ]
    host=\${3%%:*} path=\${3#*:}
    case "$path" in
      /etc/*) cp -p "$2" "${directory}/$host$path" ;;
      '') cp -p "$2" "${directory}/$host/home/" ;;
      *) exit 1 ;;
    esac`,
  /** Not installed: this checkout. */
  memferry: `exec '${process.execPath}' '${join(root, 'lib/cli/main.js')}' "$@"`,
};

/** Why this cannot be tried here; null where it can. */
function obstacle(): string | null {
  const hosts = hostsObstacle();
  if (hosts) return hosts;
  for (const program of ['useradd', 'runuser', 'setpriv']) {
    if (spawnSync('sh', ['-c', `command -v ${program}`]).status !== 0) return `needs ${program}`;
  }
  // As a user that is nobody's friend.
  const user = ['--reuid=65534', '--clear-groups'];
  const readable = spawnSync('setpriv', [...user, 'test', '-r', join(root, 'lib/cli/main.js')]);
  return readable.status === 0 ? null : 'needs a tree that other users can read';
}

const why = obstacle();
if (why) console.warn(`skipped: the guide to evicting a host: ${why}`);

describe.skipIf(why !== null)('the guide to evicting a host', () => {
  const untyped = new Set(blocksOf('sh'));
  /** The block with these words, which counts as typed then. */
  const written = (words: string): string => {
    const found = blocksOf('sh').filter((text) => text.includes(words));
    if (found.length !== 1) throw new Error(`'${words}' is in ${found.length} blocks of the guide`);
    untyped.delete(found[0] as string);
    return found[0] as string;
  };

  let hosts: HostsOnABridge<keyof typeof ADDRESSES>;
  const shell = (name: keyof typeof ADDRESSES) => hosts.host(name).shell;
  const statusOf = async (spare: (typeof SPARES)[number]) => {
    const asked = written('memferry status').replace(ADDRESSES.spare1, ADDRESSES[spare]);
    return JSON.parse(await shell(spare).run(asked));
  };
  const held = async () => (await Promise.all(SPARES.map(statusOf))).map((status) => status.held);

  beforeAll(async () => {
    hosts = await HostsOnABridge.open(ADDRESSES);
    hosts.program('memferry', INSTEAD.memferry);
    hosts.program('systemctl', INSTEAD.systemctl);
    hosts.program('scp', INSTEAD.scp(hosts.directory));
    for (const name of ['src', 'dst'] as const) {
      const srv = join(hosts.host(name).directory, 'srv');
      copyFileSync(join(root, 'examples/counter/counter.mjs'), join(srv, 'counter.mjs'));
      mkdirSync(join(srv, 'node_modules'));
      symlinkSync(root, join(srv, 'node_modules/memferry'));
    }
  });
  afterAll(() => hosts?.close());

  test('all hosts get a secret', async () => {
    const names = Object.keys(ADDRESSES) as (keyof typeof ADDRESSES)[];
    for (const name of names) await shell(name).run(written('install -d'));
    await shell('src').run(written('/dev/urandom'));
    for (const spare of SPARES) await shell(spare).run(written('useradd'));
    const secrets = names.map((name) => join(hosts.host(name).directory, 'etc/memferry/secret'));
    expect(new Set(secrets.map((file) => readFileSync(file, 'utf8'))).size).toBe(1);
    for (const file of secrets) expect(statSync(file).mode & 0o777).toBe(0o600);
  });

  test('the servers run as their unit says, and answer their user and nobody else', async () => {
    const [unit] = blocksOf('ini') as [string];
    for (const spare of SPARES) {
      const { directory } = hosts.host(spare);
      const own = INSTEAD.unit(unit)
        .replace(ADDRESSES.spare1, ADDRESSES[spare])
        .replace('--name spare1', `--name ${spare}`);
      mkdirSync(join(directory, 'etc/systemd/system'), { recursive: true });
      writeFileSync(join(directory, 'etc/systemd/system/memferry-stage.service'), own);
      await shell(spare).run(written('systemctl'));
      const journal = () => readFileSync(join(directory, 'log/memferry-stage'), 'utf8');
      await expect.poll(journal).toContain(`{"type":"listening","name":"${spare}","rack":"B"`);
      expect(await statusOf(spare)).toMatchObject({ type: 'status', name: spare, rack: 'B', held: [] });
    }
    const asRoot = written('memferry status').replace(/^.* -- /, '');
    await expect(shell('spare1').run(asRoot)).rejects.toThrow('AUTH_FAILED');
  });

  /** A guest with something in its memory: a page of its own for each. */
  const PAGES = 512;
  const slotOf = (page: number) => page * 1024;
  async function fill(guest: Terminal): Promise<void> {
    await guest.line('started');
    for (let page = 0; page < PAGES; page++) {
      expect(await guest.ask({ add: page + 1, slot: slotOf(page) })).toBe(page + 1);
    }
  }
  async function expectFilled(guest: Terminal): Promise<void> {
    for (const page of [0, 1, 77, PAGES - 1]) {
      expect(await guest.ask({ add: 0, slot: slotOf(page) })).toBe(page + 1);
    }
    expect(await guest.ask('history')).toHaveLength(2);
  }

  test('the guest leaves src, runs at dst, and nothing is left at the servers', async () => {
    const [src, dst] = [await hosts.host('src').terminal(), await hosts.host('dst').terminal()];
    dst.start(written('memferry receive'));
    await dst.line('listening');
    src.start(written('memferry send'));
    await fill(src);
    src.type('');
    expect(await src.line('evicted')).toMatchObject({
      mode: 'scatter',
      intermediaries: SPARES.map((name) => ({ name, failed: null })),
    });
    expect(await src.ended(), src.errors).toBe(0);
    expect(await dst.line('report')).toMatchObject({ verified: true });
    await expectFilled(dst);
    await expect.poll(held).toEqual([[], []]);
    await hosts.host('dst').interrupt(dst);
    expect(await dst.ended(), dst.errors).toBe(0);
  });

  async function park(): Promise<Terminal> {
    const src = await hosts.host('src').terminal();
    src.start(written('memferry park'));
    await fill(src);
    src.type('');
    return src;
  }
  const image = async () => {
    const [one, two] = await held();
    expect(one).toMatchObject([{ kind: 'park', phase: 'parked' }]);
    expect(two).toMatchObject([{ kind: 'park', phase: 'parked', id: one[0].id }]);
    return one[0].id as string;
  };

  test('parked by src it is claimed by dst', async () => {
    const src = await park();
    expect(await src.ended(), src.errors).toBe(0);
    await image();
    await shell('src').run(written('scp -p counter.ticket'));
    const dst = await hosts.host('dst').terminal();
    dst.start(written('memferry unpark'));
    await dst.line('resumed');
    expect(await dst.line('report')).toMatchObject({ guest: 'counter' });
    await expectFilled(dst);
    await expect.poll(held).toEqual([[], []]);
    await hosts.host('dst').interrupt(dst);
    expect(await dst.ended(), dst.errors).toBe(0);
  });

  test('parked and dropped it is gone', async () => {
    rmSync(join(hosts.host('src').directory, 'home/counter.ticket'));
    const src = await park();
    expect(await src.ended(), src.errors).toBe(0);
    shell('src').type(`IMAGE=${await image()}`);
    await shell('src').run(written('memferry drop'));
    expect(await held()).toEqual([[], []]);
  });

  test('no command of the guide is left out', () => {
    expect([...untyped]).toEqual([]);
    // What is typed is marked as such.
    expect(blocksOf('')).toEqual([]);
  });
});
