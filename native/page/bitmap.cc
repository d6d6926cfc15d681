#include "page/bitmap.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace memferry {

namespace {

constexpr std::uint64_t kBits = 64;
constexpr std::uint64_t kAll = ~0ULL;

// Bits [low, high) of a word; low < high <= 64.
constexpr std::uint64_t mask_of(std::uint64_t low, std::uint64_t high) {
  return (kAll << low) & (kAll >> (kBits - high));
}

// A bound that holds in release builds too: page numbers may stem from a peer, however carefully checked.
void check_run(PageNumber first, std::uint64_t count, std::uint64_t capacity) {
  if (first.value > capacity || count > capacity - first.value) {
    throw std::out_of_range("page run beyond the bitmap's capacity");
  }
}

// Calls visit(word index, mask) for each word that [first, end) touches.
template <typename Visit>
void for_each_word(std::uint64_t first, std::uint64_t end, Visit visit) {
  while (first < end) {
    const std::uint64_t word = first / kBits;
    const std::uint64_t low = first % kBits;
    const std::uint64_t high = std::min(kBits, low + (end - first));
    visit(word, mask_of(low, high));
    first += high - low;
  }
}

// The first page in [from, end) whose bit, XORed with `flip`, is 1; `end` when there is none.
std::uint64_t find_one(const std::atomic<std::uint64_t>* words, std::uint64_t from, std::uint64_t end,
                       std::uint64_t flip) {
  while (from < end) {
    const std::uint64_t bits = (words[from / kBits].load(std::memory_order_acquire) ^ flip) >> (from % kBits);
    if (bits != 0) return std::min(end, from + static_cast<std::uint64_t>(std::countr_zero(bits)));
    from += kBits - from % kBits;
  }
  return end;
}

std::optional<PageRun> next_run(const std::atomic<std::uint64_t>* words, std::uint64_t from,
                                std::uint64_t end, std::uint64_t max_pages, std::uint64_t flip) {
  const std::uint64_t first = find_one(words, from, end, flip);
  if (first >= end || max_pages == 0) return std::nullopt;
  const std::uint64_t limit = max_pages < end - first ? first + max_pages : end;
  const std::uint64_t last = find_one(words, first, limit, ~flip);
  // The bit may have been flipped by another thread meanwhile; it was as we report when we looked first.
  return PageRun{PageNumber{first}, std::max<std::uint64_t>(last - first, 1)};
}

}  // namespace

AtomicBitmap::AtomicBitmap(std::uint64_t capacity_pages)
    : capacity_(capacity_pages),
      words_(new std::atomic<std::uint64_t>[(capacity_pages + kBits - 1) / kBits]()) {}

bool AtomicBitmap::test(PageNumber page) const {
  check_run(page, 1, capacity_);
  return ((words_[page.value / kBits].load(std::memory_order_acquire) >> (page.value % kBits)) & 1) != 0;
}

bool AtomicBitmap::set(PageNumber page) {
  check_run(page, 1, capacity_);
  const std::uint64_t bit = 1ULL << (page.value % kBits);
  return (words_[page.value / kBits].fetch_or(bit, std::memory_order_acq_rel) & bit) != 0;
}

bool AtomicBitmap::clear(PageNumber page) {
  check_run(page, 1, capacity_);
  const std::uint64_t bit = 1ULL << (page.value % kBits);
  return (words_[page.value / kBits].fetch_and(~bit, std::memory_order_acq_rel) & bit) != 0;
}

std::uint64_t AtomicBitmap::set_run(PageRun run) {
  check_run(run.first, run.count, capacity_);
  std::uint64_t changed = 0;
  for_each_word(run.first.value, run.end().value, [&](std::uint64_t word, std::uint64_t mask) {
    const std::uint64_t former = words_[word].fetch_or(mask, std::memory_order_acq_rel);
    changed += static_cast<std::uint64_t>(std::popcount(mask & ~former));
  });
  return changed;
}

