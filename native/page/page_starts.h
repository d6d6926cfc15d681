// Which pages begin with zeros, for memory that has to be copied to be read: a cache line of each, a thousand pages a
// system call. (A page read whole costs ten times that, and nearly every page that has content shows it at once.)
//
// Threads: one a PageStarts.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "page/region.h"

namespace memferry {

class PageStarts {
 public:
  static constexpr std::uint64_t kAtOnce = 1024;  // of one process_vm_readv
  static constexpr std::size_t kBytes = 64;

  // Visits the pages of `run`, of at most kAtOnce, that may be zeros, in order: all where a look costs nothing, or where
  // it is not to be had. Throws OwnerGone; SystemError: the file of huge pages has become shorter.
  void visit_zero(const Region& region, PageRun run, const std::function<void(PageNumber)>& visit);

 private:
  void visit_zero_in_file(const Region& region, PageRun run, const std::function<void(PageNumber)>& visit);
  // How many of the pages from the first of `at_` on were read.
  std::size_t read(const Region& region, std::size_t first);
  std::vector<iovec> at_;
  std::vector<std::byte> starts_;
};

}  // namespace memferry
