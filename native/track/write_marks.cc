#include "track/write_marks.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace memferry {

WriteMarks::WriteMarks(std::uint64_t capacity_pages) : capacity_(capacity_pages) {
  if (capacity_pages == 0) throw std::invalid_argument("marks of no pages");
  const std::uint64_t page = system_page_size();
  memory_ = Mapping::anonymous(((capacity_pages + 63) / 64 * 8 + page - 1) / page * page);
}

std::span<std::uint64_t> WriteMarks::words() const {
  return {reinterpret_cast<std::uint64_t*>(memory_.data()), static_cast<std::size_t>((capacity_ + 63) / 64)};
}

void WriteMarks::mark(PageRun run) {
  if (run.first.value > capacity_ || run.count > capacity_ - run.first.value) {
    throw std::out_of_range("marks beyond the region");
  }
  const std::span<std::uint64_t> all = words();
  for (std::uint64_t page = run.first.value; page < run.end().value;) {
    const std::uint64_t bit = page % 64;
    const std::uint64_t count = std::min(64 - bit, run.end().value - page);
    const std::uint64_t mask = (count == 64 ? ~0ULL : (1ULL << count) - 1) << bit;
    std::atomic_ref(all[page / 64]).fetch_or(mask, std::memory_order_release);
    page += count;
  }
}

// A look first: words that nobody marked are never written, so that their memory stays untouched.
void WriteMarks::take(AtomicBitmap& into) {
  const std::span<std::uint64_t> all = words();
  for (std::size_t i = 0; i < all.size(); ++i) {
    const std::atomic_ref word(all[i]);
    if (word.load(std::memory_order_relaxed) == 0) continue;
    into.or_word(i, word.exchange(0, std::memory_order_acquire));
  }
}

void WriteMarks::clear() {
  for (std::uint64_t& word : words()) {
    const std::atomic_ref one(word);
    if (one.load(std::memory_order_relaxed) != 0) one.store(0, std::memory_order_relaxed);
  }
}

}  // namespace memferry
