/** What a QEMU is made of, which of its mappings is which backend, and its state on the wire. */
import { expect, test } from 'vitest';
import { foreignNetworks, inspect } from '../../src/qemu/inspect.js';
import { matchMemory } from '../../src/qemu/match-memory.js';
import type { Qmp } from '../../src/qemu/qmp.js';
import { decodeState, encodeState, qemuModule } from '../../src/qemu/state.js';

const mi = 2 ** 20;
const backend = (id: string, lengthBytes: number, memPath: string | null = null) => ({
  id,
  lengthBytes,
  memPath,
});
const mapping = (file: number, address: bigint, lengthBytes: number, offset = 0) => ({
  file,
  address,
  lengthBytes,
  offset,
});

test('a backend is the mapping of its size', () => {
  const found = matchMemory(
    [backend('ram0', 64 * mi), backend('ram1', 32 * mi)],
    [mapping(0, 0x1000n, 32 * mi), mapping(1, 0x7000000n, 64 * mi), mapping(2, 0x9000n, 4096)],
  );
  expect(found).toEqual([
    {
      id: 'ram0',
      file: 1,
      lengthBytes: 64 * mi,
      pieces: [{ address: 0x7000000n, lengthBytes: 64 * mi, offset: 0 }],
    },
    {
      id: 'ram1',
      file: 0,
      lengthBytes: 32 * mi,
      pieces: [{ address: 0x1000n, lengthBytes: 32 * mi, offset: 0 }],
    },
  ]);
});

test('what the kernel has split is one again, where it is', () => {
  const [found] = matchMemory(
    [backend('ram0', 3 * mi)],
    [
      mapping(0, BigInt(0x100000 + mi), mi, mi),
      mapping(0, 0x100000n, mi, 0),
      mapping(0, 0x9000000n, mi, 2 * mi),
    ],
  );
  expect(found?.pieces).toEqual([
    { address: 0x100000n, lengthBytes: 2 * mi, offset: 0 },
    { address: 0x9000000n, lengthBytes: mi, offset: 2 * mi },
  ]);
});

test('two of one size are told apart by their files, or not at all', () => {
  const backends = [backend('a', mi, '/a'), backend('b', mi, '/b')];
  const mappings = [mapping(0, 0x100000n, mi), mapping(1, 0x900000n, mi)];
  const found = matchMemory(backends, mappings, ({ id }) => (id === 'a' ? 1 : 0));
  expect(found.map(({ id, file }) => [id, file])).toEqual([
    ['a', 1],
    ['b', 0],
  ]);
  expect(() => matchMemory(backends, mappings)).toThrow(/'a': it cannot be told from another backend/);
  expect(() => matchMemory([backend('a', mi)], mappings)).toThrow(/another mapping of the same size/);
});

test.each([
  ['is not mapped', []],
  ['has another size', [mapping(0, 0x1000n, 2 * mi)]],
  ['has a gap', [mapping(0, 0x1000n, mi / 2), mapping(0, 0x900000n, mi / 2, mi)]],
  ['does not begin at its start', [mapping(0, 0x1000n, mi, 4096)]],
  ['is mapped twice', [mapping(0, 0x1000n, mi), mapping(0, 0x900000n, mi)]],
])('a backend that %s is not movable', (_, mappings) => {
  expect(() => matchMemory([backend('ram0', mi)], mappings)).toThrow(
    expect.objectContaining({ code: 'GUEST_UNMOVABLE', facts: { names: ['ram0'] } }),
  );
});

test('networks of other processes', () => {
  const text =
    'net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n' +
    ' \\ hn0: index=0,type=user,net=10.0.2.0,restrict=off\r\n' +
    'net1: index=0,type=nic,model=virtio-net-pci\r\n \\ vu0: index=0,type=vhost-user,vhostforce=on\r\n' +
    ' \\ dpa: index=0,type=vhost-vdpa\r\n';
  expect(foreignNetworks(text)).toEqual([
    'network vu0 (its backend writes RAM from another process)',
    'network dpa (hardware writes RAM)',
  ]);
});

/** As the human monitor ends its lines. */
const tree = (...lines: string[]) => lines.map((line) => `${line}\r\n`).join('');

/** A QEMU that answers from a table, and knows no other question. */
function fakeQemu(answers: Record<string, unknown>): Qmp {
  const usual: Record<string, unknown> = {
    'query-migrate': {},
    'query-cpus-fast': [{}],
    'query-memdev': [{ id: 'ram0', size: mi, share: true }],
    'qom-get /machine type': 'pc-i440fx-7.2-machine',
    'qom-get /machine memory-backend': '/objects/ram0',
    'qom-get /objects/ram0 mem-path': '/dev/shm',
    'info network': '',
    'info qom-tree /machine': tree('/machine (pc-i440fx-7.2-machine)', '  /unattached (container)'),
    'info qom-tree /objects': tree('/objects (container)', '  /ram0 (memory-backend-file)'),
  };
  const all = { ...usual, ...answers };
  const execute = async (command: string, args: Record<string, string> = {}) => {
    const asked = [command, args['path'], args['property']].filter((part) => part !== undefined).join(' ');
    const key = args['command-line'] ?? asked;
    if (!(key in all)) throw new Error(`not expected: ${key}`);
    return all[key];
  };
  return { version: '7.2.22', execute } as unknown as Qmp;
}

