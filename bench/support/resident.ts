/** What this process holds in memory, and the most that it ever held, by /proc/self/status. */
import { readFileSync } from 'node:fs';

export function residentBytes(): { now: number; peak: number } {
  const status = readFileSync('/proc/self/status', 'utf8');
  const field = (name: string): number => {
    const match = new RegExp(`^${name}:\\s+(\\d+) kB$`, 'm').exec(status);
    if (match === null) throw new Error(`/proc/self/status has no ${name}`);
    return Number(match[1]) * 1024;
  };
  return { now: field('VmRSS'), peak: field('VmHWM') };
}
