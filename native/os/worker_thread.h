// A named thread with one owner. Its body sleeps in poll() on wake_fd() and whatever else it waits for, and
// ends when stopping() is true; stop() (also the destructor) asks it to and joins.
//
// Threads: wake(), request_stop() and stopping() from any; stop() from any but the thread itself, one at
// a time.
#pragma once

#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>

#include "os/unique_fd.h"

namespace memferry {

class WorkerThread {
 public:
  WorkerThread() = default;
  // Starts `body(*this)`. The name is cut to the kernel's 15 characters. Throws SystemError (eventfd) or
  // std::system_error (no more threads).
  WorkerThread(const std::string& name, std::function<void(WorkerThread&)> body);
  ~WorkerThread() { stop(); }
  // The body holds a reference to this object.
  WorkerThread(const WorkerThread&) = delete;
  WorkerThread& operator=(const WorkerThread&) = delete;

  void start(const std::string& name, std::function<void(WorkerThread&)> body);
  [[nodiscard]] bool started() const { return thread_.joinable(); }
  [[nodiscard]] bool on_this_thread() const { return thread_.get_id() == std::this_thread::get_id(); }

  // Makes wake_fd() readable, also if the body is not waiting right now.
  void wake();
  void request_stop();
  void stop();
  [[nodiscard]] bool stopping() const { return stopping_.load(std::memory_order_acquire); }

  // For the body: readable after wake(); drain_wake() makes it unreadable again and never blocks.
  [[nodiscard]] int wake_fd() const { return wake_fd_.get(); }
  void drain_wake();
  // For the body: sleeps until wake() or for at most `timeout_ms` (-1: no bound), then drains. True if woken.
  bool wait(int timeout_ms);

 private:
  UniqueFd wake_fd_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

// Scheduling of the calling thread, as far as it is permitted; false when it is not. Neither is needed for
// correctness.
bool set_this_thread_nice(int nice_value);
// How long it runs at a time where CPUs are contended (Linux 6.12): who asks for less waits for less when it wakes, and
// gets no more in all.
bool set_this_thread_slice(std::chrono::nanoseconds slice);
bool set_this_thread_idle();    // SCHED_IDLE: only when nobody else wants the CPU
bool set_this_thread_normal();  // back to SCHED_OTHER

// How much of its time the calling thread, always the same one, waits for a CPU: behind others, or beyond the quota of its
// control group.
class RunDelay {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kWindow{200};
  // Of the window that ended last, 0 to 1; 0 where the kernel does not tell.
  [[nodiscard]] double share(Clock::time_point now);

 private:
  bool begun_ = false;
  Clock::time_point since_{};
  std::uint64_t delayed_ns_ = 0;
  double share_ = 0;
};

// For the threads of a push on a small host: while `stand_back` they share one CPU and leave the others to whoever
// waits for a page. The threads at both ends are given the same `key` (of the migration), so they meet on the same
// CPU, where handing over to each other is cheap as well. On a host of more CPUs than kSmallHost nothing is done:
// there is room for both. One a thread.
class CpuCourtesy {
 public:
  static constexpr unsigned kSmallHost = 4;
  explicit CpuCourtesy(std::uint64_t key);
  ~CpuCourtesy() { follow(false); }
  CpuCourtesy(const CpuCourtesy&) = delete;
  CpuCourtesy& operator=(const CpuCourtesy&) = delete;
  void follow(bool stand_back);

 private:
  cpu_set_t allowed_{};
  cpu_set_t corner_{};
  bool useful_ = false;
  bool standing_back_ = false;
};

}  // namespace memferry
