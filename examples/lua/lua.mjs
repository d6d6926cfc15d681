/**
 * A Lua interpreter (npm: wasmoon) as a guest: its coroutines go on where they were. A function of the host that Lua
 * may call stands in the program's table of functions, which has grown for it.
 *
 *     { "run": "code" }     what the code returns
 */
import { LuaFactory } from 'wasmoon';
import { defineGuest } from 'memferry/worker';

async function build() {
  const app = { lua: null, noted: [] };
  app.lua = await new LuaFactory().createEngine({ injectObjects: false });
  // The same functions, in the same order, at every host: Lua knows them by their places in the table.
  app.lua.global.set('note', (text) => void app.noted.push(text));
  return app;
}

export default defineGuest({
  create: build,
  /** The address of Lua's state: all that wasmoon's objects keep. */
  layout: ({ lua }) => [`lua_State at ${lua.global.address}`],
  save: ({ noted }) => ({ noted }),
  adopt: (app, state) => void app.noted.push(...state.noted),
  handle(app, request) {
    if (request === 'noted') return app.noted;
    return app.lua.doStringSync(request.run) ?? null;
  },
});
