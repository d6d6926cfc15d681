// Memory of reserved huge pages that is paged into. What comes are pages of the region's size, by any way and in any
// order; what can be given to whoever waits is a huge page as a whole. So they are written through a second mapping of
// the same file (the *alias*), which nobody else has, and the region's own mapping gets a huge page when all of it is
// there (UFFDIO_CONTINUE). Nothing is ever seen half, and nothing lies in memory twice.
//
// Two marks for each page, beside its ArrivalMap's:
//   landed    its content is in the file. `received` and not landed: somebody is writing it right now
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
#include <vector>

#include "fault/arrival_map.h"
#include "os/mapping.h"

namespace memferry {

class HugeMemory {
 public:
  // Of larger ones a fault would wait for too much.
  static constexpr std::uint64_t kLargestBytes = 2UL << 20;

  // nullptr when the region's memory is of ordinary pages. Throws SystemError (EOPNOTSUPP) when it has huge ones that
  // cannot be paged into: private, larger than kLargestBytes, not begun and ended by, or of a file out of reach.
  static std::unique_ptr<HugeMemory> of(ArrivalMap& map);
  static void check(const Region& region);

  // Makes the alias, over the region as it is now, and takes note of what has been received: what is not whole is taken
  // out of the region's own mapping, which is registered by now. Throws SystemError.
  void open();

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
  // Something else than zeros nobody has asked for lies behind it.
  [[nodiscard]] bool has_content(PageNumber page) const { return content_.test(index(page)); }
  // Puts memory behind the huge page in the file. False when there is none.
  [[nodiscard]] bool populate(PageNumber page);
  // To come again: the huge page is taken out of the region's mapping.
  void forget(PageRun run);
  // Takes it out of the region's mapping. Throws SystemError.
  void unmap(PageRun run) const;

  // It fails to be read for good. Gives the former value.
  bool set_failed(PageNumber page) { return failed_.set(index(page)); }
  [[nodiscard]] bool failed(PageNumber page) const { return failed_.test(index(page)); }

  [[nodiscard]] std::mutex& mapping() { return mapping_; }

 private:
  HugeMemory(ArrivalMap& map, std::uint64_t unit_bytes);
  [[nodiscard]] PageNumber index(PageNumber page) const { return PageNumber{page.value / unit_pages_}; }
  [[nodiscard]] std::byte* alias(PageNumber page) const;

  struct Part {
    PageNumber first;
    std::uint64_t pages = 0;
    Mapping alias;
  };

  ArrivalMap& map_;
  const std::uint64_t unit_pages_;
  std::vector<Part> parts_;
  AtomicBitmap landed_;
  // One bit a huge page:
  AtomicBitmap stale_;
  AtomicBitmap content_;
  AtomicBitmap failed_;
  std::mutex mapping_;
};

}  // namespace memferry
