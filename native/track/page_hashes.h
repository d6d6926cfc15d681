// For trackers that compare content: what a region's pages hold now, as XXH3, and a hash of each that is remembered.
//
// Threads: remembered() from any; range() from one.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "os/mapping.h"
#include "page/bitmap.h"
#include "page/contents.h"
#include "page/region.h"
#include "page/region_reader.h"

namespace memferry {

class PageHashes {
 public:
  using Visit = std::function<void(std::uint64_t page, std::uint64_t xxh3)>;

  explicit PageHashes(std::shared_ptr<Region> region);

  // Calls visit for all of the first `pages`, or those of them that `only` has, in order, with what they hold at a moment
  // within the call. Pages that were never touched are not read. Throws RegionGone; `who` for its message.
  void look(const RegionUse& use, const char* who, std::uint64_t pages, const AtomicBitmap* only,
            const Visit& visit);
  // 0 until something else is stored there.
  [[nodiscard]] std::atomic<std::uint64_t>& remembered(std::uint64_t page) const;
  void forget();

 private:
  [[nodiscard]] Mapping fresh() const;

  const std::shared_ptr<Region> region_;
  const std::uint64_t zero_page_hash_;
  Contents contents_;
  RegionReader reader_;
  // 8 bytes a page of the capacity; a mapping, so that what the region never grows to costs nothing.
  Mapping remembered_;
};

}  // namespace memferry
