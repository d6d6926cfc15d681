#include "os/thread_freezer.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/futex.h>
#include <linux/ptrace.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <ctime>
#include <thread>

#include "os/mapping.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"

// The helper shares the caller's thread-local storage: it may not even set errno, nor be instrumented. (clang's
// no_sanitize("thread") leaves the atomics to the sanitizer, whose locks a stopped thread may hold.)
#ifdef __has_attribute
#if __has_attribute(disable_sanitizer_instrumentation)
#define MEMFERRY_BARE __attribute__((disable_sanitizer_instrumentation, noinline))
#endif
#endif
#ifndef MEMFERRY_BARE
#define MEMFERRY_BARE __attribute__((no_sanitize("address", "thread", "undefined"), noinline))
#endif

// To ThreadSanitizer's clone() every child is a fork's: it would begin anew what this one shares with us.
#if defined(__SANITIZE_THREAD__)
#define MEMFERRY_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MEMFERRY_TSAN 1
#endif
#endif
#if defined(MEMFERRY_TSAN)
// NOLINTNEXTLINE(bugprone-reserved-identifier): the C library's own name for it
extern "C" int __clone(int (*body)(void*), void* stack, int flags, void* argument, ...) noexcept;
#define MEMFERRY_CLONE ::__clone
#else
#define MEMFERRY_CLONE ::clone
#endif

