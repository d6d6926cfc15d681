/** The rate of the link that servers are to fill, from what an interface says of itself. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { networkInterfaces, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { interfaceRate, linkToFill } from '../../src/source/link-rate.js';

const here = { host: '127.0.0.1', port: 9 };
let sysfs = '';
beforeEach(() => {
  sysfs = mkdtempSync(join(tmpdir(), 'memferry-test-'));
});
afterEach(() => rmSync(sysfs, { recursive: true, force: true }));

function says(speed: string): void {
  const [name] = Object.entries(networkInterfaces()).find(([, all]) =>
    all?.some(({ address }) => address === here.host),
  ) as [string, unknown];
  mkdirSync(join(sysfs, name));
  writeFileSync(join(sysfs, name, 'speed'), speed);
}

describe('an interface', () => {
  test('says how many megabits a second it has', async () => {
    says('10000\n');
    expect(await interfaceRate(here, sysfs)).toBe(1.25e9);
  });
  test.each(['-1\n', '0\n', '', 'fast\n'])('that says %j is not known', async (speed) => {
    says(speed);
    expect(await interfaceRate(here, sysfs)).toBeNull();
  });
  test('that says nothing, a host without a route, and no host at all are not known', async () => {
    expect(await interfaceRate(here, sysfs)).toBeNull();
    expect(await interfaceRate({ host: '::ffff:0:0', port: 9 }, sysfs)).toBeNull();
    expect(await interfaceRate({ host: '127.0.0.1', port: 70_000 }, sysfs)).toBeNull();
  });
});

describe('what is to be filled', () => {
  const options = { discover: true, linkBytesPerSecond: null, bandwidth: 0 };
  test('is what the caller says', async () => {
    expect(await linkToFill({ ...options, linkBytesPerSecond: 5 }, [here])).toBe(5);
  });
  test('is the limit where that is all that is known', async () => {
    expect(await linkToFill({ ...options, bandwidth: 1e6 }, [here])).toBe(1e6);
    expect(await linkToFill(options, [here])).toBeNull();
  });
  test('is nothing where no server is chosen', async () => {
    expect(await linkToFill({ ...options, discover: false, bandwidth: 1e6 }, [here])).toBeNull();
    expect(await linkToFill({ ...options, bandwidth: 1e6 }, [])).toBeNull();
  });
});
