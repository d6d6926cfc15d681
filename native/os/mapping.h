// An mmap with one owner, unmapped when the owner goes.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "os/address.h"

namespace memferry {

// The kernel's base page size.
[[nodiscard]] std::uint64_t system_page_size();

class Mapping {
 public:
  Mapping() = default;
  // Private anonymous memory, zeros until it is written. Throws SystemError (mmap).
  static Mapping anonymous(std::uint64_t bytes, int protection = PROT_READ | PROT_WRITE, int extra_flags = 0);
  // `fd` from `offset` on, shared. Throws SystemError (mmap).
  static Mapping shared(int fd, std::uint64_t bytes, std::uint64_t offset = 0,
                        int protection = PROT_READ | PROT_WRITE, int extra_flags = 0);

  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { reset(); }

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::uint64_t size() const { return bytes_; }
  [[nodiscard]] Address start() const { return Address::of(data_); }
  [[nodiscard]] std::span<std::byte> bytes() const { return {data_, static_cast<std::size_t>(bytes_)}; }
  explicit operator bool() const { return data_ != nullptr; }
  // The caller unmaps from now on.
  std::byte* release();
  void reset();

 private:
  Mapping(std::byte* data, std::uint64_t bytes) : data_(data), bytes_(bytes) {}
  std::byte* data_ = nullptr;
  std::uint64_t bytes_ = 0;
};

}  // namespace memferry
