// An address in this process, as the kernel's ioctls want it: a type of its own, so that it never silently
// becomes a page number or an address in another process.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>

namespace memferry {

struct Address {
  std::uint64_t value = 0;
  [[nodiscard]] static Address of(const void* pointer) {
    return Address{reinterpret_cast<std::uintptr_t>(pointer)};
  }
  [[nodiscard]] std::byte* pointer() const {
    return reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(value));
  }
  [[nodiscard]] Address plus(std::uint64_t bytes) const { return Address{value + bytes}; }
  friend auto operator<=>(const Address&, const Address&) = default;
};

}  // namespace memferry
