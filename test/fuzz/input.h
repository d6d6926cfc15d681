// What all fuzzers have in common: an input that is read from its front, and an assertion that stays.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>

namespace memferry::fuzz {

inline void require(bool holds) {
  if (!holds) std::abort();
}

// Behind its end it is zeros.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : left_(std::as_bytes(std::span(data, size))) {}
  [[nodiscard]] bool empty() const { return left_.empty(); }
  template <typename T>
  T take() {
    T value{};
    const auto part = bytes(sizeof value);
    if (!part.empty()) std::memcpy(&value, part.data(), part.size());
    return value;
  }
  std::uint8_t byte() { return take<std::uint8_t>(); }
  std::span<const std::byte> bytes(std::size_t most) {
    const auto part = left_.first(std::min(most, left_.size()));
    left_ = left_.subspan(part.size());
    return part;
  }
  std::span<const std::byte> rest() { return bytes(left_.size()); }

 private:
  std::span<const std::byte> left_;
};

}  // namespace memferry::fuzz
