/**
 * 1 GiB of random bytes over loopback into fresh memory: a region of memferry's, and the RAM of a QEMU that stands, by
 * its multifd; two channels each. Beside them bare sockets into fresh memory of huge pages, which both ask for: what can be
 * had at all. QEMU's clock runs from the command to the destination's word that it has completed;
 * memferry's from before the destination maps its memory, as in `bulk`.
 */
import { randomFillSync } from 'node:crypto';
import { closeSync, openSync, rmSync, writeSync } from 'node:fs';
import { freePort, migrateByItself, qemuRig } from '../support/qemu.js';
import { runFloor } from '../support/processes.js';
import { atLeastTimesFloor } from '../support/result.js';
import { paired, type Trial, takeTurns } from '../support/trial.js';
import { copyOnce } from './bulk.js';

const lengthBytes = 2 ** 30;
const channels = 2;

function fillRandomly(path: string): void {
  const fd = openSync(path, 'w', 0o600);
  try {
    const piece = Buffer.alloc(2 ** 24);
    for (let at = 0; at < lengthBytes; at += piece.length) writeSync(fd, randomFillSync(piece));
  } finally {
    closeSync(fd);
  }
}

const machine = (backend: string) => [
  ...['-accel', 'tcg', '-nodefaults', '-display', 'none', '-m', '1024M'],
  ...['-machine', 'pc,memory-backend=ram0', '-object', backend],
];

async function multifdOnce(image: string): Promise<number> {
  const { Qemu } = qemuRig;
  // It never runs: `-S` is the destination's, so it is stopped by hand.
  const source = await Qemu.start({
    args: [...machine(`memory-backend-file,id=ram0,size=1G,share=on,mem-path=${image}`), '-S'],
    preload: '',
  });
  const destination = await Qemu.start({
    args: machine('memory-backend-ram,id=ram0,size=1G'),
    incoming: true,
    preload: '',
  });
  try {
    // As for memferry's: no hypervisor's own first touch is measured.
    await runFloor('back_memory', ['--bytes', (lengthBytes * 5) / 4]);
    const { totalMs } = await migrateByItself(source, destination, {
      mode: 'multifd',
      host: '127.0.0.1',
      port: await freePort(),
      timeoutMs: 120_000,
      running: false,
    });
    return lengthBytes / 1e6 / totalMs;
  } finally {
    await Promise.all([source.stop(), destination.stop()]);
  }
}

async function bareSockets(): Promise<number> {
  const args = ['--bytes', lengthBytes, '--channels', channels, '--memory', 'huge'];
  return (await runFloor<{ gbPerSecond: number }>('bulk_floor', args)).gbPerSecond;
}

export async function run(trial: Trial): Promise<void> {
  const obstacle = qemuRig.qemuObstacle();
  if (obstacle !== null) {
    trial.skip('fresh-2-channels', obstacle);
    return;
  }
  const image = `/dev/shm/memferry-peer-qemu-${process.pid}`;
  const remove = () => rmSync(image, { force: true });
  process.once('exit', remove);
  try {
    fillRandomly(image);
    const [ours, theirs, bare] = (await takeTurns(trial.samples(5), [
      () => copyOnce(channels, 'fresh'),
      () => multifdOnce(image),
      bareSockets,
    ])) as [number[], number[], number[]];
    trial.report(
      'fresh-2-channels',
      'GB/s',
      paired(ours, theirs),
      atLeastTimesFloor(2, "QEMU's multifd, 2 channels"),
      'the floor is QEMU 7.2',
    );
    trial.report('fresh-2-channels-bare-sockets', 'GB/s', paired(ours, bare), null);
    trial.report('multifd-2-channels-bare-sockets', 'GB/s', paired(theirs, bare), null);
  } finally {
    process.off('exit', remove);
    remove();
  }
}
