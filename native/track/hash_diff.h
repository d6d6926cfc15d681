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

#include <memory>

#include "track/dirty_tracker.h"
#include "track/page_hashes.h"

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
  const std::shared_ptr<Region> region_;
  PageHashes hashes_;  // the baseline
  bool armed_ = false;
  std::uint64_t armed_pages_ = 0;
};

}  // namespace memferry
