// Whether VMD servers that were named have room for a guest: src/staging/placement.ts in C++, for a list that is taken as it
// is (test/embed/commit-twin.test.ts compares the two). Pure.
#pragma once

#include <cstdint>
#include <vector>

namespace memferry::control {

struct PlacementNeed {
  std::uint64_t bytes = 0;        // of the guest, without the index
  std::uint64_t index_pages = 0;  // what the index is made for, see index_pages()
  unsigned replicas = 1;
};

// Of a region of that capacity: a slot of a server's memory, a page, indexes pages of one region only.
std::uint64_t index_pages(std::uint64_t capacity_pages, std::uint64_t page_size);

// `free_bytes`: of each server; every one of them holds the index. Throws Failure (VMD_CAPACITY) with the
// numbers.
void must_hold(const PlacementNeed& need, const std::vector<std::uint64_t>& free_bytes);

}  // namespace memferry::control
