// The table of trackers: names, order of preference, which memory each may watch.

#include <stdexcept>

#include "track/dirty_tracker.h"
#include "track/hash_diff.h"
#include "track/sent_diff.h"
#include "track/soft_dirty.h"
#include "track/uffd_wp.h"
#include "track/uffd_wp_async.h"

namespace memferry {

// The cheapest first: no fault and no stop; a kernel fault a first write and a short stop of the owner a look;
// a fault that another thread serves a first write; reading everything.
const std::vector<TrackerKind>& tracker_kinds() {
  static const std::vector<TrackerKind> kinds{TrackerKind::kUffdWpAsync, TrackerKind::kSoftDirty,
                                              TrackerKind::kUffdWp, TrackerKind::kHashDiff};
  return kinds;
}

std::string_view tracker_name(TrackerKind kind) {
  switch (kind) {
    case TrackerKind::kUffdWpAsync:
      return "uffd-wp-async";
    case TrackerKind::kSoftDirty:
      return "soft-dirty";
    case TrackerKind::kUffdWp:
      return "uffd-wp";
    case TrackerKind::kHashDiff:
      return "hash-diff";
    case TrackerKind::kKvmLog:
      return "kvm-log";
  }
  throw std::invalid_argument("no such tracker");
}

std::optional<TrackerKind> tracker_kind(std::string_view name) {
  for (const TrackerKind kind : tracker_kinds()) {
    if (tracker_name(kind) == name) return kind;
  }
  return std::nullopt;
}

std::vector<TrackerProbe> probe_trackers() {
  std::vector<TrackerProbe> probes;
  for (const TrackerKind kind : tracker_kinds()) probes.push_back(probe_tracker(kind));
  return probes;
}

std::optional<std::string> tracker_refusal(TrackerKind kind, const Region& region,
                                           const TrackerOptions& options) {
  switch (kind) {
    case TrackerKind::kUffdWpAsync:
      return UffdWpAsyncTracker::refusal(region, options);
    case TrackerKind::kUffdWp:
      return UffdWpTracker::refusal(region, options);
    case TrackerKind::kSoftDirty:
      return SoftDirtyTracker::refusal(region);
    case TrackerKind::kHashDiff:
      return std::nullopt;
    case TrackerKind::kKvmLog:
      return "it is made over a VM";
  }
  throw std::invalid_argument("no such tracker");
}

std::unique_ptr<DirtyTracker> split_huge_pages(const std::shared_ptr<Region>& region,
                                               std::unique_ptr<DirtyTracker> tracker) {
  return std::make_unique<SentDiffTracker>(region, std::move(tracker));
}

std::unique_ptr<DirtyTracker> make_tracker(TrackerKind kind, std::shared_ptr<Region> region,
                                           const TrackerOptions& options) {
  if (options.split_huge_pages && kind != TrackerKind::kHashDiff) {
    TrackerOptions others = options;
    others.split_huge_pages = false;
    return split_huge_pages(region, make_tracker(kind, region, others));
  }
  switch (kind) {
    case TrackerKind::kUffdWpAsync:
      return std::make_unique<UffdWpAsyncTracker>(std::move(region), options);
    case TrackerKind::kSoftDirty:
      return std::make_unique<SoftDirtyTracker>(std::move(region));
    case TrackerKind::kUffdWp:
      return std::make_unique<UffdWpTracker>(std::move(region), options);
    case TrackerKind::kHashDiff:
      return std::make_unique<HashDiffTracker>(std::move(region));
    case TrackerKind::kKvmLog:
      break;
  }
  throw std::invalid_argument("no such tracker");
}

}  // namespace memferry
