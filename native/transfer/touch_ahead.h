// Touching fresh memory ahead of the pages that arrive: a first touch costs more than the copy, and a thread
// of its own can do it while others receive; in huge pages where the system has them.
//
// Only for memory that is wholly overwritten before anyone reads it, and only where the last megabytes were
// dense, at most kAheadBytes in front of the newest arrival: a mostly empty region stays mostly empty.
//
// Threads: one of its own; arrived() from any.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "fault/arrival_map.h"
#include "os/worker_thread.h"

namespace memferry {

class TouchAhead {
 public:
  static constexpr std::uint64_t kAheadBytes = 16ULL << 20;
  static constexpr std::uint64_t kDenseBytes = 4ULL << 20;

  // `maps` outlive it.
  explicit TouchAhead(std::vector<ArrivalMap*> maps);
  ~TouchAhead() { stop(); }

  // Content has arrived in the run.
  void arrived(std::uint32_t region, PageRun run);
  void stop() { thread_.stop(); }

 private:
  struct Front {
    std::atomic<std::uint64_t> cursor{0};   // behind the furthest page that arrived
    std::atomic<std::uint64_t> touched{0};  // touched up to here
  };
  void run(WorkerThread& self);
  bool advance(std::size_t index);  // true when there is more to do at once

  std::vector<ArrivalMap*> maps_;
  std::unique_ptr<Front[]> fronts_;
  std::uint64_t step_bytes_;
  bool huge_;
  std::atomic<bool> asked_{false};
  WorkerThread thread_;
};

}  // namespace memferry
