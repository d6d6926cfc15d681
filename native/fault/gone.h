// What ENOENT from UFFDIO_COPY, UFFDIO_ZEROPAGE and UFFDIO_POISON means. The kernel gives it, with nothing done, for a range
// that reaches over the end of a mapping, and mprotect() and madvise() at the owner's make several mappings of one. So a
// range that was refused is tried again in smaller ones, and only a single page can be gone.
//
// Threads: PieceSize one at a time, the function any.
#pragma once

#include <algorithm>
#include <cstdint>

#include "os/address.h"
#include "os/process.h"

namespace memferry {

// How many pages to try at once.
class PieceSize {
 public:
  [[nodiscard]] std::uint64_t most() const { return most_; }
  // `pages` at once were refused. False for one: there is nothing smaller.
  bool refused(std::uint64_t pages) {
    if (pages <= 1) return false;
    most_ = pages / 2;
    return true;
  }
  void went_well() { most_ = most_ > kUnlimited / 2 ? kUnlimited : most_ * 2; }

 private:
  static constexpr std::uint64_t kUnlimited = ~std::uint64_t{0};
  std::uint64_t most_ = kUnlimited;
};

// The kernel knows nothing of the page at `at`: returns when nothing is mapped there any more. What is mapped there, and is
// served by nobody, reads as zeros where it has none: SystemError (ENOENT). OwnerGone.
void confirm_unmapped(const Process& owner, OwnerAddress at, std::uint64_t page_size, const char* operation);

}  // namespace memferry
