#include "fault/latency_histogram.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace memferry {
namespace {

// Values below kSubBuckets have a bucket each; above, the 4 bits after the leading one choose.
std::size_t bucket_of(std::uint64_t value) {
  if (value < LatencyHistogram::kSubBuckets) return static_cast<std::size_t>(value);
  const auto exponent = static_cast<std::uint64_t>(std::bit_width(value)) - 1;
  const std::uint64_t sub = (value >> (exponent - 4)) & (LatencyHistogram::kSubBuckets - 1);
  return static_cast<std::size_t>((exponent - 3) * LatencyHistogram::kSubBuckets + sub);
}

std::uint64_t last_value_of(std::size_t bucket) {
  if (bucket < LatencyHistogram::kSubBuckets) return bucket;
  const std::uint64_t exponent = bucket / LatencyHistogram::kSubBuckets + 3;
  const std::uint64_t sub = bucket % LatencyHistogram::kSubBuckets;
  const std::uint64_t width = 1ULL << (exponent - 4);
  return ((LatencyHistogram::kSubBuckets + sub) << (exponent - 4)) + (width - 1);
}

}  // namespace

void LatencyHistogram::record(std::chrono::nanoseconds latency) {
  const auto value = static_cast<std::uint64_t>(std::max<std::int64_t>(latency.count(), 0));
  buckets_[bucket_of(value)].fetch_add(1, std::memory_order_relaxed);
  count_.fetch_add(1, std::memory_order_relaxed);
  std::uint64_t former = max_.load(std::memory_order_relaxed);
  while (former < value && !max_.compare_exchange_weak(former, value, std::memory_order_relaxed)) {
  }
}

std::chrono::nanoseconds LatencyHistogram::quantile(double fraction) const {
  std::uint64_t total = 0;
  for (const auto& bucket : buckets_) total += bucket.load(std::memory_order_relaxed);
  if (total == 0) return std::chrono::nanoseconds{0};
  const double exact = std::ceil(std::clamp(fraction, 0.0, 1.0) * static_cast<double>(total));
  const std::uint64_t rank = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(exact));
  std::uint64_t seen = 0;
  for (std::size_t bucket = 0; bucket < kBuckets; ++bucket) {
    seen += buckets_[bucket].load(std::memory_order_relaxed);
    if (seen < rank) continue;
    const auto edge = static_cast<std::int64_t>(last_value_of(bucket));
    return std::min(std::chrono::nanoseconds{edge}, max());
  }
  return max();
}

std::chrono::nanoseconds LatencyHistogram::max() const {
  return std::chrono::nanoseconds{static_cast<std::int64_t>(max_.load(std::memory_order_relaxed))};
}

}  // namespace memferry
