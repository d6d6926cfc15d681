#include "page/diff.h"

#include <cstring>
#include <stdexcept>

#include "page/racy_read.h"

namespace memferry {

std::vector<PageRun> diff_pages(std::span<const std::byte> a, std::span<const std::byte> b,
                                std::uint64_t page_size) {
  if (a.size() != b.size() || page_size == 0 || a.size() % page_size != 0) {
    throw std::invalid_argument("diff_pages: not two buffers of equally many whole pages");
  }
  const std::uint64_t pages = a.size() / page_size;
  std::vector<PageRun> runs;
  for (std::uint64_t page = 0; page < pages; ++page) {
    const RacyView left(a.subspan(page * page_size, page_size));
    const RacyView right(b.subspan(page * page_size, page_size));
    if (std::memcmp(left.bytes().data(), right.bytes().data(), page_size) == 0) continue;
    if (!runs.empty() && runs.back().end().value == page) {
      ++runs.back().count;
    } else {
      runs.push_back(PageRun{PageNumber{page}, 1});
    }
  }
  return runs;
}

}  // namespace memferry
