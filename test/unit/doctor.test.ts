import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { doctor } from '../../src/doctor.js';

const facts = doctor();
const feature = (name: string) => facts.features.find((candidate) => candidate.name === name);

describe('doctor', () => {
  it('names the machine', () => {
    expect(facts.kernel).toBe(readFileSync('/proc/sys/kernel/osrelease', 'utf8').trim());
    expect(facts.node).toBe(process.version);
    expect(facts.arch).toBe(process.arch);
    expect(facts.pageSize).toBeGreaterThanOrEqual(4096);
    expect(Math.log2(facts.pageSize) % 1).toBe(0);
    expect(facts.hash).not.toBe('');
  });

  it('is plain data', () => {
    expect(JSON.parse(JSON.stringify(facts))).toEqual(facts);
  });

  it('says of everything that is missing why, and how to get it', () => {
    expect(facts.trackers.length).toBeGreaterThan(0);
    expect(facts.features.length).toBeGreaterThan(10);
    for (const { name, available, reason, remedy } of [...facts.trackers, ...facts.features]) {
      if (available) expect(remedy, name).toBe('');
      else expect(reason, name).not.toBe('');
      // A tracker that misbehaves when it is tried out may have no remedy; a kernel feature always has.
    }
    for (const { name, available, remedy } of facts.features)
      if (!available) expect(remedy, name).not.toBe('');
  });

  it('has each finding once', () => {
    const names = [...facts.trackers, ...facts.features].map(({ name }) => name);
    // uffd-wp-async is both a feature of the kernel and the tracker made of it.
    expect(new Set(facts.features.map(({ name }) => name)).size).toBe(facts.features.length);
    expect(names).toContain('userfaultfd');
  });

  it('agrees with the system where that can be asked in another way', () => {
    const sysctl = readFileSync('/proc/sys/vm/unprivileged_userfaultfd', 'utf8').trim();
    expect(feature('unprivileged-userfaultfd')?.available).toBe(sysctl === '1');
    const status = readFileSync('/proc/self/status', 'utf8');
    const effective = BigInt(`0x${/CapEff:\s*([0-9a-f]+)/.exec(status)?.[1]}`);
    expect(feature('cap-sys-ptrace')?.available).toBe(((effective >> 19n) & 1n) === 1n);
    const full = feature('userfaultfd');
    const granted = ['cap-sys-ptrace', 'dev-userfaultfd', 'unprivileged-userfaultfd'];
    if (full?.available) expect(granted.some((name) => feature(name)?.available)).toBe(true);
    if (feature('uffd-wp-async')?.available && feature('pagemap-scan')?.available) {
      expect(facts.trackers.find(({ name }) => name === 'uffd-wp-async')?.available).toBe(true);
    }
  });
});
