/**
 * The entry of every guest's worker: puts the intercepts in place before any line of the guest runs, then
 * loads it.
 */
import { workerData } from 'node:worker_threads';

import { interceptHostHandles } from './host-handles.js';
import type { BootData } from './messages.js';
import { ProgramThreads } from './program-threads.js';
import { GuestRuntime } from './runtime.js';
import { interceptWebAssembly } from './wasm-intercept.js';
import { WasmRegistry } from './wasm-registry.js';
import type { WasmMemoryObject } from './webassembly.js';
import { Wrappers } from './wrappers.js';

const { memferry: boot } = workerData as { memferry: BootData };
const registry = new WasmRegistry(boot.plan?.memoryBytes ?? [], boot.sharedMemory as WasmMemoryObject | null);
const wrappers = new Wrappers();
interceptWebAssembly(registry);
wrappers.intercept();
const threads = new ProgramThreads();
threads.intercept();
await new GuestRuntime(boot, registry, wrappers, interceptHostHandles(), threads).run();
