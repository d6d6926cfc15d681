// Dirty tracking by content: the XXH3 of every page, compared with that of the bytes that were last sent.
// Needs nothing from the kernel, reads all the memory at each collect(), and serves as the oracle of the
// others.
//
// A page written back to what was last sent counts as clean, which is right for whoever sent those bytes and
// said so by sent(). Without sent() the baseline is the content at the last collect(): a reader who copied
// the page in between, when it was something else, must say so too.
//
// Threads: sent() from any number of threads between two collects; the rest from one.
#pragma once

#include <atomic>
#include <memory>
#include <optional>

#include "os/mapping.h"
#include "page/contents.h"
#include "page/region_reader.h"
#include "track/dirty_tracker.h"

namespace memferry {

class HashDiffTracker final : public DirtyTracker {
 public:
  explicit HashDiffTracker(std::shared_ptr<Region> region);

  [[nodiscard]] std::string_view name() const override { return "hash-diff"; }
  void arm() override;
  std::uint64_t collect(AtomicBitmap& dirty) override;
  void disarm() override;
  [[nodiscard]] bool wants_sent() const override { return true; }
  void sent(PageNumber page, std::uint64_t xxh3) override;

 private:
  // Calls visit(page, hash) for pages [first, end), in order. Pages that were never touched are not read.
  template <typename Visit>
  void hash_range(const RegionUse& use, std::uint64_t first, std::uint64_t end, Visit visit);
  [[nodiscard]] std::atomic<std::uint64_t>& baseline(std::uint64_t page) const;

  const std::shared_ptr<Region> region_;
  const std::uint64_t zero_page_hash_;
  Contents contents_;
  RegionReader reader_;
  // 8 bytes a page of the capacity; a mapping, so that what the region never grows to costs nothing.
  Mapping baselines_;
  bool armed_ = false;
  std::uint64_t armed_pages_ = 0;
};

}  // namespace memferry
