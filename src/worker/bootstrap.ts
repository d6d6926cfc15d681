/**
 * The entry of every guest's worker: puts the intercepts in place before any line of the guest runs, then
 * loads it.
 */
import { workerData } from 'node:worker_threads';

import type { BootData } from './messages.js';
import { GuestRuntime } from './runtime.js';
import { interceptWebAssembly } from './wasm-intercept.js';
import { WasmRegistry } from './wasm-registry.js';

const { memferry: boot } = workerData as { memferry: BootData };
const registry = new WasmRegistry(boot.plan?.memoryBytes ?? []);
interceptWebAssembly(registry);
await new GuestRuntime(boot, registry).run();
