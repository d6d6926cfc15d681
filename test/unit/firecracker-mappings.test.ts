/** What Firecracker says of the guest's memory: read exactly, and refused where it makes no sense. */
import { describe, expect, it } from 'vitest';
import { asOneRegion, checkWithin, mayBeWhole, parseMappings } from '../../src/firecracker/mappings.js';

const region = {
  base_host_virt_addr: 140_234_567_680 * 4096,
  size: 128 * 4096,
  offset: 0,
  page_size: 4096,
  page_size_kib: 4096,
};
// Below 2^47.
region.base_host_virt_addr = 0x7f12_3456_7000;
const parse = (value: unknown) => parseMappings(Buffer.from(JSON.stringify(value)));
const refused = expect.objectContaining({ code: 'PROTOCOL_ERROR' });

describe('the description of the guest memory', () => {
  it('is read as every release writes it', () => {
    const expected = {
      mappings: [{ address: 0x7f12_3456_7000n, lengthBytes: 128 * 4096, offset: 0 }],
      pageSize: 4096,
      lengthBytes: 128 * 4096,
    };
    const { page_size, page_size_kib, ...plain } = region;
    expect(parse([region])).toEqual(expected);
    expect(parse([{ ...plain, page_size }])).toEqual(expected);
    expect(parse([{ ...plain, page_size_kib }])).toEqual(expected);
    expect(parse([plain])).toEqual(expected);
    expect(parse([{ ...region, something_new: { nested: [1] } }])).toEqual(expected);
    const huge = { base_host_virt_addr: 2 ** 21, size: 2 ** 22, offset: 2 ** 21, page_size_kib: 2 ** 21 };
    expect(parse([huge])).toMatchObject({ pageSize: 2 ** 21, lengthBytes: 2 ** 22 });
  });

  it('is refused where it makes no sense', () => {
    const bad: unknown[] = [
      [],
      {},
      null,
      'x',
      [[region]],
      [null],
      [{ ...region, size: 0 }],
      [{ ...region, size: -4096 }],
      [{ ...region, size: 4095 }],
      [{ ...region, size: '4096' }],
      [{ ...region, size: 1.5 }],
      [{ ...region, offset: 1 }],
      [{ ...region, offset: -4096 }],
      [{ ...region, offset: undefined }],
      [{ ...region, base_host_virt_addr: 0 }],
      [{ ...region, base_host_virt_addr: region.base_host_virt_addr + 1 }],
      [{ ...region, base_host_virt_addr: 2 ** 47 }],
      [{ ...region, base_host_virt_addr: 2 ** 47 - 4096 }],
      [{ ...region, size: 2 ** 50 }],
      [{ ...region, page_size: 8192, page_size_kib: 8192 }],
      [{ ...region, page_size: 4096, page_size_kib: 4 }],
      [{ ...region, page_size: 0 }],
      [{ ...region, page_size: 0, page_size_kib: 0 }],
      [{ ...region, page_size: 4097, page_size_kib: 4097 }],
      [{ ...region, page_size: -4096, page_size_kib: -4096 }],
      [{ ...region, page_size: 1, page_size_kib: 1 }],
      [{ ...region, offset: 2 ** 53 - 4096 }],
      [region, region],
      [region, { ...region, base_host_virt_addr: region.base_host_virt_addr + 127 * 4096 }],
      [region, { base_host_virt_addr: 2 ** 21, size: 2 ** 22, offset: 2 ** 21, page_size: 2 ** 21 }],
      Array.from({ length: 4097 }, (_, i) => ({ ...region, base_host_virt_addr: (i + 1) * 2 ** 30 })),
    ];
    for (const value of bad)
      expect(() => parse(value), JSON.stringify(value)?.slice(0, 200)).toThrow(refused);
  });

  it('is never rounded', () => {
    const text = JSON.stringify([region]);
    for (const number of ['18446744073709551615', '9007199254740993', '9007199254740992', '1e30', '4096.5'])
      expect(() => parseMappings(Buffer.from(text.replace(/"offset":0/, `"offset":${number}`)))).toThrow(
        refused,
      );
    expect(() => parseMappings(Buffer.from(text.replace('"size":', '"size":NaN,"x":')))).toThrow(refused);
  });

  it('may be no JSON, or deep, or cut off', () => {
    for (const text of [
      '',
      '[',
      '[{',
      ']',
      '[{"a":]',
      'x]',
      '\u0000]',
      `${'['.repeat(200_000)}${']'.repeat(200_000)}`,
    ])
      expect(() => parseMappings(Buffer.from(text)), text.slice(0, 20)).toThrow(refused);
    expect(() => parseMappings(Buffer.from([0xff, 0xfe, 0x5d]))).toThrow(refused);
    const whole = Buffer.from(JSON.stringify([region]));
    for (let cut = 0; cut < whole.length; cut++) expect(mayBeWhole(whole.subarray(0, cut))).toBe(false);
    expect(mayBeWhole(whole)).toBe(true);
    expect(mayBeWhole(Buffer.concat([whole, Buffer.from(' \n')]))).toBe(true);
    // A bracket inside of a string.
    expect(mayBeWhole(Buffer.from('["a]'))).toBe(false);
  });

  it('must lie within the snapshot, and in one piece where it is one region', () => {
    const second = { ...region, base_host_virt_addr: 0x1000_0000, offset: region.size };
    const memory = parse([second, region]);
    expect(() => checkWithin(memory, 2 * region.size)).not.toThrow();
    const tooShort = expect.objectContaining({ code: 'INVALID_ARGUMENT' });
    expect(() => checkWithin(memory, 2 * region.size - 1)).toThrow(tooShort);
    expect(asOneRegion(memory, 2 * region.size).map(({ offset }) => offset)).toEqual([0, region.size]);
    expect(() => asOneRegion(memory, region.size)).toThrow(tooShort);
    expect(() => asOneRegion(parse([second]), region.size)).toThrow(tooShort);
    expect(() => asOneRegion(parse([region, { ...second, offset: 0 }]), 2 * region.size)).toThrow(tooShort);
  });
});
