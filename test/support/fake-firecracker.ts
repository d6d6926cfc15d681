/**
 * A Firecracker by its API: HTTP at a unix socket, and a process that plays the microVM. Its snapshot file holds the
 * flags and the orders of that process, as JSON.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { FakeMicroVm } from './micro-vm.js';

export interface FakeState {
  flags: (string | number)[];
  /** Told to it once it runs: what it had written before. */
  expect: string[];
}

export class FakeFirecracker {
  readonly #server: Server;
  microVm: FakeMicroVm | null = null;
  running = false;
  /** Everything it was told, in order. */
  readonly calls: string[] = [];
  refuseLoad = false;
  /** That it is to run at once is an error but where a test says so: who waits for a grant must not ask for it. */
  mayResumeOnLoad = false;

  constructor(
    readonly socketPath: string,
    readonly state: FakeState = { flags: [], expect: [] },
  ) {
    this.#server = createServer((request, response) => {
      this.#answer(request, response).catch((error) => {
        response.writeHead(400).end(JSON.stringify({ fault_message: String((error as Error).message) }));
      });
    });
  }

  async listen(): Promise<this> {
    await new Promise<void>((resolve) => this.#server.listen(this.socketPath, resolve));
    return this;
  }

  close(): void {
    this.microVm?.kill();
    this.#server.closeAllConnections();
    this.#server.close();
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const parts: Buffer[] = [];
    for await (const part of request) parts.push(part as Buffer);
    const body = JSON.parse(Buffer.concat(parts).toString()) as Record<string, string>;
    const what = `${request.method} ${request.url}`;
    this.calls.push(body['state'] ? `${what} ${body['state']}` : what);
    switch (what) {
      case 'PUT /snapshot/load': {
        if (this.refuseLoad) throw new Error('Load snapshot error: the state is not what it should be');
        const backend = body['mem_backend'] as unknown as { backend_type: string; backend_path: string };
        const resume = body['resume_vm'] as unknown as boolean;
        if (backend.backend_type !== 'Uffd') throw new Error('its memory comes from a handler');
        if (resume !== false && !this.mayResumeOnLoad) throw new Error('load it paused');
        const { flags, expect } = JSON.parse(
          readFileSync(body['snapshot_path'] as string, 'utf8'),
        ) as FakeState;
        this.microVm = new FakeMicroVm(['--socket', backend.backend_path, ...flags]);
        if ((await this.microVm.answer()).loaded !== true) throw new Error('what it loaded is wrong');
        for (const line of expect) await this.microVm.obey(line);
        this.running = resume;
        break;
      }
      case 'PATCH /vm':
        if (!this.microVm) throw new Error('there is no microVM');
        this.running = body['state'] === 'Resumed';
        break;
      case 'PUT /snapshot/create':
        if (this.running) throw new Error('pause it first');
        writeFileSync(body['snapshot_path'] as string, JSON.stringify(this.state));
        break;
      default:
        throw new Error(`no ${what}`);
    }
    response.writeHead(204).end();
  }
}
