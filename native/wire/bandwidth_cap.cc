#include "wire/bandwidth_cap.h"

#include <algorithm>
#include <chrono>

namespace memferry::wire {
namespace {

using Clock = std::chrono::steady_clock;

// What may go at once after a silence: some milliseconds, so that sleeping too long costs nothing.
constexpr double kBurstSeconds = 0.02;
// A rate that is set anew is noticed after it.
constexpr std::chrono::milliseconds kLongestSleep{100};

}  // namespace

void BandwidthCap::set_rate(std::uint64_t bytes_per_second) {
  const std::lock_guard lock(mutex_);
  limited_ = bytes_per_second > 0;
  const auto rate = static_cast<double>(bytes_per_second);
  bucket_.set_rate(rate, rate * kBurstSeconds, Clock::now());
}

bool BandwidthCap::wait_and_debit(std::uint64_t bytes, WorkerThread& self) {
  while (limited_ && !self.stopping()) {
    Duration delay{};
    {
      const std::lock_guard lock(mutex_);
      const auto now = Clock::now();
      delay = bucket_.delay(now);
      if (delay == Duration::zero()) {
        bucket_.debit(bytes, now);
        return true;
      }
    }
    const auto sleep = std::min<Duration>(delay, kLongestSleep);
    self.wait(static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(sleep).count()));
  }
  return !self.stopping();
}

Duration BandwidthCap::delay() {
  if (!limited_) return Duration::zero();
  const std::lock_guard lock(mutex_);
  return bucket_.delay(Clock::now());
}

void BandwidthCap::debit(std::uint64_t bytes) {
  if (!limited_) return;
  const std::lock_guard lock(mutex_);
  bucket_.debit(bytes, Clock::now());
}

}  // namespace memferry::wire
