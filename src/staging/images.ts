/**
 * The images of one server: who may make one, which are there, and for a while what became of those that are gone.
 * Owned by one server; JavaScript thread.
 */
import { checkAddressPolicy } from '../control/address.js';
import { MemferryError, native } from '../errors.js';
import type { NativeHeldState, NativeStage } from '../native.js';
import type { DissolveCause } from '../protocol/image-claims.js';
import { Tombstones } from '../protocol/commit-tombstones.js';
import type { CreateImage, StageStatus } from '../protocol/stage-messages.js';
import { warn } from '../tell-listeners.js';
import { StagedImage } from './image.js';

/** Images that are gone and still known by name: enough to say why, bounded. */
const maxRemembered = 1024;

export interface StagedImagesConfig {
  stage: NativeStage;
  pageSize: number;
  maxImages: number;
  claimLeaseMs: number;
  grantTimeoutMs: number;
  parkTtlMs: number | null;
  plaintext: boolean;
}

const whatBecame: Record<DissolveCause, string> = {
  dissolve: 'was dissolved by its owner',
  drop: 'was dropped by an operator',
  lease: 'was left by its source before the commit',
  ttl: 'was parked for longer than this server keeps it',
  abandoned: 'was not parked: its guest stayed at the source',
};

export class StagedImages {
  /** Outcomes of parks: a late GRANT or QUERY is answered by what was decided. */
  readonly tombstones = new Tombstones();
  readonly #images = new Map<string, StagedImage>();
  readonly #gone = new Map<string, DissolveCause>();
  readonly #givingBack = new Map<string, Promise<void>>();

  #closed = false;

  constructor(private readonly config: StagedImagesConfig) {}

  /** Of the server's memory: for the hints of deduplication, and to know it again at another address. */
  get identity(): string {
    return native(() => this.config.stage.identity());
  }

  get size(): number {
    return this.#images.size;
  }

  /** Throws VMD_CAPACITY, VMD_REFUSED, PROTOCOL_ERROR, PLAINTEXT_REQUIRED; then nothing has happened. */
  create(create: CreateImage, secret: Uint8Array, domainKey: Uint8Array | null = null): StagedImage {
    const { maxImages, stage } = this.config;
    if (this.#closed) throw new MemferryError('CANCELLED', 'the VMD server was closed');
    const id = create.image;
    if (this.#images.has(id) || this.#gone.has(id) || this.tombstones.has(id)) {
      throw new MemferryError('VMD_REFUSED', 'an image with this id is, or was, here already', {
        facts: { reason: 'exists' },
      });
    }
    this.#check(create);
    if (this.#images.size >= maxImages) {
      throw new MemferryError('VMD_CAPACITY', `no more than ${maxImages} images at a time`, {
        facts: { limit: maxImages },
      });
    }
    const bytes = Buffer.from(id, 'hex');
    const capacities = create.regions.map(({ capacityPages }) => capacityPages);
    if (!native(() => stage.createImage(bytes, capacities, create.ordinal, domainKey))) {
      const { freeBytes } = stage.stats();
      const text = `the index of ${capacities.reduce((sum, pages) => sum + pages, 0)} pages finds no room; ${freeBytes} bytes are free`;
      throw new MemferryError('VMD_CAPACITY', text, { facts: { free: freeBytes } });
    }
    try {
      const image = new StagedImage({
        ...this.config,
        create,
        secret,
        decided: (state) => this.tombstones.record(id, state),
        gone: (cause, givenBack, untouched) => this.#forget(id, untouched ? null : cause, givenBack),
      });
      this.#images.set(id, image);
      return image;
    } catch (error) {
      this.#awaitMemory(
        id,
        native(() => stage.drop(bytes)),
      );
      throw error;
    }
  }

