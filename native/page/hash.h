// The fast hash of pages: XXH3, compiled for the widest vectors that pay and chosen at run time. It finds
// accidents, not attacks. All of these may read pages that a guest is writing: the hash is then that of some
// mixture of old and new bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace memferry {

// XXH3_64bits of the bytes, seed 0: what every implementation of XXH3 gives.
[[nodiscard]] std::uint64_t xxh3_64(std::span<const std::byte> bytes);

struct Hash128 {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  friend bool operator==(const Hash128&, const Hash128&) = default;
};
[[nodiscard]] Hash128 xxh3_128(std::span<const std::byte> bytes);

// XXH3_64bits of each page of `bytes` (a multiple of page_size) into out[0 .. bytes/page_size).
void hash_pages(std::span<const std::byte> bytes, std::uint64_t page_size, std::uint64_t* out);

// "avx2", "sse2", "neon", "scalar": what was chosen on this machine.
[[nodiscard]] const char* hash_implementation();

}  // namespace memferry
