// Another tracker, and of the pages that it says were written those that hold something else than was last sent: one write
// to a huge page makes its 512 pages count as written, and one of them go again. Reads what was written, and nothing else.
//
// What was sent is what sent() says. A page that was never sent, or was found written and not sent since, counts as
// written whatever it holds: so one whose sending nobody mentions is sent twice at worst.
//
// Threads: sent() from any number of threads between two collects; the rest from one.
#pragma once

#include <memory>

#include "track/dirty_tracker.h"
#include "track/page_hashes.h"

namespace memferry {

class SentDiffTracker final : public DirtyTracker {
 public:
  SentDiffTracker(std::shared_ptr<Region> region, std::unique_ptr<DirtyTracker> inner);

  [[nodiscard]] std::string_view name() const override { return inner_->name(); }
  void arm() override;
  std::uint64_t collect(AtomicBitmap& dirty) override;
  void disarm() override { inner_->disarm(); }
  [[nodiscard]] const AtomicBitmap* populated_when_armed() const override {
    return inner_->populated_when_armed();
  }
  [[nodiscard]] bool wants_sent() const override { return true; }
  void sent(PageNumber page, std::uint64_t xxh3) override;

 private:
  const std::shared_ptr<Region> region_;
  const std::unique_ptr<DirtyTracker> inner_;
  PageHashes sent_;  // 0: not known
  AtomicBitmap
      written_;  // by the inner one, and not reported yet: a collect() that fails half-way loses nothing
};

}  // namespace memferry
