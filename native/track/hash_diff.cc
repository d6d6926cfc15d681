#include "track/hash_diff.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "page/hash.h"

namespace memferry {

namespace {

// Between two looks at whether the region is being retired: about 100 us.
constexpr std::uint64_t kPagesAtOnce = 256;

std::uint64_t hash_of_zeros(std::uint64_t page_size) {
  const std::vector<std::byte> zeros(page_size);
  return xxh3_64(zeros);
}

std::uint64_t whole_pages(std::uint64_t bytes) {
  const std::uint64_t page_size = system_page_size();
  return std::max(page_size, (bytes + page_size - 1) / page_size * page_size);
}

}  // namespace

HashDiffTracker::HashDiffTracker(std::shared_ptr<Region> region)
    : region_(std::move(region)),
      zero_page_hash_(hash_of_zeros(region_->page_size())),
      baselines_(Mapping::anonymous(whole_pages(region_->capacity_pages() * sizeof(std::uint64_t)))) {
  static_assert(sizeof(std::atomic<std::uint64_t>) == sizeof(std::uint64_t));
}

std::atomic<std::uint64_t>& HashDiffTracker::baseline(std::uint64_t page) const {
  return reinterpret_cast<std::atomic<std::uint64_t>*>(baselines_.data())[page];
}

template <typename Visit>
void HashDiffTracker::hash_range(const RegionUse& use, std::uint64_t first, std::uint64_t end, Visit visit) {
  const std::uint64_t page_size = region_->page_size();
  std::uint64_t hashes[kPagesAtOnce];
  const auto hash_pages_of = [&](std::uint64_t from, std::uint64_t to) {
    while (from < to) {
      if (use.revoked()) throw RegionGone("hash-diff");
      reader_.reset();
      const auto bytes = reader_.read(*region_, {PageNumber{from}, std::min(kPagesAtOnce, to - from)});
      const std::uint64_t count = bytes.size() / page_size;
      hash_pages(bytes, page_size, hashes);
      for (std::uint64_t i = 0; i < count; ++i) visit(from + i, hashes[i]);
      from += count;
    }
  };
  // A page of several of the system's may be empty in parts.
  if (page_size != system_page_size()) return hash_pages_of(first, end);
  // A page that is found empty is zeros at that moment, which lies within this call.
  std::uint64_t at = first;
  const auto zeros_up_to = [&](std::uint64_t to) {
    for (; at < to; ++at) visit(at, zero_page_hash_);
  };
  contents_.visit(*region_, {PageNumber{first}, end - first}, [&](PageRun run) {
    zeros_up_to(run.first.value);
    hash_pages_of(at, run.end().value);
    at = run.end().value;
  });
  zeros_up_to(end);
}

void HashDiffTracker::arm() {
  const RegionUse use(region_, "arm");
  armed_ = false;
  const std::uint64_t pages = region_->pages();
  hash_range(use, 0, pages, [&](std::uint64_t page, std::uint64_t hash) {
    baseline(page).store(hash, std::memory_order_relaxed);
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
  hash_range(use, 0, pages, [&](std::uint64_t page, std::uint64_t hash) {
    const std::uint64_t former = baseline(page).exchange(hash, std::memory_order_relaxed);
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
  baseline(page.value).store(xxh3, std::memory_order_relaxed);
}

}  // namespace memferry
