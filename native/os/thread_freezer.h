// Stops every thread of a process for a moment, by ptrace, while something is done that none of them may disturb.
//
// ptrace, and not SIGSTOP or a frozen cgroup, since whoever is stopped must run again whatever becomes of us: the end
// of a tracer lets its tracees go. Nor does the parent of the process hear of it, as it would of SIGSTOP.
//
// A thread cannot trace its own process. For that a helper is cloned that shares our memory and nothing else (as leak
// checkers do it), which stops all threads but the calling one, and goes when it is done, or with its process.
//
// Not seen are processes that share the address space without being threads (CLONE_VM without CLONE_THREAD; a vfork()
// under way is seen, by the thread that waits for its end): what they write counts as DMA does. Stopped are memferry's own
// threads too: a thread whose system call waits for a page that one of them is to install makes a try fail, which is
// repeated after that one has run for a while.
//
// Where Yama restricts tracing and the process lacks CAP_SYS_PTRACE, it names the helper by PR_SET_PTRACER, and afterwards
// nobody: what the application had named before is lost.
//
// What stopping and going on means for the threads: as with SIGSTOP and SIGCONT, a few blocking calls (epoll_wait,
// semop, ...) give EINTR.
#pragma once

#include <chrono>

namespace memferry {

class ThreadFreezer {
 public:
  // A thread in an uninterruptible call cannot be stopped; the others stand still while we wait for it.
  static constexpr std::chrono::milliseconds kPatience{100};
  static constexpr int kTries = 5;

  // Runs body(argument) on the calling thread, while no other thread of this process runs. It must neither allocate nor
  // take a lock nor throw: another thread may have been stopped in the middle of that. Throws SystemError, and then
  // body has not run: EPERM when tracing is not permitted, or a debugger has a thread; ETIMEDOUT; E2BIG. False: body has
  // run, but somebody has killed the helper, or it took more than a minute, so that others may have run as well.
  static bool run_alone(void (*body)(void*), void* argument);
  // The same while no thread of another process runs. `tasks`: its /proc/PID/task.
  static bool run_while_stopped(int tasks, void (*body)(void*), void* argument);
};

}  // namespace memferry
