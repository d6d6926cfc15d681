// What a host may receive or send in a second, over all connections of a kind. Bytes that had to wait for nobody
// (answers that somebody waits for) are counted all the same.
//
// Threads: any.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "os/worker_thread.h"
#include "wire/pacer.h"

namespace memferry::wire {

class BandwidthCap {
 public:
  explicit BandwidthCap(std::uint64_t bytes_per_second = 0) { set_rate(bytes_per_second); }
  void set_rate(std::uint64_t bytes_per_second);  // 0: no limit
  // Waits until something may go. False when the thread is to stop. The bytes may be more than fits into a second:
  // the next one waits for them.
  bool wait_and_debit(std::uint64_t bytes, WorkerThread& self);
  // How long until something may go; zero: now.
  Duration delay();
  void debit(std::uint64_t bytes);

 private:
  std::atomic<bool> limited_{false};
  std::mutex mutex_;  // guards bucket_
  TokenBucket bucket_;
};

}  // namespace memferry::wire