std::uint64_t AtomicBitmap::clear_run(PageRun run) {
  check_run(run.first, run.count, capacity_);
  std::uint64_t changed = 0;
  for_each_word(run.first.value, run.end().value, [&](std::uint64_t word, std::uint64_t mask) {
    const std::uint64_t former = words_[word].fetch_and(~mask, std::memory_order_acq_rel);
    changed += static_cast<std::uint64_t>(std::popcount(mask & former));
  });
  return changed;
}

std::uint64_t AtomicBitmap::count() const {
  std::uint64_t set = 0;
  for (std::uint64_t i = 0; i < words(); ++i) {
    set += static_cast<std::uint64_t>(std::popcount(words_[i].load(std::memory_order_acquire)));
  }
  return set;
}

std::uint64_t AtomicBitmap::count(PageRun run) const {
  check_run(run.first, run.count, capacity_);
  std::uint64_t set = 0;
  for_each_word(run.first.value, run.end().value, [&](std::uint64_t word, std::uint64_t mask) {
    set += static_cast<std::uint64_t>(std::popcount(words_[word].load(std::memory_order_acquire) & mask));
  });
  return set;
}

std::optional<PageRun> AtomicBitmap::next_set(PageNumber from, PageNumber end,
                                              std::uint64_t max_pages) const {
  return next_run(words_.get(), from.value, std::min(end.value, capacity_), max_pages, 0);
}

std::optional<PageRun> AtomicBitmap::next_clear(PageNumber from, PageNumber end,
                                                std::uint64_t max_pages) const {
  return next_run(words_.get(), from.value, std::min(end.value, capacity_), max_pages, kAll);
}

// A word is taken from by compare-and-exchange, never by taking more and giving back: a bit that is neither
// set nor anybody's would make another thread believe that nothing is left.
PageRun AtomicBitmap::alike(PageRun run) const {
  const auto change =
      test(run.first) ? next_clear(run.first, run.end(), 1) : next_set(run.first, run.end(), 1);
  return {run.first, (change ? change->first.value : run.end().value) - run.first.value};
}

std::optional<PageRun> AtomicBitmap::take_run(PageNumber from, PageNumber end, std::uint64_t max_pages) {
  const std::uint64_t limit = std::min(end.value, capacity_);
  if (max_pages == 0) return std::nullopt;
  std::uint64_t at = from.value;
  std::uint64_t first = 0;
  std::uint64_t taken = 0;
  while (at < limit && taken < max_pages) {
    std::atomic<std::uint64_t>& word = words_[at / kBits];
    std::uint64_t value = word.load(std::memory_order_acquire);
    const std::uint64_t base = at - at % kBits;
    std::uint64_t low = 0;
    std::uint64_t high = 0;
    do {
      const std::uint64_t bits = value >> (at % kBits);
      const std::uint64_t skipped = static_cast<std::uint64_t>(std::countr_zero(bits));
      low = at % kBits + (bits == 0 ? 0 : skipped);
      if (bits == 0 || base + low >= limit || (taken > 0 && skipped > 0)) {
        high = low;
        break;
      }
      const std::uint64_t ones = static_cast<std::uint64_t>(std::countr_one(value >> low));
      high = low + std::min({ones, max_pages - taken, limit - (base + low)});
    } while (!word.compare_exchange_weak(value, value & ~mask_of(low, high), std::memory_order_acq_rel,
                                         std::memory_order_acquire));
    if (low == high) {
      if (taken > 0) break;  // the run ended with the former word
    } else {
      if (taken == 0) first = base + low;
      taken += high - low;
      if (high < kBits) break;
    }
    at = base + kBits;
  }
  if (taken == 0) return std::nullopt;
  return PageRun{PageNumber{first}, taken};
}

std::uint64_t AtomicBitmap::word(std::uint64_t index) const {
  if (index >= words()) throw std::out_of_range("word beyond the bitmap's capacity");
  return words_[index].load(std::memory_order_acquire);
}

void AtomicBitmap::or_word(std::uint64_t index, std::uint64_t bits) {
  if (index >= words()) throw std::out_of_range("word beyond the bitmap's capacity");
  const std::uint64_t valid = std::min(kBits, capacity_ - index * kBits);
  words_[index].fetch_or(bits & mask_of(0, valid), std::memory_order_acq_rel);
}

}  // namespace memferry
