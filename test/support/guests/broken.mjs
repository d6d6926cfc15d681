/** A guest that fails where `data.at` says. */
import { defineGuest } from 'memferry/worker';

export default defineGuest({
  create(context) {
    if (context.data.at === 'create') throw new Error('no creation today');
    if (context.data.at === 'hang') return new Promise(() => {});
    return {};
  },
  receive(context) {
    if (context.data.at === 'receive') throw new Error('no reception today');
    if (context.data.at === 'receive-hangs') return new Promise(() => setInterval(() => {}, 1000));
    if (context.data.at === 'receive-builds-more') new WebAssembly.Memory({ initial: 1 });
    return {};
  },
  save() {
    return {};
  },
  adopt(_app, _state, context) {
    if (context.data.at === 'adopt') throw new Error('no adoption today');
    if (context.data.at === 'adopt-hangs') return new Promise(() => setInterval(() => {}, 1000));
    return undefined;
  },
  handle: () => 'alive',
});
