#include "page/zero.h"

#include <cstdint>
#include <cstring>

#include "page/racy_read.h"

namespace memferry {

namespace {

constexpr std::size_t kBlock = 256;

std::uint64_t load(const std::byte* from) {
  std::uint64_t value = 0;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Four independent sums, which compilers turn into vector registers.
bool block_is_zero(const std::byte* from) {
  std::uint64_t sums[4] = {};
  for (std::size_t i = 0; i < kBlock; i += 32) {
    for (std::size_t lane = 0; lane < 4; ++lane) sums[lane] |= load(from + i + lane * 8);
  }
  return (sums[0] | sums[1] | sums[2] | sums[3]) == 0;
}

bool all_zero(std::span<const std::byte> bytes) {
  const std::byte* at = bytes.data();
  const std::byte* const end = at + bytes.size();
  // Most pages that are not zeros show it in their first word.
  if (bytes.size() >= 8 && load(at) != 0) return false;
  for (; end - at >= static_cast<std::ptrdiff_t>(kBlock); at += kBlock) {
    if (!block_is_zero(at)) return false;
  }
  for (; at < end; ++at) {
    if (*at != std::byte{0}) return false;
  }
  return true;
}

}  // namespace

bool is_zero(std::span<const std::byte> bytes) { return all_zero(RacyView(bytes).bytes()); }

}  // namespace memferry