namespace memferry {

namespace {

#if defined(__x86_64__)
MEMFERRY_BARE long bare_syscall(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0) {
  long result = number;
  register long r10 asm("r10") = d;
  register long r8 asm("r8") = e;
  register long r9 asm("r9") = 0;
  asm volatile("syscall"
               : "+a"(result)
               : "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  return result;
}
#elif defined(__aarch64__)
MEMFERRY_BARE long bare_syscall(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0) {
  register long x8 asm("x8") = number;
  register long x0 asm("x0") = a;
  register long x1 asm("x1") = b;
  register long x2 asm("x2") = c;
  register long x3 asm("x3") = d;
  register long x4 asm("x4") = e;
  asm volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4) : "memory");
  return x0;
}
#else
long bare_syscall(long, long = 0, long = 0, long = 0, long = 0, long = 0) { return -ENOSYS; }
#endif

constexpr int kNotHeld = -1;  // body has run, and others may have run meanwhile

struct Thread {
  std::int32_t id;
  std::int32_t signal;  // that it was about to receive: given back when it goes on
  bool stopped;
};

constexpr std::chrono::milliseconds kPause{5};
constexpr long kNanosecondsPerMs = 1'000'000;
constexpr int kMostPasses = 100;  // each finds threads that were created during the last one
constexpr std::uint32_t kStopped = 1;
constexpr std::uint32_t kDone = 2;
constexpr std::uint32_t kFailed = 3;
constexpr std::uint32_t kLetGo = 4;  // the tracer was there to the end
// Nobody stands still for longer, whatever `body` waits for: afterwards it counts as not held. Of 1 TiB the entries are
// read in some seconds.
constexpr long kLongestStopMs = 60'000;

// Everything that tracer and caller share, in memory that is there beforehand.
struct Freeze {
  int tasks = -1;  // /proc/PID/task
  std::int32_t spared = 0;
  std::int32_t process = 0;  // whose memory a helper shares; 0: the tracer is a thread of ours
  long patience_ms = 0;
  Thread* threads = nullptr;
  std::size_t room = 0;
  std::size_t count = 0;
  std::uint32_t go = 0;     // futex: the tracer may begin
  std::uint32_t state = 0;  // futex
  int error = 0;
};

MEMFERRY_BARE std::uint32_t load(const std::uint32_t* word) {
  return __atomic_load_n(word, __ATOMIC_SEQ_CST);
}
MEMFERRY_BARE void store_and_wake(std::uint32_t* word, std::uint32_t value) {
  __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
  bare_syscall(SYS_futex, reinterpret_cast<long>(word), FUTEX_WAKE, 1);
}
MEMFERRY_BARE void sleep_while(std::uint32_t* word, std::uint32_t value, long nanoseconds) {
  struct {
    long seconds;
    long nanoseconds;
  } timeout = {0, nanoseconds};
  bare_syscall(SYS_futex, reinterpret_cast<long>(word), FUTEX_WAIT, static_cast<long>(value),
               reinterpret_cast<long>(&timeout));
}

MEMFERRY_BARE long now_ms() {
  struct {
    long seconds;
    long nanoseconds;
  } now = {0, 0};
  bare_syscall(SYS_clock_gettime, CLOCK_MONOTONIC, reinterpret_cast<long>(&now));
  return now.seconds * 1000 + now.nanoseconds / kNanosecondsPerMs;
}

// A thread that has ended but was not yet waited for is in the list, and cannot be traced.
MEMFERRY_BARE bool has_ended(int tasks, const char* name) {
  char path[32];
  std::size_t length = 0;
  while (name[length] != 0 && length < 20) {
    path[length] = name[length];
    ++length;
  }
  constexpr char kStat[] = "/stat";
  for (std::size_t i = 0; i < sizeof kStat; ++i) path[length + i] = kStat[i];
  const long fd = bare_syscall(SYS_openat, tasks, reinterpret_cast<long>(path), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return true;
  char text[512];
  const long got = bare_syscall(SYS_read, fd, reinterpret_cast<long>(text), sizeof text);
  bare_syscall(SYS_close, fd);
  long close = -1;  // "123 (name) S ...": the name may hold anything
  for (long i = 0; i < got; ++i) {
    if (text[i] == ')') close = i;
  }
  if (close < 0 || close + 2 >= got) return true;
  const char state = text[close + 2];
  return state == 'Z' || state == 'X' || state == 'x';
}

MEMFERRY_BARE bool known(const Freeze& freeze, std::int32_t id) {
  for (std::size_t i = 0; i < freeze.count; ++i) {
    if (freeze.threads[i].id == id) return true;
  }
  return false;
}

MEMFERRY_BARE int await_stop(Thread& thread, long deadline_ms) {
  for (long turn = 0;; ++turn) {
    int status = 0;
    const long waited =
        bare_syscall(SYS_wait4, thread.id, reinterpret_cast<long>(&status), __WALL | WNOHANG, 0);
    if (waited == -EINTR) continue;
    if (waited < 0 || (waited > 0 && !WIFSTOPPED(status))) {  // it has ended
      thread.id = 0;
      return 0;
    }
    if (waited > 0) {
      thread.stopped = true;
      const bool by_us = (status >> 16) == PTRACE_EVENT_STOP;
      thread.signal = by_us ? 0 : WSTOPSIG(status);
      return 0;
    }
    if (now_ms() > deadline_ms) return ETIMEDOUT;
    if (turn < 50) {
      bare_syscall(SYS_sched_yield);
    } else {
      struct {
        long seconds;
        long nanoseconds;
      } nap = {0, 50'000};
      bare_syscall(SYS_nanosleep, reinterpret_cast<long>(&nap));
    }
  }
}

// One look at the list of threads: stops those that are new, and gives how many there were, or -errno.
MEMFERRY_BARE int stop_new_threads(Freeze& freeze, long deadline_ms) {
  const std::size_t first = freeze.count;
  alignas(8) char buffer[4096];
  bare_syscall(SYS_lseek, freeze.tasks, 0, SEEK_SET);
  for (;;) {
    const long got =
        bare_syscall(SYS_getdents64, freeze.tasks, reinterpret_cast<long>(buffer), sizeof buffer);
    if (got < 0) return static_cast<int>(got);
    if (got == 0) break;
    for (long at = 0; at < got;) {
      // struct linux_dirent64: inode and offset of 8 bytes, length of 2, type of 1, name.
      const auto length = *reinterpret_cast<const std::uint16_t*>(buffer + at + 16);
      const char* const name = buffer + at + 19;
      at += length;
      std::int32_t id = 0;
      for (const char* digit = name; *digit >= '0' && *digit <= '9'; ++digit) id = id * 10 + (*digit - '0');
      if (id == 0 || id == freeze.spared || known(freeze, id)) continue;
      if (freeze.count == freeze.room) return -E2BIG;
      const long seized = bare_syscall(SYS_ptrace, PTRACE_SEIZE, id, 0, 0);
      if (seized == -ESRCH) continue;
      if (seized == -EPERM && has_ended(freeze.tasks, name)) continue;
      if (seized < 0) return static_cast<int>(seized);
      freeze.threads[freeze.count++] = {id, 0, false};
      bare_syscall(SYS_ptrace, PTRACE_INTERRUPT, id, 0, 0);
    }
  }
  for (std::size_t i = first; i < freeze.count; ++i) {
    if (const int error = await_stop(freeze.threads[i], deadline_ms)) return -error;
  }
  return static_cast<int>(freeze.count - first);
}

// Only a running thread creates another: a look that finds none that runs is the last.
MEMFERRY_BARE int stop_all(Freeze& freeze) {
  const long deadline_ms = now_ms() + freeze.patience_ms;
  for (int pass = 0; pass < kMostPasses; ++pass) {
    const int found = stop_new_threads(freeze, deadline_ms);
    if (found < 0) return -found;
    // Of another process there must have been one; it has ended.
    if (found == 0) return freeze.count == 0 && freeze.spared == 0 ? ESRCH : 0;
  }
  return EAGAIN;
}

MEMFERRY_BARE void let_all_go(Freeze& freeze) {
  for (std::size_t i = 0; i < freeze.count; ++i) {
    const Thread& thread = freeze.threads[i];
    if (thread.id != 0 && thread.stopped)
      bare_syscall(SYS_ptrace, PTRACE_DETACH, thread.id, 0, thread.signal);
  }
}

// A helper goes with its process, which cannot end while its threads have a tracer that does not wait for them, and
// whose memory and descriptors it would keep.
MEMFERRY_BARE bool orphaned(const Freeze& freeze) {
  return freeze.process != 0 && bare_syscall(SYS_getppid) != freeze.process;
}

// The tracer: a process or thread that ends afterwards, whatever happened, which lets go of what is left.
MEMFERRY_BARE int trace(void* argument) {
  Freeze& freeze = *static_cast<Freeze*>(argument);
  // The signal comes when the calling thread ends, which otherwise waits for this one. Whoever has ended before it was
  // asked for is not the parent any more.
  if (freeze.process != 0) bare_syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL);
  while (load(&freeze.go) == 0) {
    if (orphaned(freeze)) return 0;
    sleep_while(&freeze.go, 0, 10 * kNanosecondsPerMs);
  }
  freeze.error = stop_all(freeze);
  if (freeze.error == 0) {
    const long deadline_ms = now_ms() + kLongestStopMs;
    store_and_wake(&freeze.state, kStopped);
    while (load(&freeze.state) == kStopped && !orphaned(freeze) && now_ms() < deadline_ms)
      sleep_while(&freeze.state, kStopped, 100 * kNanosecondsPerMs);
    // Only if body was over by then: it is still kStopped, and then kDone, where it was not.
    std::uint32_t done = kDone;
    __atomic_compare_exchange_n(&freeze.state, &done, kLetGo, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    let_all_go(freeze);
  } else {
    let_all_go(freeze);
    store_and_wake(&freeze.state, kFailed);
  }
  return 0;
}

// Threads now, with room for some more.
std::size_t room_for(int tasks) {
  constexpr std::size_t kMostThreads = 1UL << 16;
  constexpr std::size_t kSpare = 64;
  std::size_t count = 0;
  alignas(8) char buffer[4096];
  (void)::lseek(tasks, 0, SEEK_SET);
  for (long got = 0; (got = ::syscall(SYS_getdents64, tasks, buffer, sizeof buffer)) > 0;) {
    for (long at = 0; at < got; ++count) at += *reinterpret_cast<const std::uint16_t*>(buffer + at + 16);
  }
  return std::min(kMostThreads, count * 2 + kSpare);
}

// Signals wait until the helper is gone: no handler of the caller's may run while the others stand still.
class AllSignalsBlocked {
 public:
  AllSignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &former_);
  }
  ~AllSignalsBlocked() { pthread_sigmask(SIG_SETMASK, &former_, nullptr); }
  AllSignalsBlocked(const AllSignalsBlocked&) = delete;
  AllSignalsBlocked& operator=(const AllSignalsBlocked&) = delete;

 private:
  sigset_t former_{};
};

// Where Yama lets only ancestors trace, a process may name one more (PR_SET_PTRACER).
bool yama_restricts() {
  const UniqueFd fd(::open("/proc/sys/kernel/yama/ptrace_scope", O_RDONLY | O_CLOEXEC));
  char scope = '0';
  if (!fd || ::read(fd.get(), &scope, 1) != 1 || scope != '1') return false;
  // Nor does it ask those who may trace everybody. What the process has named before cannot be read, and so not be given
  // back.
  __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct data[2] = {};
  return ::syscall(SYS_capget, &header, data) != 0 || (data[0].effective & (1U << CAP_SYS_PTRACE)) == 0;
}

// Memory with a page that nobody may touch at both ends. Not for overruns: joined with a neighbour, it would make all of
// that one soft-dirty (see SoftDirtyTracker).
class LoneMemory {
 public:
  explicit LoneMemory(std::size_t bytes)
      : page_(system_page_size()),
        bytes_((bytes + page_ - 1) / page_ * page_),
        mapping_(Mapping::anonymous(bytes_ + 2 * page_, PROT_NONE)) {
    if (::mprotect(data(), bytes_, PROT_READ | PROT_WRITE) != 0) throw_errno("mprotect");
  }
  [[nodiscard]] std::byte* data() const { return mapping_.data() + page_; }
  [[nodiscard]] std::byte* end() const { return data() + bytes_; }

