// Pages, runs of pages and addresses as distinct types: a page number of a region, an address in this
// process and an address in another process never convert into one another silently.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>

#include "os/address.h"

namespace memferry {

// Index of a page inside one region, counted from the region's first page.
struct PageNumber {
  std::uint64_t value = 0;
  friend auto operator<=>(const PageNumber&, const PageNumber&) = default;
};

// Pages [first, first + count) of one region.
struct PageRun {
  PageNumber first;
  std::uint64_t count = 0;
  [[nodiscard]] PageNumber end() const { return PageNumber{first.value + count}; }
  friend bool operator==(const PageRun&, const PageRun&) = default;
};

}  // namespace memferry
