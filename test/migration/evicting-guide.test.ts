/**
 * The commands of docs/evicting-a-host.md that set a server up, as root types them and systemd runs what they are for: in a
 * mount namespace with an /etc of its own, so that this machine keeps its users.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));
const guide = readFileSync(join(root, 'docs/evicting-a-host.md'), 'utf8');
const blocks = [...guide.matchAll(/^```\n([\s\S]*?)^```$/gm)].map(([, text]) => text as string);
const blockWith = (words: string) => blocks.find((text) => text.includes(words)) as string;

/** Why this cannot be tried here; null where it can. */
function obstacle(): string | null {
  if (process.getuid?.() !== 0) return 'needs root';
  for (const program of ['useradd', 'runuser', 'unshare', 'timeout']) {
    if (spawnSync('sh', ['-c', `command -v ${program}`]).status !== 0) return `needs ${program}`;
  }
  if (spawnSync('unshare', ['-m', 'mount', '--bind', '/tmp', '/etc']).status !== 0) return 'needs mounts';
  // As a user that is nobody's friend.
  const readable = spawnSync('setpriv', [
    '--reuid=65534',
    '--clear-groups',
    'test',
    '-r',
    join(root, 'lib/cli/main.js'),
  ]);
  return readable.status === 0 ? null : 'needs a tree that other users can read';
}

test('the unit of a server runs as the guide sets it up, and so does what asks it', (context) => {
  const why = obstacle();
  if (why) {
    console.warn(`skipped: ${why}`);
    context.skip();
  }
  const unit = blockWith('[Service]');
  const user = /^User=(.*)$/m.exec(unit)?.[1];
  const memferry = `${process.execPath} ${join(root, 'lib/cli/main.js')}`;
  const stage = (/^ExecStart=((?:.*\\\n)*.*)$/m.exec(unit)?.[1] ?? '')
    .replace('/usr/bin/memferry', memferry)
    .replace(/\\\n/g, ' ')
    .replace(/--listen \S+/, '--listen 127.0.0.1:0')
    .replace(/--memory \S+/, '--memory 64Mi');
  const directory = mkdtempSync(join(tmpdir(), 'memferry-guide-'));
  try {
    const script = [
      'set -eu',
      `cp -a /etc ${directory}/etc && mount --bind ${directory}/etc /etc`,
      blockWith('/dev/urandom'),
      blockWith('useradd'),
      `runuser -u ${user} -- timeout 90 ${stage} > ${directory}/said &`,
      `for i in $(seq 600); do grep -q listening ${directory}/said && break; sleep 0.1; done`,
      `cat ${directory}/said`,
      `port=$(sed -n 's/.*"port":\\([0-9]*\\).*/\\1/p' ${directory}/said)`,
      `runuser -u ${user} -- ${memferry} status 127.0.0.1:$port --secret-file /etc/memferry/secret`,
      `${memferry} status 127.0.0.1:$port --secret-file /etc/memferry/secret || echo "refused $?"`,
      'kill $!; wait || true',
    ].join('\n');
    const { stdout, stderr } = spawnSync('unshare', ['-m', 'sh', '-c', script], {
      encoding: 'utf8',
      timeout: 110_000,
    });
    expect(stdout, stderr).toContain('"type":"listening","name":"spare1","rack":"B"');
    expect(stdout, stderr).toMatch(/"type":"status","name":"spare1"/);
    expect(stdout, stderr).toMatch(/refused \d/);
    expect(stderr).toContain('AUTH_FAILED');
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
});
