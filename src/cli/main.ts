#!/usr/bin/env node
/**
 * The `memferry` command: one file a command, each loaded when it is the one that was asked for.
 */
import { readFileSync } from 'node:fs';
import { Command } from 'commander';
import { addBench } from './bench.js';
import { addDemo } from './demo.js';
import { addDoctor } from './doctor.js';
import { addDrop } from './drop.js';
import { addFirecracker, addFirecrackerPark } from './firecracker.js';
import { describeUsageError, outliveReaders, reportError } from './output.js';
import { addPage } from './page.js';
import { addPark } from './park.js';
import { addQemu } from './qemu.js';
import { addReceive } from './receive.js';
import { addSend } from './send.js';
import { addShare } from './share.js';
import { addStage } from './stage.js';
import { addStatus } from './status.js';
import { addUnpark } from './unpark.js';

function build(): Command {
  const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
    version: string;
  };
  const program = new Command('memferry')
    .description('Moves live memory between processes and machines while its owner keeps running.')
    .version(version)
    .option('--debug', 'show the stack of an error')
    .configureOutput({ outputError: (text, print) => print(describeUsageError(text)) })
    .exitOverride();
  addDemo(program);
  addDoctor(program);
  addBench(program);
  addReceive(program);
  addSend(program);
  addPage(program);
  addPark(program);
  addUnpark(program);
  addStage(program);
  addShare(program);
  addQemu(program);
  addStatus(program);
  addDrop(program);
  addFirecracker(program);
  addFirecrackerPark(program);
  return program;
}

outliveReaders();
const program = build();
try {
  await program.parseAsync();
} catch (error) {
  process.exitCode = reportError(error, program.opts<{ debug?: boolean }>().debug === true);
}
