#include "track/hash_diff.h"

#include <stdexcept>

namespace memferry {

HashDiffTracker::HashDiffTracker(std::shared_ptr<Region> region)
    : region_(std::move(region)), hashes_(region_) {}

void HashDiffTracker::arm() {
  const RegionUse use(region_, "arm");
  armed_ = false;
  const std::uint64_t pages = region_->pages();
  hashes_.look(use, "hash-diff", pages, nullptr, [&](std::uint64_t page, std::uint64_t hash) {
    hashes_.remembered(page).store(hash, std::memory_order_relaxed);
  });
  armed_pages_ = pages;
  armed_ = true;
}

// A hash is read before its page is reported, so what is written after the hashing differs from the baseline
// and is reported next time, or the sender's sent() replaces the baseline by what really went out.
std::uint64_t HashDiffTracker::collect(AtomicBitmap& dirty) {
  if (!armed_) throw std::logic_error("hash-diff: collect() without arm()");
  const RegionUse use(region_, "collect");
  const std::uint64_t pages = region_->pages();
  if (dirty.capacity() < pages) throw std::invalid_argument("collect: the bitmap is smaller than the region");
  std::uint64_t written = 0;
  hashes_.look(use, "hash-diff", pages, nullptr, [&](std::uint64_t page, std::uint64_t hash) {
    const std::uint64_t former = hashes_.remembered(page).exchange(hash, std::memory_order_relaxed);
    if (former == hash && page < armed_pages_) return;
    dirty.set(PageNumber{page});
    ++written;
  });
  // A file is read by a mapping of its own, and looks the same to it whatever its owner has unmapped or moved.
  region_->check_attached("hash-diff");
  armed_pages_ = pages;
  return written;
}

void HashDiffTracker::disarm() { armed_ = false; }

void HashDiffTracker::sent(PageNumber page, std::uint64_t xxh3) {
  if (page.value >= region_->capacity_pages()) throw std::out_of_range("sent: page outside the region");
  hashes_.remembered(page.value).store(xxh3, std::memory_order_relaxed);
}

}  // namespace memferry
