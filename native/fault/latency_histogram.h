// Latencies in buckets of fixed relative width: 16 for each power of two of nanoseconds, so that a percentile
// is at most 1/16 too high, in 8 KiB whatever is recorded.
//
// Threads: record() from any; a reader sees a sum that may be a few records behind.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace memferry {

class LatencyHistogram {
 public:
  static constexpr std::uint64_t kSubBuckets = 16;
  static constexpr std::size_t kBuckets = 64 * kSubBuckets;

  void record(std::chrono::nanoseconds latency);
  [[nodiscard]] std::uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  // The upper edge of the bucket that holds the `fraction` quantile (0..1), never above max(); 0 when empty.
  [[nodiscard]] std::chrono::nanoseconds quantile(double fraction) const;
  [[nodiscard]] std::chrono::nanoseconds max() const;

 private:
  std::array<std::atomic<std::uint64_t>, kBuckets> buckets_{};
  std::atomic<std::uint64_t> count_{0};
  std::atomic<std::uint64_t> max_{0};
};

}  // namespace memferry
