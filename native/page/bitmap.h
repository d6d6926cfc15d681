// A bitmap over the pages of a region, safe for concurrent use by native threads. Its capacity is fixed
// when it is made (a region's capacity in pages), so that growth never moves it.
//
// A page or run beyond the capacity throws std::out_of_range; `end` of a search is cut to the capacity.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "page/range.h"

namespace memferry {

class AtomicBitmap {
 public:
  explicit AtomicBitmap(std::uint64_t capacity_pages);

  [[nodiscard]] std::uint64_t capacity() const { return capacity_; }
  [[nodiscard]] bool test(PageNumber page) const;
  // Both give the bit's former value.
  bool set(PageNumber page);
  bool clear(PageNumber page);
  // Both give the number of bits that they changed.
  std::uint64_t set_run(PageRun run);
  std::uint64_t clear_run(PageRun run);
  [[nodiscard]] std::uint64_t count() const;  // set bits
  [[nodiscard]] std::uint64_t count(PageRun run) const;

  // The first maximal run of set (clear) bits in [from, end), cut to at most `max_pages`.
  [[nodiscard]] std::optional<PageRun> next_set(PageNumber from, PageNumber end,
                                                std::uint64_t max_pages) const;
  [[nodiscard]] std::optional<PageRun> next_clear(PageNumber from, PageNumber end,
                                                  std::uint64_t max_pages) const;

  // Those of `run` from its first on whose bits are as that one's; run.count > 0.
  [[nodiscard]] PageRun alike(PageRun run) const;

  // Takes (clears) the first run of set bits at or after `from`, of at most `max_pages`. Two takers never
  // get the same page.
  std::optional<PageRun> take_run(PageNumber from, PageNumber end, std::uint64_t max_pages);

  // Whole 64-page words, for the wire (little-endian) and for merging.
  [[nodiscard]] std::uint64_t words() const { return (capacity_ + 63) / 64; }
  [[nodiscard]] std::uint64_t word(std::uint64_t index) const;
  void or_word(std::uint64_t index, std::uint64_t bits);  // bits beyond the capacity are ignored

 private:
  std::uint64_t capacity_;
  std::unique_ptr<std::atomic<std::uint64_t>[]> words_;
};

}  // namespace memferry
