/** `memferry drop`: lets one image go at a VMD server, whatever its phase. */
import { type Command, InvalidArgumentError } from 'commander';
import { memferryError } from '../errors.js';
import { addConnectionFlags, type ConnectionFlags } from './connection-flags.js';
import { makeOutput } from './output.js';
import { withStageClient } from './stage-client.js';

export function addDrop(program: Command): void {
  const command = program
    .command('drop')
    .description("let an image go at a VMD server; its pages there are lost, whoever's they are")
    .argument('<host:port>', 'of a `memferry stage`')
    .argument('<image>', 'as `memferry status` lists it', imageId)
    .option('--json', 'one JSON object');
  addConnectionFlags(command).action(run);
}

async function run(
  address: string,
  image: string,
  flags: ConnectionFlags & { json?: boolean },
): Promise<void> {
  const output = makeOutput(flags.json);
  const { known, name } = await withStageClient(address, flags, async (client) => ({
    known: await client.drop(image),
    name: client.name,
  }));
  if (!known)
    throw memferryError('VMD_LOST', `${name} has no image ${image}`, { facts: { server: name, image } });
  output.result(`${name} has dropped ${image}`, { type: 'dropped', server: name, image });
}

export function imageId(text: string): string {
  if (!/^[0-9a-f]{32}$/i.test(text)) throw new InvalidArgumentError('write the 32 hex digits of an image.');
  return text.toLowerCase();
}
