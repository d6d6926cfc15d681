// What to bring along when a page is missing: nothing, unless the faults walk forward; then what comes next, up to some
// MiB, the first of it at once and the rest in the background. A page that is there raises no fault, so a walk is heard
// of again only where it has overtaken what was brought.
//
// Several walks are followed at once, one for each thread that reads its own part of the memory.
//
// Threads: none of its own; the caller serialises.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "page/range.h"

namespace memferry {

class ReadAhead {
 public:
  static constexpr std::uint64_t kAtOnceBytes = 128ULL << 10U;
  static constexpr std::uint64_t kFirstBytes = 64ULL << 10U;
  static constexpr std::uint64_t kMostBytes = 4ULL << 20U;
  static constexpr std::size_t kWalks = 8;

  // Pages of `page_size` bytes, `pages` of them.
  ReadAhead(std::uint64_t page_size, std::uint64_t pages);

  struct Advice {
    std::uint64_t at_once = 1;  // from the missing page on, itself included
    PageRun later;              // right behind them; empty: nothing
  };
  Advice fault(PageNumber page);

 private:
  struct Walk {
    std::uint64_t next = 0;   // the page where it would go on
    std::uint64_t end = 0;    // of what was advised for it; 0: not in use
    std::uint64_t ahead = 0;  // pages, of its last advice
    std::uint64_t last_use = 0;
  };
  [[nodiscard]] Advice advise(Walk& walk, std::uint64_t page, std::uint64_t ahead) const;

  std::uint64_t pages_;
  std::uint64_t at_once_;
  std::uint64_t first_;
  std::uint64_t most_;
  std::array<Walk, kWalks> walks_{};
  std::uint64_t uses_ = 0;
};

}  // namespace memferry