  /** Throws VMD_LOST, saying what is known of it. */
  get(id: string): StagedImage {
    const image = this.#images.get(id);
    if (image) return image;
    const cause = this.#gone.get(id);
    throw new MemferryError(
      'VMD_LOST',
      cause
        ? `the image ${whatBecame[cause]}`
        : 'the image is not here: this server was restarted, or never had it',
      { facts: { reason: cause ?? 'unknown' } },
    );
  }

  find(id: string): StagedImage | null {
    return this.#images.get(id) ?? null;
  }

  /** Memory for an execution state on its way here; null: there is none. */
  makeState(bytes: number): NativeHeldState | null {
    return native(() => this.config.stage.makeState(bytes));
  }

  drop(id: string): boolean {
    return this.#images.get(id)?.request({ type: 'drop' }).type === 'dropped';
  }

  status(): StageStatus['held'] {
    const nowMs = performance.now();
    return [...this.#images.values()].map((image) => {
      const { name, kind, phase, ordinal, servers, regions, epoch } = image.info;
      const stats = image.stats() ?? nothing;
      const { pagesHeld, pagesShared, pagesZero, pagesKnown, bytes, bytesIn, bytesOut, sealed } = stats;
      return {
        id: image.id,
        name,
        kind,
        phase,
        ordinal,
        servers: servers.length,
        epoch,
        pages: regions.reduce((sum, region) => sum + region.pages, 0),
        pagesHeld,
        pagesShared,
        pagesZero,
        pagesKnown,
        bytes,
        bytesIn,
        bytesOut,
        sealed,
        ageMs: Math.max(0, nowMs - image.createdMs),
      };
    });
  }

  /** Clients are still there, and what they ask for is answered; but no image is made, and no timer runs. */
  close(): void {
    this.#closed = true;
    for (const image of [...this.#images.values()]) image.close();
  }

  /** What no schema can say. */
  #check(create: CreateImage): void {
    const { pageSize, plaintext } = this.config;
    if (create.ordinal >= create.servers.length) {
      throw new MemferryError('PROTOCOL_ERROR', 'this server is not on the list that it was given');
    }
    if (create.pageSize !== pageSize) {
      throw new MemferryError(
        'LIMIT_EXCEEDED',
        `pages of ${create.pageSize} bytes; here they have ${pageSize}`,
      );
    }
    for (const { name, pages, capacityPages } of create.regions) {
      if (pages > capacityPages) {
        throw new MemferryError('PROTOCOL_ERROR', `region '${name}' is longer than its capacity`);
      }
    }
    if (create.replicas === 1) return;
    // A peer chooses where replicas go, but not that they go over an open network.
    for (const [ordinal, { host }] of create.servers.entries()) {
      if (ordinal !== create.ordinal) checkAddressPolicy(host, { plaintext });
    }
  }

  /** The memory of an image that is gone, or of all of them, is there again. Never rejects. */
  async givenBack(id?: string): Promise<void> {
    await (id === undefined ? Promise.all(this.#givingBack.values()) : this.#givingBack.get(id));
  }

  #awaitMemory(id: string, givenBack: Promise<void> | null): void {
    const over = Promise.resolve(givenBack)
      .catch((error) => warn('the memory of an image was not given back', error, 'MEMFERRY_STAGE_DROP'))
      .then(() => void this.#givingBack.delete(id));
    this.#givingBack.set(id, over);
  }

  /** `cause`: null where nothing needs to be remembered, and the id may be used again. */
  #forget(id: string, cause: DissolveCause | null, givenBack: Promise<void> | null): void {
    this.#awaitMemory(id, givenBack);
    this.#images.delete(id);
    if (cause === null) return;
    this.#gone.set(id, cause);
    if (this.#gone.size <= maxRemembered) return;
    const oldest = this.#gone.keys().next();
    if (!oldest.done) this.#gone.delete(oldest.value);
  }
}

const nothing = {
  pagesHeld: 0,
  pagesShared: 0,
  pagesZero: 0,
  pagesKnown: 0,
  bytes: 0,
  bytesIn: 0,
  bytesOut: 0,
  sealed: false,
};
