// Memory for tests that unmap parts of it. Kept far below everything else, since a hole among the process's
// other mappings is where the next mmap of anybody goes: the C library's, a sanitizer's, the code's under test.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "os/mapping.h"

namespace memferry {

class LonelyMapping {
 public:
  explicit LonelyMapping(std::uint64_t bytes, int protection = PROT_READ | PROT_WRITE) : bytes_(bytes) {
    // mmap takes the highest gap that is large enough: 64 GiB lower there is nothing that it would reach.
    constexpr std::uint64_t kFar = 64ULL << 30;
    const Mapping top = Mapping::anonymous(bytes);
    for (std::uint64_t distance = kFar; distance < 4 * kFar; distance += kFar / 8) {
      void* const wanted = reinterpret_cast<void*>(top.start().value - distance);
      void* const got = ::mmap(wanted, bytes, protection,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, -1, 0);
      if (got == MAP_FAILED) continue;
      data_ = static_cast<std::byte*>(got);
      return;
    }
    throw std::runtime_error("no place for a lonely mapping");
  }
  ~LonelyMapping() { ::munmap(data_, bytes_); }
  LonelyMapping(const LonelyMapping&) = delete;
  LonelyMapping& operator=(const LonelyMapping&) = delete;

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::uint64_t size() const { return bytes_; }
  [[nodiscard]] Address start() const { return Address::of(data_); }

 private:
  std::byte* data_ = nullptr;
  std::uint64_t bytes_;
};

}  // namespace memferry
