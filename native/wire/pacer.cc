#include "wire/pacer.h"

// The kernel's own header: the C library's struct tcp_info ends before bytes_acked.
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>

namespace memferry::wire {
namespace {

constexpr double kLimitBurstSeconds = 0.02;
constexpr double kLinkBurstBytes = 32 * 1024;
// What a thread that woke late may catch up with: the link was idle meanwhile.
constexpr double kLinkBurstSeconds = 0.001;
// While faults are being answered: little enough that a fault waits for one chunk at most a moment. On a link
// it waits for the chunk's bytes, on one host for the time that copying it takes.
constexpr std::uint64_t kChunkOnHost = 128 * 1024;
constexpr int kUnsentOnLink = 256 * 1024;
// Of the last interval in the smoothed delivered rate: one interval is a few hundred acknowledgements at best.
constexpr double kNewShare = 0.25;
constexpr double kSteadyShare = 0.05;

double seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }
Duration from_seconds(double value) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(value));
}

std::int64_t nanoseconds(TimePoint at) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(at.time_since_epoch()).count();
}

}  // namespace

void TokenBucket::set_rate(double bytes_per_second, double burst_bytes, TimePoint now) {
  refill(now);
  rate_ = bytes_per_second;
  burst_ = burst_bytes;
  credit_ = std::min(credit_, burst_);
  last_ = now;
}

void TokenBucket::refill(TimePoint now) {
  if (rate_ > 0 && now > last_) credit_ = std::min(burst_, credit_ + rate_ * seconds(now - last_));
  last_ = std::max(last_, now);
}

void TokenBucket::debit(std::uint64_t bytes, TimePoint now) {
  if (!limited()) return;
  refill(now);
  credit_ -= static_cast<double>(bytes);
}

Duration TokenBucket::delay(TimePoint now) {
  if (!limited()) return Duration::zero();
  refill(now);
  // Rounded up, or a waiter would wake with an instant left to wait.
  return credit_ >= 0 ? Duration::zero() : from_seconds(-credit_ / rate_) + Duration{1};
}

Duration RateController::beyond_round_trip(std::uint64_t bytes, const Sample& sample, double rate) {
  if (rate <= 0) return Duration::zero();
  const double beyond =
      static_cast<double>(bytes) - static_cast<double>(sample.fresh_bytes) - rate * seconds(sample.min_rtt);
  return beyond > 0 ? from_seconds(beyond / rate) : Duration::zero();
}

void RateController::sample(const Sample& sample) {
  if (!last_ || sample.at <= last_->at || sample.delivered_bytes < last_->delivered_bytes) {
    last_ = sample;
    return;
  }
  const double interval = seconds(sample.at - last_->at);
  const double rate = static_cast<double>(sample.delivered_bytes - last_->delivered_bytes) / interval;
  last_ = sample;
  newest_rate_ = rate;
  steady_rate_ = steady_rate_ > 0 ? kSteadyShare * rate + (1 - kSteadyShare) * steady_rate_ : rate;
  // What was handed over still drains, or did for a part of the interval.
  if (limiting() && sample.at < drained_at_) return;
  if (limiting() && skip_next_) {
    skip_next_ = false;
    return;
  }
  const Duration queue =
      limiting() ? beyond_round_trip(sample.queued_bytes, sample, rate_) : Duration::zero();
  if (queue > kQueue) {
    without_queue_ = 0;
    drained_at_ = sample.at + std::min<Duration>(queue, kInterval);
    skip_next_ = true;
    if (!queue_since_) queue_since_ = sample.at;
    if (rate < kStall * rate_ && sample.at - *queue_since_ < kLongestStall) return;
  }
  delivered_rate_ = delivered_rate_ > 0 ? kNewShare * rate + (1 - kNewShare) * delivered_rate_ : rate;
  if (!limiting()) {
    full_intervals_ = saturated() ? full_intervals_ + 1 : 0;
    return;
  }
  if (queue > kQueue) {
    // The average is still behind a rate that was growing fast.
    if (probing_) delivered_rate_ = std::max(delivered_rate_, newest_rate_);
    probing_ = false;
    known_rate_ = kFall * std::max(known_rate_, steady_rate_);
    const double fallen = std::max(kFall * std::min(delivered_rate_, rate_), kDeepestFall * rate_);
    if (fallen < lowest_) lowest_ *= kForget;
    rate_ = std::max(fallen, lowest_);
  } else {
    queue_since_.reset();
    known_rate_ = std::max(known_rate_, steady_rate_);
    const int multiple = 1 + without_queue_ / kPatience;
    const double growth = probing_                       ? kProbe
                          : rate_ < kKnown * known_rate_ ? kRegain
                                                         : std::min(kFastestGrowth, kGrowth * multiple);
    rate_ = std::min(rate_ * (1 + growth), std::max(rate_, kHighest * known_rate_));
    ++without_queue_;
  }
}