 private:
  std::uint64_t page_;
  std::uint64_t bytes_;
  Mapping mapping_;
};

int alone_once(Freeze& freeze, void (*body)(void*), void* argument) {
  constexpr std::size_t kStackBytes = 64UL * 1024;
  const LoneMemory stack(kStackBytes);
  const bool restricted = yama_restricts();
  const AllSignalsBlocked quiet;
  freeze.process = ::getpid();
  // No signal at its end, so that nobody who waits for children of this process meets it.
  const int helper =
      MEMFERRY_CLONE(&trace, stack.end(), CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_UNTRACED, &freeze);
  if (helper < 0) return errno;
  if (restricted) ::prctl(PR_SET_PTRACER, helper, 0, 0, 0);
  store_and_wake(&freeze.go, 1);
  bool gone = false;
  while (!gone && load(&freeze.state) == 0) {
    sleep_while(&freeze.state, 0, 10 * kNanosecondsPerMs);
    // Killed by somebody: then nobody is stopped any more.
    gone = load(&freeze.state) == 0 && bare_syscall(SYS_wait4, helper, 0, __WCLONE | WNOHANG, 0) == helper;
  }
  const bool stopped = !gone && load(&freeze.state) == kStopped;
  if (stopped) {
    body(argument);
    store_and_wake(&freeze.state, kDone);
  }
  if (!gone) {
    while (bare_syscall(SYS_wait4, helper, 0, __WCLONE, 0) == -EINTR) {
    }
  }
  if (restricted) ::prctl(PR_SET_PTRACER, 0, 0, 0, 0);
  if (stopped) return load(&freeze.state) == kLetGo ? 0 : kNotHeld;
  return gone ? ECHILD : freeze.error;
}

int stopped_once(Freeze& freeze, void (*body)(void*), void* argument) {
  freeze.go = 1;
  std::thread tracer([&] { trace(&freeze); });
  while (load(&freeze.state) == 0) sleep_while(&freeze.state, 0, 100 * kNanosecondsPerMs);
  const bool stopped = load(&freeze.state) == kStopped;
  if (stopped) {
    body(argument);
    store_and_wake(&freeze.state, kDone);
  }
  tracer.join();
  if (stopped) return load(&freeze.state) == kLetGo ? 0 : kNotHeld;
  return freeze.error;
}

bool try_often(int tasks, std::int32_t spared, void (*body)(void*), void* argument,
               int (*once)(Freeze&, void (*)(void*), void*)) {
  int error = 0;
  for (int i = 0; i < ThreadFreezer::kTries; ++i) {
    const std::size_t room = room_for(tasks);
    const LoneMemory threads(room * sizeof(Thread));
    Freeze freeze;
    freeze.tasks = tasks;
    freeze.spared = spared;
    freeze.patience_ms = ThreadFreezer::kPatience.count();
    freeze.threads = reinterpret_cast<Thread*>(threads.data());
    freeze.room = room;
    error = once(freeze, body, argument);
    if (error == 0) return true;
    if (error == kNotHeld) return false;
    // EPERM: not permitted, or somebody else has them stopped just now, for a moment as we do.
    if (error != ETIMEDOUT && error != EAGAIN && error != E2BIG && error != EPERM) break;
    std::this_thread::sleep_for(error == EPERM ? kPause : ThreadFreezer::kPatience / 2);
  }
  throw SystemError("stopping the threads by ptrace", error);
}

}  // namespace

bool ThreadFreezer::run_alone(void (*body)(void*), void* argument) {
  const auto self = static_cast<std::int32_t>(::syscall(SYS_gettid));
  const UniqueFd tasks(::open("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!tasks) throw_errno("open(/proc/self/task)");
  return try_often(tasks.get(), self, body, argument, &alone_once);
}

bool ThreadFreezer::run_while_stopped(int tasks, void (*body)(void*), void* argument) {
  return try_often(tasks, 0, body, argument, &stopped_once);
}

}  // namespace memferry
