#include "track/sent_diff.h"

#include <stdexcept>
#include <utility>

namespace memferry {

SentDiffTracker::SentDiffTracker(std::shared_ptr<Region> region, std::unique_ptr<DirtyTracker> inner)
    : region_(std::move(region)),
      inner_(std::move(inner)),
      sent_(region_),
      written_(region_->capacity_pages()) {}

void SentDiffTracker::arm() {
  inner_->arm();
  sent_.forget();
  written_.clear_run({PageNumber{0}, written_.capacity()});
}

// What is written between the inner collect() and the look at a page is in its hash, and is found again by the next one:
// then the page holds what was sent, or it goes once more.
std::uint64_t SentDiffTracker::collect(AtomicBitmap& dirty) {
  if (dirty.capacity() < region_->pages())
    throw std::invalid_argument("collect: the bitmap is smaller than the region");
  (void)inner_->collect(written_);
  const RegionUse use(region_, "collect");
  std::uint64_t reported = 0;
  sent_.look(use, "collect", region_->pages(), &written_, [&](std::uint64_t page, std::uint64_t xxh3) {
    const std::uint64_t sent = sent_.remembered(page).load(std::memory_order_relaxed);
    if (sent == 0 || sent != xxh3) {
      sent_.remembered(page).store(0, std::memory_order_relaxed);
      dirty.set(PageNumber{page});
      ++reported;
    }
    written_.clear(PageNumber{page});
  });
  region_->check_attached("collect");
  return reported;
}

void SentDiffTracker::sent(PageNumber page, std::uint64_t xxh3) {
  if (page.value >= region_->capacity_pages()) throw std::out_of_range("sent: page outside the region");
  sent_.remembered(page.value).store(xxh3, std::memory_order_relaxed);
  if (inner_->wants_sent()) inner_->sent(page, xxh3);
}

}  // namespace memferry