test('a QEMU that can be moved', async () => {
  expect(await inspect(fakeQemu({}))).toEqual({
    qemu: '7.2.22',
    type: 'pc-i440fx-7.2-machine',
    cpus: 1,
    backends: [{ id: 'ram0', lengthBytes: mi, memPath: '/dev/shm' }],
  });
});

test.each([
  ['a vhost-user device', '/machine', 'vhost-user-fs-pci'],
  ['a device with a vhost-user backend object', '/objects', 'vhost-user-backend'],
  ['a cryptodev', '/objects', 'cryptodev-vhost-user'],
  ['a passed-through device', '/machine', 'vfio-pci'],
  ['vDPA', '/machine', 'vhost-vdpa-device-pci'],
  ['shared memory with doorbells', '/machine', 'ivshmem-doorbell'],
  ['shared memory', '/machine', 'ivshmem-plain'],
])('what writes RAM from elsewhere is found: %s', async (_, top, type) => {
  const lines = [`${top} (container)`, '  /a (1)[0] (memory-region)', `    /it (${type})`, '  /b (irq)'];
  await expect(inspect(fakeQemu({ [`info qom-tree ${top}`]: tree(...lines) }))).rejects.toMatchObject({
    code: 'GUEST_UNMOVABLE',
    facts: { names: [expect.stringMatching(`^${top}/a \\(1\\)\\[0\\]/it \\(${type}: `)] },
  });
});

test.each([
  ['RAM in no backend', { 'query-memdev': [] }],
  ['RAM of its own', { 'query-memdev': [{ id: 'ram0', size: mi, share: false }] }],
  [
    'a second backend of its own',
    {
      'query-memdev': [
        { id: 'ram0', size: mi, share: true },
        { id: 'ram1', size: mi, share: false },
      ],
    },
  ],
  ['a backend that is not the machine’s', { 'qom-get /machine memory-backend': '' }],
  ['what QEMU itself refuses', { 'query-migrate': { 'blocked-reasons': ['a host CD drive'] } }],
])('is not movable: %s', async (_, answers) => {
  await expect(inspect(fakeQemu(answers))).rejects.toMatchObject({ code: 'GUEST_UNMOVABLE' });
});

test('a QEMU that migrates by itself is busy', async () => {
  await expect(inspect(fakeQemu({ 'query-migrate': { status: 'active' } }))).rejects.toMatchObject({
    code: 'GUEST_BUSY',
  });
});

test('answers that are none', async () => {
  for (const answers of [
    { 'query-memdev': 'ram0' },
    { 'query-memdev': [{ size: -1 }] },
    { 'info qom-tree /objects': [{ name: 'x' }] },
    { 'info qom-tree /objects': '' },
    { 'info qom-tree /machine': "Path '/machine' could not be resolved.\r\n" },
    { 'info qom-tree /machine': tree('/machine (pc)', '    /too/deep (irq)') },
    { 'info qom-tree /machine': tree('/machine (pc)', '/another (irq)') },
    { 'info qom-tree /machine': tree('/machine (pc)', '  /vfio') },
    { 'query-migrate': { 'blocked-reasons': 'no' } },
  ]) {
    await expect(inspect(fakeQemu(answers))).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
  }
});

test('a state comes out as it went in', () => {
  const stream = Buffer.from('QEVM and so on');
  const { running, stream: out } = decodeState(
    encodeState(false, [stream.subarray(0, 5), stream.subarray(5)]),
  );
  expect(running).toBe(false);
  expect(Buffer.from(out)).toEqual(stream);
});

test.each([
  ['nothing', Buffer.alloc(0)],
  ['no header', Buffer.from('QEVM')],
  ['a header without an end', Buffer.alloc(5000, 32)],
  ['another version', Buffer.from('{"version":2,"running":true}\nQEVM')],
  ['more than there may be', Buffer.from('{"version":1,"running":true,"run":"rm"}\nQEVM')],
  ['no stream of QEMU', Buffer.from('{"version":1,"running":true}\nQEMU')],
])('a state that is none: %s', (_, state) => {
  expect(() => decodeState(state)).toThrow(expect.objectContaining({ code: 'PROTOCOL_ERROR' }));
});

test('the module that a guest of QEMU names stays the same', () => {
  expect(qemuModule).toEqual({
    name: 'qemu',
    sha256: expect.stringMatching(/^[0-9a-f]{64}$/),
  });
});
