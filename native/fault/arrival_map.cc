#include "fault/arrival_map.h"

#include <stdexcept>
#include <vector>

namespace memferry {

ArrivalMap::ArrivalMap(std::shared_ptr<Region> region, bool memory_is_empty, bool keep_hashes)
    : received(region->capacity_pages()),
      present(region->capacity_pages()),
      zero(region->capacity_pages()),
      suspect(region->capacity_pages()),
      arriving(region->capacity_pages()),
      unnamed(region->capacity_pages()),
      lost(region->capacity_pages()),
      poisoned(region->capacity_pages()),
      failing(region->capacity_pages()),
      region_(std::move(region)),
      pages_(region_->pages()) {
  if (!memory_is_empty) present.set_run({PageNumber{0}, pages()});
  if (!keep_hashes) return;
  const std::vector<std::byte> zeros(page_size());
  zero_hash_ = xxh3_64(zeros);
  // Not touched until pages arrive: a WebAssembly memory may reserve far more than it ever uses.
  hashes_.reset(new std::uint64_t[region_->capacity_pages()]);
}

void ArrivalMap::grow(std::uint64_t pages, bool memory_is_empty) {
  const std::uint64_t former = this->pages();
  if (pages <= former) return;
  if (!memory_is_empty) present.set_run({PageNumber{former}, pages - former});
  pages_.store(pages, std::memory_order_release);
}

std::uint64_t ArrivalMap::extra_bytes() const {
  return 8 * received.words() * sizeof(std::uint64_t) + (hashes_ ? pages() * sizeof(std::uint64_t) : 0);
}

void ArrivalMap::keep_hashes(PageRun run, std::span<const std::uint64_t> hashes) {
  if (!hashes_) return;
  for (std::uint64_t i = 0; i < run.count; ++i) {
    std::atomic_ref(hashes_[run.first.value + i]).store(hashes[i], std::memory_order_relaxed);
  }
}

void ArrivalMap::keep_zero_hashes(PageRun run) {
  if (!hashes_) return;
  for (std::uint64_t page = run.first.value; page < run.end().value; ++page) {
    std::atomic_ref(hashes_[page]).store(zero_hash_, std::memory_order_relaxed);
  }
}

Hash128 ArrivalMap::digest() const {
  if (!hashes_) throw std::logic_error("page hashes are not kept");
  // Copied first: relaxed stores of the receiving threads and a plain read would race.
  std::vector<std::uint64_t> all(pages());
  for (std::uint64_t page = 0; page < all.size(); ++page) {
    // A page that never arrived has no hash; it counts as 0, which no digest of the source will match.
    all[page] =
        received.test(PageNumber{page}) ? std::atomic_ref(hashes_[page]).load(std::memory_order_relaxed) : 0;
  }
  return xxh3_128(std::as_bytes(std::span(all)));
}

}  // namespace memferry
