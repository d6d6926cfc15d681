// What the handles of memferry.h are.
#pragma once

#include <memory>
#include <vector>

#include "capi/guarded.h"
#include "page/region.h"
#include "track/dirty_tracker.h"
#include "transfer/receiver.h"

struct memferry_region {
  std::shared_ptr<memferry::Region> region;
};

struct memferry_tracker {
  std::shared_ptr<memferry::DirtyTracker> tracker;
  std::shared_ptr<memferry::Region> region;
};

struct memferry_receiver;

namespace memferry::capi {

// Throws std::invalid_argument: none, too many, or one that is NULL.
[[nodiscard]] std::vector<std::shared_ptr<Region>> regions_of(memferry_region* const* regions,
                                                              std::size_t count);
void write_stats(memferry_receiver_stats* to, const ReceiverStats& stats);
[[nodiscard]] memferry_receiver_stats stats_of(const ReceiverStats& stats);
[[nodiscard]] std::vector<memferry_run> runs_of(const std::vector<RegionRun>& runs);
void write_digest(std::uint8_t* to, const Hash128& digest);
[[nodiscard]] std::chrono::milliseconds milliseconds_or(std::uint32_t given, std::uint32_t otherwise);

}  // namespace memferry::capi
