// Dropping pages from memory, so that they are missing (or zeros) again. Thousands of single pages are
// dropped while the guest is paused, so it goes many ranges a system call where the kernel can (Linux 6.13:
// process_madvise() on oneself), which halves the time and more.
//
// Threads: one at a time for each object.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "os/unique_fd.h"
#include "page/region.h"

namespace memferry {

struct Backing {
  static const Backing kPrivate;  // private anonymous: MADV_DONTNEED leaves a hole that reads as zeros
  static const Backing kShared;   // DONTNEED would only unmap it: the content is punched out (MADV_REMOVE)

  bool shared = false;
  // Of reserved huge pages: so large. A part of one cannot be dropped (kernels differ in whether it says so): zeros are
  // written there.
  std::uint64_t huge_bytes = 0;
  bool operator==(const Backing&) const = default;
};
inline constexpr Backing Backing::kPrivate{};
inline constexpr Backing Backing::kShared{.shared = true};

// How the memory of a region is mapped. Throws std::invalid_argument for private mappings of files, which
// have no way to become zeros, and for ranges that are not mapped.
[[nodiscard]] Backing backing_of(const Region& region);

class Discarder {
 public:
  explicit Discarder(Backing backing);

  // Collects ranges; when many have come together they are dropped at once.
  void add(Address start, std::uint64_t bytes);
  // Drops the rest. Both throw SystemError (madvise): locked memory, for one.
  void flush();
  [[nodiscard]] Backing backing() const { return backing_; }

 private:
  void one(Address start, std::uint64_t bytes) const;
  void huge(Address start, std::uint64_t bytes) const;

  Backing backing_;
  UniqueFd self_;  // a pidfd, where the kernel has no name for "this process"
  int target_ = -1;
  bool batched_ = false;
  std::vector<iovec> ranges_;
};

}  // namespace memferry
