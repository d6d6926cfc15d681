/** docs/embedding.md: its commands, in order, in one shell, only elsewhere than in /opt and /tmp. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, test } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));

test('the commands of the guide', { timeout: 300_000 }, () => {
  const guide = readFileSync(join(root, 'docs/embedding.md'), 'utf8');
  const commands = [...guide.matchAll(/^```sh\n([\s\S]*?)^```$/gm)].map(([, block]) => block).join('');
  const directory = mkdtempSync(join(tmpdir(), 'memferry-guide-'));
  try {
    const script = commands
      .replaceAll('/opt/memferry', `${directory}/prefix`)
      .replaceAll('/tmp/embed', `${directory}/embed`)
      // What the suite has built already.
      .replaceAll('build-embed', process.env['MEMFERRY_EMBED_BUILD'] ?? 'build-native')
      .replaceAll(' -DMEMFERRY_TESTS=OFF', '');
    const { status, stdout, stderr } = spawnSync('bash', ['-euo', 'pipefail', '-c', script], {
      cwd: root,
      encoding: 'utf8',
      timeout: 280_000,
    });
    expect(`${status}: ${stderr}`).toMatch(/^0: /);
    expect(stdout.match(/^the same: \d+ pages/gm)).toHaveLength(2);
    expect(stdout).toMatch(/^REGION_UNALIGNED: /m);
    expect(stdout).toMatch(/^moved: verified true/m);
    const events = stdout
      .split('\n')
      .filter((line) => line.startsWith('{"event"'))
      .map((line) => JSON.parse(line).event as string);
    expect(stdout).toMatch(/^'sample' is parked after \d+ ms: 2048 pages at 1 servers$/m);
    expect(stdout).toMatch(/^'sample' runs here: 4 bytes of state/m);
    expect(events.slice(0, 5)).toEqual(['listening', 'accept', 'prepare', 'prepared', 'resume']);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
});
