// What all suites over trackers share: which trackers there are, and memory for them.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "guest_ram.h"
#include "os/mapping.h"
#include "os/sys_error.h"
#include "page/bitmap.h"
#include "page/region.h"
#include "track/dirty_tracker.h"
#include "track/uffd_wp.h"

namespace memferry {

using PageSet = std::set<std::uint64_t>;

// A way to track. uffd-wp has two: kernels before 6.4 cannot protect a page that is not there.
struct TrackerCase {
  TrackerKind kind;
  bool as_before_6_4 = false;
  bool split = false;  // TrackerOptions::split_huge_pages

  [[nodiscard]] std::string name() const {
    std::string name(tracker_name(kind));
    std::erase(name, '-');
    return name + (as_before_6_4 ? "before64" : "") + (split ? "split" : "");
  }
  [[nodiscard]] std::unique_ptr<DirtyTracker> make(const std::shared_ptr<Region>& region,
                                                   const TrackerOptions& options = {}) const {
    if (as_before_6_4)
      return std::make_unique<UffdWpTracker>(region, options, UffdWpTracker::ProtectEmpty::kNever);
    TrackerOptions with = options;
    with.split_huge_pages = split;
    return make_tracker(kind, region, with);
  }
  // Empty when it works here.
  [[nodiscard]] std::string lacking() const {
    const TrackerProbe probe = probe_tracker(kind);
    if (probe.available) return {};
    return probe.name + " does not work here: " + probe.reason + " (needs: " + probe.remedy + ")";
  }
  friend void PrintTo(const TrackerCase& tracker, std::ostream* out) { *out << tracker.name(); }
};

inline std::vector<TrackerCase> every_tracker() {
  std::vector<TrackerCase> cases;
  for (const TrackerKind kind : tracker_kinds()) {
    cases.push_back({kind});
    if (kind == TrackerKind::kUffdWp) cases.push_back({kind, true});
    // Nothing is sent in most tests: then it is as without.
    if (kind == TrackerKind::kUffdWpAsync) cases.push_back({kind, false, true});
  }
  return cases;
}

class EveryTracker : public testing::TestWithParam<TrackerCase> {
 protected:
  void SetUp() override {
    if (const std::string lacking = GetParam().lacking(); !lacking.empty()) GTEST_SKIP() << lacking;
  }
  [[nodiscard]] std::unique_ptr<DirtyTracker> make(const std::shared_ptr<Region>& region,
                                                   const TrackerOptions& options = {}) {
    if (GetParam().kind == TrackerKind::kKvmLog) return guest_ram_.make(region);
    return GetParam().make(region, options);
  }
  // With a neighbour of another protection at both ends: what the kernel joins with a new mapping all counts as written
  // for soft-dirty.
  std::shared_ptr<Region> small_pages(std::uint64_t pages) {
    Mapping memory = Mapping::anonymous((pages + 2) * page_, PROT_NONE);
    if (::mprotect(memory.data() + page_, pages * page_, PROT_READ | PROT_WRITE) != 0)
      throw_errno("mprotect");
    ::madvise(memory.data() + page_, pages * page_, MADV_NOHUGEPAGE);
    auto region = Region::adopt({{memory.start().plus(page_), pages * page_}}, pages * page_);
    memory_.push_back(std::move(memory));
    return region;
  }
  // Every write differs from all before it, so that a tracker that compares content sees it too.
  void write(const std::shared_ptr<Region>& region, std::uint64_t page) {
    ++writes_;
    if (guest_ram_.write(region, page, static_cast<std::uint32_t>(writes_))) return;
    std::memcpy(region->address(PageNumber{page}).pointer() + 8, &writes_, sizeof writes_);
  }
  // Touches the page, and gives the first byte that write() changes.
  static std::byte read(const std::shared_ptr<Region>& region, std::uint64_t page) {
    return *static_cast<volatile std::byte*>(region->address(PageNumber{page}).pointer() + 8);
  }
  static PageSet collect(DirtyTracker& tracker, std::uint64_t capacity) {
    AtomicBitmap dirty(capacity);
    const std::uint64_t count = tracker.collect(dirty);
    PageSet pages;
    for (std::uint64_t i = 0; i < capacity; ++i) {
      if (dirty.test(PageNumber{i})) pages.insert(i);
    }
    EXPECT_EQ(count, pages.size());
    return pages;
  }
  static int error_of(const std::function<void()>& call) {
    try {
      call();
    } catch (const SystemError& error) {
      return error.error();
    }
    return 0;
  }
  // Soft-dirty counts all of a mapping that the kernel has joined with a new one.
  [[nodiscard]] static bool may_report_neighbours() { return GetParam().kind == TrackerKind::kSoftDirty; }

  const std::uint64_t page_ = system_page_size();
  std::uint64_t writes_ = 0;
  std::vector<Mapping> memory_;
  GuestRam guest_ram_;  // for kvm-log: the VMs, and who writes in them
};

}  // namespace memferry
