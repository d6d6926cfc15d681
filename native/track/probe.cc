// Which trackers work here, found out by using them: kernels and containers differ from what their version
// numbers and feature bits promise.

#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "os/mapping.h"
#include "os/pagemap.h"
#include "os/userfaultfd.h"
#include "track/dirty_tracker.h"
#include "track/hash_diff.h"
#include "track/uffd_wp_async.h"

namespace memferry {

namespace {

constexpr std::string_view kUffdWpAsync = "uffd-wp-async";
constexpr std::string_view kHashDiff = "hash-diff";

// Writes one page of several, some never touched, and expects the tracker to find exactly that one.
void try_out(TrackerKind kind) {
  constexpr std::uint64_t kPages = 4;
  const auto region = Region::allocate(kPages * system_page_size());
  volatile std::byte* first = region->address(PageNumber{0}).pointer();
  *first = std::byte{1};
  const auto tracker = make_tracker(kind, region);
  tracker->arm();
  AtomicBitmap dirty(kPages);
  if (tracker->collect(dirty) != 0)
    throw std::runtime_error("pages that nobody wrote are reported as written");
  volatile std::byte* third = region->address(PageNumber{2}).pointer();
  *first = std::byte{2};
  *third = std::byte{2};
  tracker->collect(dirty);
  if (!dirty.test(PageNumber{0}) || !dirty.test(PageNumber{2})) {
    throw std::runtime_error("a page that was written is not reported");
  }
  if (dirty.count() != 2) throw std::runtime_error("pages that nobody wrote are reported as written");
}

void explain_uffd_wp_async(TrackerProbe& probe) {
  const Userfaultfd::Offer offer = Userfaultfd::probe();
  if (!offer.user_faults) {
    probe.reason = "no userfaultfd: " + std::generic_category().message(offer.error);
    probe.remedy =
        offer.error == ENOSYS
            ? "a kernel with CONFIG_USERFAULTFD, or a seccomp profile that allows userfaultfd"
            : "sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE, or access to /dev/userfaultfd, "
              "or a seccomp profile that allows userfaultfd";
    return;
  }
  if ((offer.features & UffdWpAsyncTracker::kFeatures) != UffdWpAsyncTracker::kFeatures) {
    probe.reason = "this kernel has no asynchronous write protection (UFFD_FEATURE_WP_ASYNC)";
    probe.remedy = "Linux 6.7 or later";
    return;
  }
  try {
    if (!Pagemap().can_scan()) {
      probe.reason = "this kernel has no PAGEMAP_SCAN";
      probe.remedy = "Linux 6.7 or later with CONFIG_PROC_PAGE_MONITOR";
    }
  } catch (const SystemError& error) {
    probe.reason = error.what();
    probe.remedy = "a mounted /proc";
  }
}

TrackerProbe probe_one(TrackerKind kind) {
  TrackerProbe probe;
  probe.name = tracker_name(kind);
  if (kind == TrackerKind::kUffdWpAsync) explain_uffd_wp_async(probe);
  if (!probe.reason.empty()) return probe;
  try {
    try_out(kind);
    probe.available = true;
  } catch (const std::exception& error) {
    probe.reason = error.what();
  }
  return probe;
}

}  // namespace

std::string_view tracker_name(TrackerKind kind) {
  switch (kind) {
    case TrackerKind::kUffdWpAsync:
      return kUffdWpAsync;
    case TrackerKind::kHashDiff:
      return kHashDiff;
  }
  throw std::invalid_argument("no such tracker");
}

std::optional<TrackerKind> tracker_kind(std::string_view name) {
  for (const TrackerKind kind : {TrackerKind::kUffdWpAsync, TrackerKind::kHashDiff}) {
    if (tracker_name(kind) == name) return kind;
  }
  return std::nullopt;
}

std::vector<TrackerProbe> probe_trackers() {
  return {probe_one(TrackerKind::kUffdWpAsync), probe_one(TrackerKind::kHashDiff)};
}

std::unique_ptr<DirtyTracker> make_tracker(TrackerKind kind, std::shared_ptr<Region> region) {
  switch (kind) {
    case TrackerKind::kUffdWpAsync:
      return std::make_unique<UffdWpAsyncTracker>(std::move(region));
    case TrackerKind::kHashDiff:
      return std::make_unique<HashDiffTracker>(std::move(region));
  }
  throw std::invalid_argument("no such tracker");
}

}  // namespace memferry
