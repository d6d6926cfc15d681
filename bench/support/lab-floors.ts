/** The floors between two hosts of a lab: a remote fault, and what one raw stream delivers. */
import { type Host, labCongestionControl } from '../lab/namespaces.js';
import { loadAddon } from './addon.js';
import { runFloor, startFloorServer } from './processes.js';
import type { FaultFloor } from './remote-faults.js';

const lengthBytes = 256 * 2 ** 20;
const touches = 10_000;
const cc = ['--cc', labCongestionControl];

/** On an idle link. Pages travel from the source to the destination, as in the migration. */
export async function labFaultFloor(source: Host, destination: Host): Promise<FaultFloor> {
  const pages = ['--pages', lengthBytes / loadAddon().pageSize];
  const server = await startFloorServer(
    'fault_floor',
    ['--role', 'server', '--host', source.address, ...pages, ...cc],
    source.namespace,
  );
  const client = ['--role', 'client', '--host', source.address, '--port', server.port];
  const figures = await runFloor<FaultFloor>(
    'fault_floor',
    [...client, ...pages, '--touches', touches, ...cc],
    { namespace: destination.namespace },
  );
  await server.ended();
  return figures;
}

/** MB/s from one to the other. */
export async function labLinkRate(source: Host, destination: Host): Promise<number> {
  const server = await startFloorServer(
    'link_floor',
    ['--role', 'server', '--host', destination.address, ...cc],
    destination.namespace,
  );
  const client = ['--role', 'client', '--host', destination.address, '--port', server.port];
  const { bytesPerSecond } = await runFloor<{ bytesPerSecond: number }>(
    'link_floor',
    [...client, '--bytes', lengthBytes, ...cc],
    { namespace: source.namespace },
  );
  await server.ended();
  return bytesPerSecond / 1e6;
}
