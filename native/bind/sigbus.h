// A poisoned page raises SIGBUS. Handed to V8's trap handler, a SIGBUS in WebAssembly code becomes a
// RuntimeError that JavaScript can catch, so a lost page ends one guest and not the process.
#pragma once

namespace memferry::bind {

// Process-wide, idempotent, any thread. Throws SystemError (sigaction).
void forward_sigbus_to_webassembly();

}  // namespace memferry::bind
