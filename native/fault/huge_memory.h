// Memory of reserved huge pages that is paged into. What comes are pages of the region's size, by any way and in any
// order; what can be given to whoever waits is a huge page as a whole. So they are put together elsewhere
// (fault/huge_place.h), and the region's own mapping gets a huge page when all of it is there. Nothing is ever seen half,
// and nothing of shared memory lies in memory twice.
//
// Two marks for each page, beside its ArrivalMap's:
//   landed    its content is in its place. `received` and not landed: somebody is writing it right now
//   stale     (of a huge page) something may lie there that is not the guest's: zeros must be written
//
// What the guest itself discards with MADV_REMOVE while a huge page is on its way is zeros where it had landed, comes
// from the source where it had not, and is either in a page that was being written at that moment.
//
// Threads: any, after open(). mapping() is held while a huge page is mapped or taken back, and while pages land.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>

#include "fault/arrival_map.h"
#include "fault/huge_place.h"

namespace memferry {

class HugeMemory {
 public:
  // Of larger ones a fault would wait for too much.
  static constexpr std::uint64_t kLargestBytes = 2UL << 20;

  // Privately mapped ones may need as much memory again, so that a guest has this much of them at most.
  static constexpr std::uint64_t kMostStagedBytes = 1UL << 30;

  // nullptr when the region's memory is of ordinary pages. Throws SystemError (EOPNOTSUPP) when it has huge ones that
  // cannot be paged into: larger than kLargestBytes, not begun and ended by, or of a file out of reach.
  static std::unique_ptr<HugeMemory> of(ArrivalMap& map);
  // The same of all that one pager has, and more than kMostStagedBytes of private ones.
  static void check(std::span<const std::shared_ptr<Region>> regions);

  // Makes their place, over the region as it is now, and takes note of what has been received: what is not whole is taken
  // out of the region's own mapping (its owner's), which is registered by now. Throws SystemError, OwnerGone.
  void open();
  [[nodiscard]] RegisterMode mode() const { return place_->mode(); }
  [[nodiscard]] std::uint64_t extra_bytes() const { return place_->extra_bytes(); }

  // The huge page that `page` is in, as pages.
  [[nodiscard]] PageRun unit(PageNumber page) const {
    return {PageNumber{page.value / unit_pages_ * unit_pages_}, unit_pages_};
  }
  [[nodiscard]] std::uint64_t unit_bytes() const { return unit_pages_ * map_.page_size(); }

  // Each inside one huge page, which the caller has claimed (`received`). False: no memory for it.
  [[nodiscard]] bool write(PageRun run, const std::byte* bytes);
  [[nodiscard]] bool write_zeros(PageRun run);
  // True when the huge page is whole with it.
  bool land(PageRun run);
  [[nodiscard]] bool whole(PageNumber page) const {
    const PageRun all = unit(page);
    return landed_.count(all) == all.count;
  }
  [[nodiscard]] const AtomicBitmap& landed() const { return landed_; }
  // Something else than zeros nobody has asked for lies behind it.
  [[nodiscard]] bool has_content(PageNumber page) const { return content_.test(index(page)); }
  // Puts memory behind the huge page in its place. False when there is none.
  [[nodiscard]] bool populate(PageNumber page) { return place_->populate(unit(page).first); }
  // Into the region's mapping: HugePlace::give(). With mapping() held, and after populate().
  PageResult give(Userfaultfd& uffd, PageNumber page) { return place_->give(uffd, unit(page).first); }
  // To come again: the huge page is taken out of the region's mapping. Throws as open().
  void forget(PageRun run);
  // Takes whole ones out of the region's mapping. Throws as open(): what cannot be put back counts as not received.
  void unmap(PageRun run);

  // It fails to be read for good. Gives the former value.
  bool set_failed(PageNumber page) { return failed_.set(index(page)); }
  void clear_failed(PageNumber page) { (void)failed_.clear(index(page)); }
  [[nodiscard]] bool failed(PageNumber page) const { return failed_.test(index(page)); }

  [[nodiscard]] std::mutex& mapping() { return mapping_; }

 private:
  HugeMemory(ArrivalMap& map, std::uint64_t unit_bytes, bool shared);
  [[nodiscard]] PageNumber index(PageNumber page) const { return PageNumber{page.value / unit_pages_}; }

  ArrivalMap& map_;
  const std::uint64_t unit_pages_;
  const bool shared_;
  const std::unique_ptr<HugePlace> place_;
  AtomicBitmap landed_;
  // One bit a huge page:
  AtomicBitmap stale_;
  AtomicBitmap content_;
  AtomicBitmap failed_;
  std::mutex mapping_;
  std::shared_mutex writing_;  // whole while huge pages are taken back; taken last
};

}  // namespace memferry
