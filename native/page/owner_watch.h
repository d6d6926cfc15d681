// Notices at once that the process which owns a region's memory has ended, and soon that it runs another program:
// retires the region, so that whoever uses it stops. While nobody reads the events of its userfaultfd they are dropped
// here, so that its system calls go on; where there are faults among them somebody else may be at it, and is let first for
// a while each time.
//
// Threads: one of its own, which calls `gone`; construct and destroy from any other.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>

#include "os/worker_thread.h"
#include "page/region.h"

namespace memferry {

class OwnerWatch {
 public:
  static constexpr std::chrono::milliseconds kLookEvery{100};  // an exec does not show in poll()
  // `gone` is called at most once, after the region was retired, with what has happened.
  OwnerWatch(const std::shared_ptr<Region>& region, std::function<void(const std::string&)> gone,
             std::chrono::milliseconds look_every = kLookEvery);
  ~OwnerWatch() { thread_.stop(); }
  OwnerWatch(const OwnerWatch&) = delete;
  OwnerWatch& operator=(const OwnerWatch&) = delete;

 private:
  void run(WorkerThread& self);

  const std::weak_ptr<Region> region_;
  const std::shared_ptr<Process> owner_;
  const std::function<void(const std::string&)> gone_;
  const std::chrono::milliseconds look_every_;
  UniqueFd events_;
  WorkerThread thread_;
};

}  // namespace memferry
