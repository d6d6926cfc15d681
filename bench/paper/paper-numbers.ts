/**
 * The paper's own numbers (Deshpande et al., Scatter-Gather Live Migration of Virtual Machines), from its text and its
 * table. Its figures are pictures: a value that only they show is not here.
 */
import type { PaperNumber } from './result.js';

/** 5 GB over "close to 900 Mbps" (§6.1), which its direct connections reach. */
export const paperLineSeconds = (5 * 2 ** 30 * 8) / 900e6;

const line: PaperNumber = {
  what: 'line time: 5 GB at close to 900 Mb/s',
  value: paperLineSeconds,
  unit: 's',
  where: '§6.1',
  how: 'derived',
};

export const paperNumbers: Record<string, PaperNumber[]> = {
  '1': [
    { what: 'pre-copy and post-copy, eviction at 16 GB', value: 52, unit: 's', where: '§3', how: 'given' },
    { what: 'pre-copy and post-copy, eviction at 12 GB', value: 328, unit: 's', where: '§3', how: 'given' },
    { what: 'growth from 16 to 12 GB', value: 6.3, unit: 'times', where: '§3', how: 'given' },
    line,
  ],
  '9': [
    { what: 'Scatter-Gather, eviction at every size', value: 49, unit: 's', where: '§6.1', how: 'given' },
    { what: 'pre-copy and post-copy, eviction at 12 GB', value: 328, unit: 's', where: '§3', how: 'given' },
    {
      what: 'direct modes to Scatter-Gather, eviction at 12 GB',
      value: 6,
      unit: 'times',
      where: '§6.1',
      how: 'given',
    },
    {
      what: "Scatter-Gather's total time over the direct modes', at most",
      value: 1.1,
      unit: 'times',
      where: '§6.1',
      how: 'given',
    },
    line,
  ],
  '10': [
    {
      what: 'Scatter-Gather, busy guest: "almost identical" to the idle one\'s eviction',
      value: 49,
      unit: 's',
      where: '§6.1',
      how: 'described',
    },
    line,
  ],
  '11': [
    {
      what: 'guests that the destination has room for; up to these all do equally well',
      value: 3,
      unit: 'guests',
      where: '§6.2',
      how: 'given',
    },
    {
      what: 'direct modes: growth of the eviction from 1 to 5 guests (figure 2)',
      value: 400,
      unit: 's',
      where: '§3',
      how: 'given',
    },
  ],
  'table-1': [
    { what: 'no migration, latency', value: 2.71, unit: 'ms', where: 'table 1', how: 'given' },
    { what: 'pre-copy at 256 Mb/s, eviction', value: 160.8, unit: 's', where: 'table 1', how: 'given' },
    { what: 'pre-copy at 256 Mb/s, latency', value: 6, unit: 'ms', where: 'table 1', how: 'given' },
    { what: 'pre-copy unlimited, eviction', value: 109.7, unit: 's', where: 'table 1', how: 'given' },
    { what: 'pre-copy unlimited, latency', value: 18.74, unit: 'ms', where: 'table 1', how: 'given' },
    { what: 'post-copy at 256 Mb/s, eviction', value: 164.3, unit: 's', where: 'table 1', how: 'given' },
    { what: 'post-copy at 256 Mb/s, latency', value: 6.92, unit: 'ms', where: 'table 1', how: 'given' },
    { what: 'post-copy unlimited, eviction', value: 109.3, unit: 's', where: 'table 1', how: 'given' },
    { what: 'post-copy unlimited, latency', value: 18.94, unit: 'ms', where: 'table 1', how: 'given' },
    { what: 'scatter at 256 Mb/s, eviction', value: 49.8, unit: 's', where: 'table 1', how: 'given' },
    { what: 'scatter at 256 Mb/s, latency', value: 5.47, unit: 'ms', where: 'table 1', how: 'given' },
    { what: 'scatter unlimited, eviction', value: 49.2, unit: 's', where: 'table 1', how: 'given' },
    { what: 'scatter unlimited, latency', value: 18.66, unit: 'ms', where: 'table 1', how: 'given' },
  ],
  '12': [
    { what: 'Scatter-Gather, eviction', value: 57, unit: 's', where: '§6.4', how: 'given' },
    {
      what: 'pre-copy, eviction: 6.6 times that',
      value: 57 * 6.6,
      unit: 's',
      where: '§6.4',
      how: 'derived',
    },
    {
      what: 'post-copy and Scatter-Gather, throughput while they migrate',
      value: 300,
      unit: 'ops/s',
      where: '§6.4',
      how: 'given',
    },
    line,
  ],
  '15': [
    {
      what: 'bandwidth that each intermediary adds',
      value: 200,
      unit: 'Mb/s',
      where: '§6.6',
      how: 'given',
    },
  ],
};
