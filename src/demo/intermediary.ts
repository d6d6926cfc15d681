/** One of the demo's two intermediaries: a VMD server in a process of its own. */
import { memferryError } from '../errors.js';
import { type Staging, stage } from '../staging/server.js';
import { serve } from './child.js';

let staging: Staging | null = null;
serve({ open, close });

async function open(argument: {
  secret: string;
  name: string;
  memoryBytes: number;
}): Promise<{ port: number }> {
  if (staging) throw memferryError('INVALID_ARGUMENT', 'it is open already');
  staging = await stage({
    host: '127.0.0.1',
    port: 0,
    secret: argument.secret,
    name: argument.name,
    memoryBytes: argument.memoryBytes,
  });
  return { port: staging.port };
}

async function close(): Promise<void> {
  await staging?.close();
}
