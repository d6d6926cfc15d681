// A run of pages as what differs from bytes that the receiver has: the format of a kFlagDelta payload.
//
//   payload = { skip varint, length varint, length bytes }..., the last with length 0
//
// `skip` bytes stay as they are, then `length` bytes are replaced; positions go on over the pages of the run, and all
// of them together come to its end exactly. Varints are little-endian groups of 7 bits, at most 5 bytes.
//
// Pure; any thread. Neither side's bytes may change meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace memferry::wire {

class DeltaEncoder {
 public:
  // Room for the deltas and kEndBytes.
  explicit DeltaEncoder(std::span<std::byte> out) : out_(out) {}
  static constexpr std::size_t kEndBytes = 6;

  // The next page (its length a multiple of 8). False when its delta would take more than `most` bytes or does not
  // fit: then nothing was added.
  bool add(std::span<const std::byte> base, std::span<const std::byte> now, std::size_t most);
  // Ends the payload; gives its length.
  std::size_t finish();

 private:
  bool put(std::uint64_t skip, std::span<const std::byte> literal, std::size_t end);

  std::span<std::byte> out_;
  std::size_t at_ = 0;
  std::uint64_t skip_ = 0;  // unchanged bytes since the last literal
};

// `pages` hold the base and become the new pages. False when the payload is not a delta of that length: then they are
// as they were.
[[nodiscard]] bool apply_delta(std::span<const std::byte> payload, std::span<std::byte> pages);

}  // namespace memferry::wire