bool RateController::saturated() const {
  return last_ &&
         beyond_round_trip(last_->queued_bytes + last_->unsent_bytes, *last_, delivered_rate_) > kQueue;
}

void RateController::start(TimePoint now) {
  if (limiting() || delivered_rate_ <= 0) return;
  without_queue_ = 0;
  queue_since_.reset();
  // Before it was full the link delivered less than it can.
  if (saturated()) delivered_rate_ = std::max(delivered_rate_, newest_rate_);
  rate_ = kFall * delivered_rate_;
  known_rate_ = steady_rate_ = delivered_rate_;
  probing_ = full_intervals_ < kFull;
  full_intervals_ = 0;
  lowest_ = kLowest * rate_;
  // A full push has filled every queue on the way, the sockets' own included: pushing on before they are
  // empty would look like a rate that is too high, and end far below the link's.
  drained_at_ =
      now + std::min<Duration>(beyond_round_trip(last_->queued_bytes + last_->unsent_bytes, *last_, rate_),
                               kLongestDrain);
  skip_next_ = true;
}

void Pacer::attach(std::vector<int> data_fds, bool same_host, std::vector<int> other_fds) {
  const std::lock_guard lock(mutex_);
  data_fds_ = std::move(data_fds);
  other_fds_ = std::move(other_fds);
  same_host_ = same_host;
  controller_ = RateController();
  link_ = TokenBucket();
  // All that is in a socket goes out before the first fault's answer can have the link for itself. Without
  // this bound TCP would hold megabytes. Best effort: nothing but latency depends on it.
  if (same_host_) return;
  for (const int fd : data_fds_) {
    ::setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &kUnsentOnLink, sizeof kUnsentOnLink);
  }
}

void Pacer::set_bandwidth(std::uint64_t bytes_per_second) {
  const std::lock_guard lock(mutex_);
  bandwidth_ = bytes_per_second;
  const auto rate = static_cast<double>(bytes_per_second);
  limit_.set_rate(rate, rate * kLimitBurstSeconds, std::chrono::steady_clock::now());
  changed_.notify_all();
}

std::uint64_t Pacer::limited_chunk_bytes(std::uint64_t largest) const {
  const std::uint64_t bandwidth = bandwidth_;
  return bandwidth > 0 ? std::min(largest, bandwidth / 100) : largest;
}

std::uint64_t Pacer::chunk_bytes(std::uint64_t largest) const {
  largest = limited_chunk_bytes(largest);
  if (!faults_recent(std::chrono::steady_clock::now())) return largest;
  return std::min(largest, same_host_ ? kChunkOnHost : chunk_on_link_);
}

bool Pacer::should_stand_back() const {
  return same_host_ && faults_recent(std::chrono::steady_clock::now());
}

bool Pacer::faults_recent(TimePoint now) const {
  const std::int64_t last = last_fault_ns_.load(std::memory_order_relaxed);
  return last != 0 && nanoseconds(now) - last < std::chrono::nanoseconds(kFaultsAreRecent).count();
}

