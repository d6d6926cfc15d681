// Discards that write protection does not show. In private anonymous memory a discarded page loses its mark, and reads
// as written. In shared memory and on huge pages (measured on 6.18) the mark outlives madvise(MADV_REMOVE,
// MADV_DONTNEED) and a hole punched into the file: the page has become zeros and looks clean, and once it was read it
// is even populated again. The receiver would keep what was there before.
//
// So this remembers which pages may hold something else than zeros, and looks whether one of those that seem clean is
// zeros now. Of tmpfs it only looks when the file says that it has changed. A look at a page reads up to its first byte
// that is not zero; pages that have to be copied to be read are first told apart by how they begin.
//
// Threads: those of its tracker, one at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "os/cut_watch.h"
#include "os/pagemap.h"
#include "page/bitmap.h"
#include "page/page_starts.h"
#include "page/region.h"
#include "page/region_reader.h"
#include "track/memory_part.h"

namespace memferry {

class DiscardWatch {
 public:
  // `parts`: those of the region, all protected already. Takes stock. Throws SystemError, RegionGone.
  DiscardWatch(const RegionUse& use, const Region& region, std::vector<MemoryPart> parts, Pagemap& pagemap);

  // Pages that may hold something else than zeros; those of other kinds of memory are not in it.
  [[nodiscard]] const AtomicBitmap& content() const { return content_; }
  // Adds to `dirty` (what was found written, this time) what was discarded, and gives how many pages that are.
  // Throws SystemError, RegionGone.
  std::uint64_t collect(const RegionUse& use, Pagemap& pagemap, AtomicBitmap& dirty);
  // The region has gained pages, which count as written anyway.
  void follow_growth();

 private:
  struct Watched {
    MemoryPart part;
    // Of tmpfs: what says that nothing was cut out, where there is the first.
    std::optional<CutWatch> cuts;
    BackingFile::Stamp stamp;
    bool looked = false;
  };
  static bool unchanged(Watched& watched);
  void watch(std::vector<MemoryPart> parts);
  std::uint64_t look(const RegionUse& use, Pagemap& pagemap, const Watched& watched, AtomicBitmap& dirty);
  // Calls visit for the runs of the part whose pages have memory, in order; the others are zeros.
  template <typename Visit>
  void with_memory(Pagemap& pagemap, const MemoryPart& part, Visit visit);
  [[nodiscard]] bool page_is_zero(PageNumber page);
  [[nodiscard]] PageRun pages_of(const MemoryPart& part) const;

  const Region& region_;
  RegionReader reader_;
  PageStarts starts_;
  std::vector<Watched> watched_;
  AtomicBitmap content_;
};

}  // namespace memferry
