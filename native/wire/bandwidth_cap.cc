#include "wire/bandwidth_cap.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace memferry::wire {
namespace {

using Clock = std::chrono::steady_clock;

// What may go at once after a silence: some milliseconds, so that sleeping too long costs nothing.
constexpr double kBurstSeconds = 0.02;
constexpr std::chrono::milliseconds kBehindTheFirst{1};
// Who has not looked for so long is busy with something else: a peer that takes nothing, say.
constexpr std::chrono::milliseconds kAbsent{250};
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
  for (Place place(*this);;) {
    const Turn turn = wait_and_debit(bytes, self, kLongestSleep, place);
    if (turn != Turn::kLater) return turn == Turn::kNow;
  }
}

BandwidthCap::Turn BandwidthCap::wait_and_debit(std::uint64_t bytes, WorkerThread& self, Duration at_most,
                                                Place& place) {
  BandwidthCap& cap = place.of_;
  const auto until = Clock::now() + at_most;
  while (cap.limited_ && !self.stopping()) {
    const Duration delay = cap.try_turn(bytes, place);
    if (delay == Duration::zero()) return Turn::kNow;
    const Duration left = until - Clock::now();
    if (left <= Duration::zero()) return Turn::kLater;
    const auto sleep = std::min({delay, Duration(kLongestSleep), left});
    self.wait(static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(sleep).count()));
  }
  return self.stopping() ? Turn::kStopped : Turn::kNow;
}

Duration BandwidthCap::try_turn(std::uint64_t bytes, Place& place) {
  const std::lock_guard lock(mutex_);
  const auto now = Clock::now();
  place.looked_at_ = now;
  if (!std::exchange(place.waits_, true)) {
    waiting_.push_back(&place);
    place.since_ = now;
  }
  Duration delay = bucket_.delay(now);
  if (now - place.since_ > kPatience) delay -= std::min<Duration>(delay, kUrgentDebt);
  if (delay > Duration::zero()) return delay;
  const auto first =
      std::ranges::find_if(waiting_, [&](const Place* each) { return now - each->looked_at_ < kAbsent; });
  // It is about to wake. But where there is plenty nobody waits for a sleeper: waking costs more than a small frame.
  if (*first != &place && !bucket_.well_filled()) return kBehindTheFirst;
  std::erase(waiting_, &place);
  place.waits_ = false;
  bucket_.debit(bytes, now);
  return Duration::zero();
}

void BandwidthCap::leave(const Place& place) {
  const std::lock_guard lock(mutex_);
  std::erase(waiting_, &place);
}

Duration BandwidthCap::urgent_delay() {
  const Duration all = delay();
  return all - std::min<Duration>(all, kUrgentDebt);
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