void Pacer::take_sample(TimePoint now) {
  RateController::Sample sample;
  sample.at = now;
  sample.delivered_bytes = fault_bytes_.load(std::memory_order_relaxed);
  sample.fresh_bytes = data_fds_.size() * chunk_on_link_;
  std::uint32_t min_rtt_us = UINT32_MAX;
  for (const int fd : data_fds_) {
    tcp_info info{};
    socklen_t bytes = sizeof info;
    int unacknowledged = 0;
    int unsent = 0;
    if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0) continue;
    if (::ioctl(fd, SIOCOUTQ, &unacknowledged) != 0 || ::ioctl(fd, SIOCOUTQNSD, &unsent) != 0) continue;
    sample.delivered_bytes += info.tcpi_bytes_acked;
    // What TCP itself holds back (its window, its pacing) is in nobody's way.
    sample.queued_bytes += static_cast<std::uint64_t>(std::max(unacknowledged - unsent, 0));
    sample.unsent_bytes += static_cast<std::uint64_t>(std::max(unsent, 0));
    min_rtt_us = std::min(min_rtt_us, info.tcpi_min_rtt);
  }
  for (const int fd : other_fds_) {
    tcp_info info{};
    socklen_t bytes = sizeof info;
    if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) == 0)
      sample.delivered_bytes += info.tcpi_bytes_acked;
  }
  if (min_rtt_us != UINT32_MAX) sample.min_rtt = std::chrono::microseconds(min_rtt_us);
  controller_.sample(sample);
}

void Pacer::steer(TimePoint now) {
  if (const std::uint64_t bytes = undebited_bytes_.exchange(0, std::memory_order_relaxed); bytes > 0) {
    limit_.debit(bytes, now);
    link_.debit(bytes, now);
  }
  if (same_host_ || data_fds_.empty()) return;
  const bool pace = faults_recent(now);
  if (now - sampled_at_ >= RateController::kInterval) {
    sampled_at_ = now;
    take_sample(now);
    // A push that begins while there are faults fills the link first, in small chunks.
    if (pace && controller_.saturated()) controller_.start(now);
    link_.set_rate(controller_.rate(), std::max(kLinkBurstBytes, controller_.rate() * kLinkBurstSeconds),
                   now);
  }
  if (!pace && controller_.limiting()) {
    controller_.stop();
    link_.set_rate(0, 0, now);
  }
}

bool Pacer::wait_turn() {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (cancelled_) return false;
    const TimePoint now = std::chrono::steady_clock::now();
    steer(now);
    TimePoint until = now + std::max(limit_.delay(now), link_.delay(now));
    if (controller_.limiting()) until = std::max(until, controller_.drained_at());
    if (until <= now) return true;
    // Not for longer than until the next sample: a rate that was too low, or no limit any more, is noticed then.
    changed_.wait_until(lock, std::min<TimePoint>(until, now + RateController::kInterval));
  }
}

void Pacer::debit(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  const TimePoint now = std::chrono::steady_clock::now();
  limit_.debit(bytes, now);
  link_.debit(bytes, now);
}

bool Pacer::wait_limit(const std::function<bool()>& over) {
  std::unique_lock lock(mutex_);
  while (!over()) {
    const TimePoint now = std::chrono::steady_clock::now();
    const Duration delay = limit_.delay(now);
    if (delay <= Duration::zero()) return true;
    changed_.wait_until(lock, std::min<TimePoint>(now + delay, now + RateController::kInterval));
  }
  return false;
}

void Pacer::debit_limit(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  limit_.debit(bytes, std::chrono::steady_clock::now());
}

void Pacer::cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  changed_.notify_all();
}

void Pacer::reset() {
  const std::lock_guard lock(mutex_);
  cancelled_ = false;
}

void Pacer::fault_begin() {
  last_fault_ns_.store(nanoseconds(std::chrono::steady_clock::now()), std::memory_order_relaxed);
}

void Pacer::fault_end(std::uint64_t answered_bytes) {
  fault_bytes_.fetch_add(answered_bytes, std::memory_order_relaxed);
  undebited_bytes_.fetch_add(answered_bytes, std::memory_order_relaxed);
}

}  // namespace memferry::wire
