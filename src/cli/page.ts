/**
 * `memferry page`: pages the memory of another process from a file, over descriptors that it was started with. What
 * `superviseGuest` starts; its parent reads one JSON object a line.
 */
import { type Command, InvalidArgumentError } from 'commander';
import type { AttachedMapping } from '../attach.js';
import { loadAddon } from '../addon.js';
import { MemferryError, native } from '../errors.js';
import { Region } from '../region.js';
import { servePages } from '../serve-pages.js';
import { wholeNumber } from './parse-values.js';

interface PageFlags {
  pidfd: number;
  uffd: number;
  memory?: number;
  ledger?: number;
  mapping: AttachedMapping[];
  snapshot: string;
  offset: number;
  prepage: boolean;
}

const beatEveryMs = 500;
const descriptor = wholeNumber(0, 2 ** 31 - 1);

export function addPage(program: Command): void {
  program
    .command('page')
    .description("page another process's memory from a file, over descriptors that were inherited")
    .requiredOption('--pidfd <fd>', 'a pidfd of the process', descriptor)
    .requiredOption('--uffd <fd>', 'its userfaultfd', descriptor)
    .option('--memory <fd>', 'the file that is mapped there, shared', descriptor)
    .option('--ledger <fd>', 'a file that tells the next pager what was settled', descriptor)
    .requiredOption(
      '--mapping <address:length:offset>',
      'a piece of the memory, in order; repeatable',
      (text: string, former: AttachedMapping[] = []) => [...former, mapping(text)],
    )
    .requiredOption('--snapshot <file>', 'where the pages come from, raw')
    .option('--offset <bytes>', 'where in it they begin', wholeNumber(0, Number.MAX_SAFE_INTEGER), 0)
    .option('--no-prepage', 'bring only what is touched')
    .action(page);
}

/** "0x7f12a000:1048576:0" */
export function mapping(text: string): AttachedMapping {
  const parts = /^(0x[0-9a-f]{1,16}):(\d{1,15}):(\d{1,15})$/i.exec(text);
  if (!parts) throw new InvalidArgumentError('expected address:length:offset, as 0x7f12a000:1048576:0');
  return { address: BigInt(parts[1] as string), lengthBytes: Number(parts[2]), offset: Number(parts[3]) };
}

async function page(flags: PageFlags): Promise<void> {
  // Nobody reads any more: the supervisor has ended, and no pager follows this one. It goes on; were it to end, what is
  // missing would read as zeros.
  let orphaned = false;
  process.stdout.on('error', () => {
    orphaned = true;
  });
  const say = (line: object) => process.stdout.write(`${JSON.stringify(line)}\n`);
  try {
    const region = Region.attach({
      pidfd: flags.pidfd,
      uffd: flags.uffd,
      mappings: flags.mapping,
      ...(flags.memory === undefined ? {} : { memory: flags.memory }),
    });
    const service = servePages({
      region,
      snapshot: flags.snapshot,
      offsetBytes: flags.offset,
      prepage: flags.prepage,
      ...(flags.ledger === undefined ? {} : { ledger: flags.ledger }),
    });
    say({ type: 'serving', stats: service.stats() });
    const beat = setInterval(() => say({ type: 'beat', stats: service.stats() }), beatEveryMs);
    try {
      await service.done;
    } finally {
      clearInterval(beat);
    }
    say({ type: 'done', stats: service.stats() });
    region.close();
  } catch (error) {
    const { code, message } =
      error instanceof MemferryError ? error : { code: 'SYSTEM', message: String(error) };
    const line = `${JSON.stringify({ type: 'failed', code, message })}\n`;
    const told = await new Promise<boolean>((done) => process.stdout.write(line, (failed) => done(!failed)));
    if (orphaned || !told) native(() => loadAddon().holdProcess(flags.pidfd)).end();
    throw error;
  }
}
