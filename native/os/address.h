// Addresses, as the kernel's ioctls want them: types of their own, so that they never silently become page numbers,
// and an address in another process never becomes one in this process.
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

// An address in the process that owns the memory, which may be this one or another: nothing that can be followed.
struct OwnerAddress {
  std::uint64_t value = 0;
  OwnerAddress() = default;
  explicit OwnerAddress(std::uint64_t at) : value(at) {}
  // NOLINTNEXTLINE(google-explicit-constructor,hicpp-explicit-conversions): where this process owns the memory itself
  OwnerAddress(Address own) : value(own.value) {}
  [[nodiscard]] OwnerAddress plus(std::uint64_t bytes) const { return OwnerAddress{value + bytes}; }
  friend auto operator<=>(const OwnerAddress&, const OwnerAddress&) = default;
};

}  // namespace memferry
