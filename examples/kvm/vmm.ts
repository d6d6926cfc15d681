/** The VMM's addon, typed. */
import { createRequire } from 'node:module';

export interface VmStatus {
  state: 'stands' | 'runs' | 'failed';
  /** How many counts the guest has put out since it was born, and the last one. */
  outputs: number;
  last: number;
  /** Why it runs no more; else empty. */
  failure: string;
}

export interface Vm {
  /** Of the VM: what `kvm-log` reads the dirty log of. */
  readonly fd: number;
  /** KVM's dirty log of slot 0, which is all the RAM. */
  logWrites(on: boolean): void;
  /** A fresh guest. */
  boot(): void;
  /** The state of a guest that stands. */
  save(): Uint8Array;
  /** @throws an Error with the code BAD_STATE: the bytes are no state, or not one that can run here */
  load(state: Uint8Array): void;
  run(): void;
  /** Gives the time (of `process.hrtime.bigint`) at which the vCPU stopped. */
  pause(): Promise<bigint>;
  status(): VmStatus;
  /** Ends the vCPU. Twice is fine. */
  close(): void;
}

interface Addon {
  /** `marks`: a bit for each page that the VMM itself writes; `console`: a descriptor, or -1. */
  Vm: new (
    ram: Uint8Array,
    marks: BigUint64Array | null,
    console: number,
  ) => Vm;
  /** The guest's program, and where in it its parts begin. */
  program: { bytes: Uint8Array; fill: number; scribble: number; store: number; out: number };
}

export const { Vm, program } = createRequire(import.meta.url)('../Release/kvm_example.node') as Addon;
