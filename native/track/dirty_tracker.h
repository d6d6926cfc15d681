// Which pages has the owner written? One interface, several ways (docs: ARCHITECTURE.md, "Dirty tracking").
//
// The contract that every tracker keeps: a write that happens after arm() (or after the last collect()) is
// reported by the next collect(), however it races with it; a write may be reported twice, never lost.
// One thread calls a tracker at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "page/bitmap.h"
#include "page/region.h"

namespace memferry {

class DirtyTracker {
 public:
  virtual ~DirtyTracker() = default;
  [[nodiscard]] virtual std::string_view name() const = 0;

  // From now on writes are seen. Throws SystemError, RegionGone. Arming again starts afresh.
  virtual void arm() = 0;
  // ORs the pages written since arm() or the last collect() into `dirty` (of the region's capacity), re-arms
  // them, and gives how many there were. Pages that the region has gained since count as written.
  // Throws SystemError when the memory is no longer what was armed (never "nothing was written"), RegionGone
  // when the region is retired, std::logic_error when it is not armed.
  virtual std::uint64_t collect(AtomicBitmap& dirty) = 0;
  virtual void disarm() = 0;

  // The pages that may have held something else than zeros when arm() looked: every other page was zeros
  // then, and is reported by collect() once it is written. So a first round need not read the others. nullptr
  // when the tracker does not know, and after collect(); valid until then. Armed memory looks populated in
  // /proc/self/pagemap, so that this cannot be found out later.
  [[nodiscard]] virtual const AtomicBitmap* populated_when_armed() const { return nullptr; }

  // True when the tracker compares content: then the sender calls sent() with the hash of the bytes that
  // it put on the wire (a baseline taken at collect() would lose a page that went A, B (sent), A). sent() may
  // be called by several threads at once, but not during arm() or collect().
  [[nodiscard]] virtual bool wants_sent() const { return false; }
  virtual void sent(PageNumber /*page*/, std::uint64_t /*xxh3*/) {}
};

// kKvmLog is over a VM, not over a region alone: track/kvm_log.h makes one, make_tracker() does not.
enum class TrackerKind { kUffdWpAsync, kSoftDirty, kUffdWp, kHashDiff, kKvmLog };

// Where writes to shared memory come from. Each of memory that is private and anonymous goes through the
// tracked addresses anyway.
enum class Writers {
  kAnywhere,       // other mappings, other processes, pwrite() on the file: only comparing content sees those
  kTrackedMapping  // the caller's word: all go through the tracked addresses
};

struct TrackerOptions {
  Writers writers = Writers::kAnywhere;
  bool split_huge_pages = false;  // track/sent_diff.h
};

struct TrackerProbe {
  std::string name;
  bool available = false;
  std::string reason;  // why not, empty when available
  std::string remedy;  // how to grant it, empty when there is no way
};

// Those that need a region alone, in order of preference.
[[nodiscard]] const std::vector<TrackerKind>& tracker_kinds();
[[nodiscard]] std::string_view tracker_name(TrackerKind kind);
[[nodiscard]] std::optional<TrackerKind> tracker_kind(std::string_view name);
// Found out by using it, for a moment.
[[nodiscard]] TrackerProbe probe_tracker(TrackerKind kind);
[[nodiscard]] std::vector<TrackerProbe> probe_trackers();

// Why a tracker that works here may not watch this region, nothing when it may. What arm() would throw about
// the kind of memory, for choosing another one beforehand. Throws SystemError (/proc).
[[nodiscard]] std::optional<std::string> tracker_refusal(TrackerKind kind, const Region& region,
                                                         const TrackerOptions& options = {});
[[nodiscard]] std::unique_ptr<DirtyTracker> make_tracker(TrackerKind kind, std::shared_ptr<Region> region,
                                                         const TrackerOptions& options = {});
// Over one that is there already: TrackerOptions::split_huge_pages.
[[nodiscard]] std::unique_ptr<DirtyTracker> split_huge_pages(const std::shared_ptr<Region>& region,
                                                             std::unique_ptr<DirtyTracker> tracker);

}  // namespace memferry
