// Touching memory that may fail, in any thread: what came of it instead of the end of the process.
#pragma once

#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdint>

namespace memferry {

inline thread_local sigjmp_buf back_from_a_failing_access;

// While one exists, SIGBUS and SIGSEGV in touch() come back to it, in every thread. One at a time.
class FailingAccess {
 public:
  FailingAccess() {
    struct sigaction action {};
    action.sa_handler = [](int signal) { siglongjmp(back_from_a_failing_access, signal); };
    sigemptyset(&action.sa_mask);
    ::sigaction(SIGBUS, &action, &former_bus_);
    ::sigaction(SIGSEGV, &action, &former_segv_);
  }
  ~FailingAccess() {
    ::sigaction(SIGBUS, &former_bus_, nullptr);
    ::sigaction(SIGSEGV, &former_segv_, nullptr);
  }
  FailingAccess(const FailingAccess&) = delete;
  FailingAccess& operator=(const FailingAccess&) = delete;

  // The byte that a load gives, or the negative number of the signal that it raised.
  static int load(const std::byte* address) {
    const int signal = sigsetjmp(back_from_a_failing_access, 1);
    if (signal != 0) return -signal;
    return std::to_integer<int>(*const_cast<const volatile std::byte*>(address));
  }
  // 0, or the negative number of the signal.
  static int store(std::byte* address, std::byte value) {
    const int signal = sigsetjmp(back_from_a_failing_access, 1);
    if (signal != 0) return -signal;
    *const_cast<volatile std::byte*>(address) = value;
    return 0;
  }
  // The byte that a system call reads there, or the negative errno.
  static int read_by_the_kernel(std::byte* address) {
    std::byte value{};
    const iovec local{&value, 1};
    const iovec remote{address, 1};
    if (::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0) != 1) return -errno;
    return std::to_integer<int>(value);
  }

 private:
  struct sigaction former_bus_ {};
  struct sigaction former_segv_ {};
};

}  // namespace memferry
