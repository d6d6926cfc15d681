// The CPU time of the calling thread: what a piece of work costs, however often it is interrupted.
#pragma once

#include <time.h>

#include <atomic>
#include <cstdint>

namespace memferry {

[[nodiscard]] inline std::uint64_t thread_cpu_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

// Adds what the scope it lives in takes.
class ThreadCpuTimer {
 public:
  explicit ThreadCpuTimer(std::atomic<std::uint64_t>& total_ns)
      : total_ns_(total_ns), began_(thread_cpu_ns()) {}
  ~ThreadCpuTimer() { total_ns_.fetch_add(thread_cpu_ns() - began_, std::memory_order_relaxed); }
  ThreadCpuTimer(const ThreadCpuTimer&) = delete;
  ThreadCpuTimer& operator=(const ThreadCpuTimer&) = delete;

 private:
  std::atomic<std::uint64_t>& total_ns_;
  const std::uint64_t began_;
};

}  // namespace memferry
