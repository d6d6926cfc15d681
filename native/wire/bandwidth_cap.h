// What a host may receive or send in a second, over all connections of a kind. Answers that somebody waits for go before
// everything else, and wait only while they are kUrgentDebt ahead of the rate: so it is kept whatever is asked for, and an
// answer now and then is not held up. Whoever has waited for kPatience goes with them.
//
// Threads: any.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
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
  // A place among those who wait: where there is little, whoever came first goes first, whatever the scheduler would
  // have, but for one that does not look for a while. Kept while it waits again and again, and given up by the destructor.
  class Place {
   public:
    explicit Place(BandwidthCap& of) : of_(of) {}
    ~Place() {
      if (waits_) of_.leave(*this);
    }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;

   private:
    friend class BandwidthCap;
    BandwidthCap& of_;
    bool waits_ = false;                                 // its thread's own: in the queue
    std::chrono::steady_clock::time_point looked_at_{};  // guarded by mutex_
    std::chrono::steady_clock::time_point since_{};      // likewise: it waits
  };
  // The same for so long at most; kLater: nothing is debited.
  enum class Turn { kNow, kLater, kStopped };
  static Turn wait_and_debit(std::uint64_t bytes, WorkerThread& self, Duration at_most, Place& place);
  // For an answer that somebody waits for: how long until it may go. Debits nothing.
  static constexpr std::chrono::milliseconds kUrgentDebt{250};
  static constexpr std::chrono::milliseconds kPatience{2000};
  Duration urgent_delay();
  // How long until something may go; zero: now.
  Duration delay();
  void debit(std::uint64_t bytes);

 private:
  // How long until it is this one's turn, which it takes where that is now.
  Duration try_turn(std::uint64_t bytes, Place& place);
  void leave(const Place& place);

  std::atomic<bool> limited_{false};
  std::mutex mutex_;  // guards the rest
  TokenBucket bucket_;
  std::deque<const Place*> waiting_;
};

}  // namespace memferry::wire
