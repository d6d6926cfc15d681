/** The guide's commands, as they stand in it, in its order; each one's output is the text that follows it there. */
import { execFile } from 'node:child_process';
import { readFileSync, rmSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterAll, describe, expect, test } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));
const guide = readFileSync(new URL('../../docs/webassembly-guests.md', import.meta.url), 'utf8');

interface Command {
  heading: string;
  code: string;
  output: string;
}

function commandsOf(text: string): Command[] {
  const commands: Command[] = [];
  const pattern = /^#+ (?<heading>.+)$|^```(?<language>\w+)\n(?<body>[\s\S]*?)^```$/gm;
  let heading = '';
  for (const { groups } of text.matchAll(pattern)) {
    if (groups?.['heading']) heading = groups['heading'];
    else if (groups?.['language'] === 'sh')
      commands.push({ heading, code: groups['body'] ?? '', output: '' });
    else if (groups?.['language'] === 'text') (commands.at(-1) as Command).output = groups['body'] ?? '';
  }
  return commands;
}

afterAll(() => rmSync(new URL('../../build/guide', import.meta.url), { recursive: true, force: true }));

describe('docs/webassembly-guests.md', () => {
  const commands = commandsOf(guide);
  test('has commands', () => expect(commands.length).toBeGreaterThan(4));
  test.each(commands.map((command, i) => ({ ...command, number: i + 1 })))(
    '$number: $heading',
    async ({ code, output }) => {
      // Whatever a command has left running ends with it.
      const script = `trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n${code}`;
      const { stdout } = await promisify(execFile)('bash', ['-euo', 'pipefail', '-c', script], {
        cwd: root,
        timeout: 170_000,
        killSignal: 'SIGTERM',
      });
      expect(stdout).toBe(output);
    },
    180_000,
  );
});
