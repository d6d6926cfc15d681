/** A host of KVM guests for the tests: runs them, takes them, moves them, and looks at every byte of their memory. */
import { openSync } from 'node:fs';
import { KvmGuest } from '../../examples/kvm/build/js/kvm-guest.js';
import { findWrong } from '../../examples/kvm/build/js/oracle.js';
import { listen, stage } from '../../lib/index.js';

const guests = new Map();
const tell = (event, facts = {}) => process.send({ event, ...facts });
const plain = (error) => ({ code: error?.code, message: String(error?.message ?? error) });
const settled = (promise) =>
  promise.then(
    (value) => ({ ok: true, value }),
    (error) => ({ ok: false, error: plain(error) }),
  );
let console_ = -1;
let listening;
let migration;

function found(name) {
  const guest = guests.get(name);
  if (!guest) throw new Error(`no guest '${name}' here`);
  return guest;
}

const operations = {
  /** Both hosts append to the same file: what is there in the end is what the guest has put out, in order. */
  console({ path }) {
    console_ = openSync(path, 'a');
  },
  boot({ guest, ramBytes }) {
    guests.set(guest, KvmGuest.boot(guest, ramBytes, console_));
  },
  status: ({ guest }) => found(guest).vm.status(),
  pause: async ({ guest }) => {
    await found(guest).vm.pause();
    return found(guest).vm.save();
  },
  run: ({ guest }) => found(guest).vm.run(),
  load: ({ guest, state }) => found(guest).vm.load(state),
  /** Stops it, compares every byte, and lets it go on. */
  async check({ guest, goOn = true }) {
    const { vm, ram } = found(guest);
    await vm.pause();
    const wrong = findWrong(vm.save(), ram);
    const status = vm.status();
    if (goOn) vm.run();
    return { wrong, ...status };
  },
  /** As a device would that nobody has told of marking. */
  scribble({ guest, at, value }) {
    found(guest).ram[at] = value;
  },
  peek: ({ guest, at }) => found(guest).ram[at],
  /** A state that is no good must be refused, whatever it is; says what else happened. */
  refuses({ guest, states }) {
    const odd = [];
    for (const state of states) {
      try {
        found(guest).vm.load(state);
        odd.push('taken');
      } catch (error) {
        if (error.code !== 'BAD_STATE') odd.push(String(error));
      }
    }
    return odd;
  },
  end({ guest }) {
    found(guest).close();
    guests.delete(guest);
  },

  async listen({ options = {}, hang = null }) {
    const accept = (offer) => {
      const arriving = KvmGuest.accept(offer, console_, (guest) => guests.set(offer.name, guest));
      return {
        ...arriving,
        async prepare(state) {
          tell('prepare');
          if (hang === 'prepare') await new Promise(() => {});
          await arriving.prepare(state);
        },
        lost(pages) {
          tell('lost');
          arriving.lost(pages);
        },
      };
    };
    listening = await listen({ ...options, accept });
    (async () => {
      for await (const arrival of listening) {
        settled(arrival.resumed).then(({ ok, error }) => tell('resumed', { ok, error }));
        settled(arrival.complete).then(({ ok, error }) => tell('complete', { ok, error }));
      }
    })();
    return listening.port;
  },
  closeListener: () => listening.close(),
  stage: async ({ options }) => (await stage(options)).port,

  migrate({ guest, options, tracker }) {
    const leaving = found(guest);
    if (tracker) Object.assign(leaving.regions[0].tracker, tracker);
    migration = leaving.migrate(options);
    migration.on('state', (state) => tell('state', { state }));
    settled(migration.done).then(({ ok, value, error }) => tell('done', { ok, value, error }));
  },
  /** Everything that it had to tell when it was asked comes before the answer. */
  flush() {},
  switchover: () => migration.switchover(),
  cancel: () => migration.cancel('the test says so'),
};

process.on('unhandledRejection', (error) => tell('failure', { message: String(error?.stack ?? error) }));
process.on('message', async ({ id, op, ...args }) => {
  try {
    process.send({ id, value: await operations[op](args) });
  } catch (error) {
    process.send({ id, error: plain(error) });
  }
});
process.on('disconnect', () => process.exit(3));
tell('ready');
