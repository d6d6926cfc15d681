#include "bind/sigbus.h"

#include <csignal>
#include <mutex>

#include "os/sys_error.h"

namespace memferry::bind {

namespace {

// Written once, before the handler that reads it is installed.
struct sigaction former_sigbus;

using Handler = void (*)(int, siginfo_t*, void*);

// Does what the former disposition would have done with this signal.
void chain_to_former(int signal, siginfo_t* info, void* context) {
  if ((former_sigbus.sa_flags & SA_SIGINFO) != 0) {
    former_sigbus.sa_sigaction(signal, info, context);
  } else if (former_sigbus.sa_handler != SIG_DFL && former_sigbus.sa_handler != SIG_IGN) {
    former_sigbus.sa_handler(signal);
  } else {
    // The access happens again when we return, and then ends the process. (A fault cannot be ignored.)
    struct sigaction fatal {};
    fatal.sa_handler = SIG_DFL;
    ::sigaction(signal, &fatal, nullptr);
    // One that was sent, not caused, does not happen again by itself.
    if (info->si_code <= 0) ::raise(signal);
  }
}

// V8's handler is whatever handles SIGSEGV: Node installs it at its start, and there is no way to ask. It
// looks at the faulting instruction alone: in WebAssembly code it moves on to the trap's landing pad and
// returns; elsewhere Node's handler ends the process by SIGSEGV, which is as good an end as SIGBUS.
void on_sigbus(int signal, siginfo_t* info, void* context) {
  struct sigaction segv {};
  const bool caused = info->si_code > 0;
  if (caused && ::sigaction(SIGSEGV, nullptr, &segv) == 0 && (segv.sa_flags & SA_SIGINFO) != 0 &&
      segv.sa_sigaction != nullptr) {
    segv.sa_sigaction(SIGSEGV, info, context);
    return;
  }
  chain_to_former(signal, info, context);
}

}  // namespace

void forward_sigbus_to_webassembly() {
  static std::mutex mutex;  // guards `installed` and the installing
  static bool installed = false;
  const std::lock_guard lock(mutex);
  if (installed) return;
  if (::sigaction(SIGBUS, nullptr, &former_sigbus) != 0) throw_errno("sigaction");
  struct sigaction forward {};
  forward.sa_sigaction = &on_sigbus;
  forward.sa_flags = SA_SIGINFO | SA_ONSTACK;
  ::sigemptyset(&forward.sa_mask);
  if (::sigaction(SIGBUS, &forward, nullptr) != 0) throw_errno("sigaction");
  installed = true;
}

}  // namespace memferry::bind
