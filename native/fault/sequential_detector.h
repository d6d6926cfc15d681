// How many pages to ask for when one is missing: one, unless the faults walk forward; then 8, 16 and 32.
// A random reader would pay for neighbours that it does not want (8 pages double its median), a sequential
// one gains up to six times.
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

class SequentialDetector {
 public:
  static constexpr std::uint64_t kFirstWindow = 8;
  static constexpr std::uint64_t kLargestWindow = 32;
  static constexpr std::size_t kWalks = 8;
  // A walk is sure of itself once it is asked for so many pages: from its third fault on.
  static constexpr std::uint64_t kSureWindow = 16;
  // How far a walk that is not sure yet may skip what is here.
  static constexpr std::uint64_t kFirstSkip = 64;

  struct Advice {
    std::uint64_t pages = 1;  // from the faulted page on
    // The page was part of a window asked for before: its content is probably on its way.
    bool expected = false;
    bool walks = false;  // goes on with a walk that is sure of itself
    bool sure = false;   // the first fault of it that is: kBeforeSure before it looked like strays
  };
  static constexpr std::size_t kBeforeSure = 2;

  // A fault at `page` of region `region`, of which `lacking` pages from it on (at least 1) are not here: more
  // is not worth asking for, since the source answers with one run. Pages that arrive by the active push raise no faults, so a walk may
  // skip some: it goes on at any page up to two windows behind the former one, and behind it as far as all is here:
  // `here_before` pages in front of the one that is missing.
  Advice fault(std::uint32_t region, PageNumber page, std::uint64_t lacking = kLargestWindow,
               std::uint64_t here_before = 0);

 private:
  struct Walk {
    std::uint32_t region = 0;
    std::uint64_t first = 0;
    std::uint64_t end = 0;   // of the window asked for last; 0: not in use
    std::uint64_t size = 1;  // what it would have been, had all of it been lacking
    std::uint64_t last_use = 0;
  };
  std::array<Walk, kWalks> walks_{};
  std::uint64_t uses_ = 0;
};

}  // namespace memferry
