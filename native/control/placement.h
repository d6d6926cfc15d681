// Whether VMD servers that were named have room for a guest: src/staging/placement.ts in C++, for a list that is taken as it
// is (test/embed/commit-twin.test.ts compares the two). Pure.
#pragma once

#include <cstdint>
#include <vector>

namespace memferry::control {

struct PlacementNeed {
  std::uint64_t bytes = 0;           // of the guest, without the index
  std::uint64_t capacity_pages = 0;  // what the index is made for
  unsigned replicas = 1;
};

// `free_bytes`: of each server, in the list's order; the first four hold the index. Throws Failure (VMD_CAPACITY) with the
// numbers.
void must_hold(const PlacementNeed& need, const std::vector<std::uint64_t>& free_bytes);

}  // namespace memferry::control
