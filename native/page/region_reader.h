// A guest's bytes for reading, wherever its memory is: as it lies where this process sees it and it stays there
// (F_SEAL_SHRINK), else copied from the owner or its file, in large pieces.
//
// Threads: one a RegionReader.
#pragma once

#include <cstddef>
#include <deque>
#include <span>
#include <vector>

#include "page/region.h"

namespace memferry {

class RegionReader {
 public:
  // The bytes of region.contiguous_run(run), in full: who asks bounds the run. Copies live until reset(). Throws
  // SystemError (EFAULT: a page that cannot be read), OwnerGone.
  std::span<const std::byte> read(const Region& region, PageRun run) {
    return region.remote() || region.may_shrink() ? copy(region, run) : region.contiguous(run);
  }
  void reset() { used_ = 0; }
  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  std::span<const std::byte> copy(const Region& region, PageRun run);
  std::deque<std::vector<std::byte>> copies_;
  std::size_t used_ = 0;
};

}  // namespace memferry
