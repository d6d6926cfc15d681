#include "fault/begin_paging.h"

#include <cerrno>
#include <string>
#include <vector>

#include "os/process_maps.h"

namespace memferry {

void begin_paging(Region& region) {
  if (region.huge_page_bytes() != 0) {
    throw SystemError(
        "page: the memory of process " + std::to_string(region.owner()->pid()) +
            " is made of reserved huge pages, which a file is not served into; a migration pages them",
        EOPNOTSUPP);
  }
  std::uint64_t registered = 0;
  for_each_paged_area(
      [&](OwnerAddress start, OwnerAddress end) {
        region.for_each_run_between(start, end, [&](PageRun run) { registered += run.count; });
      },
      region.owner().get());
  for (const Extent& extent : region.extents()) region.uffd()->register_missing(extent.start, extent.bytes);
  if (registered == region.pages()) return;
  // After it: what was not there then is not there until it is brought.
  std::vector<PageRun> there;
  try {
    there = region.pages_there();
    if (there.empty()) {
      region.drop_reserved();
      return;
    }
  } catch (...) {
    for (const Extent& extent : region.extents()) (void)region.uffd()->unregister(extent.start, extent.bytes);
    throw;
  }
  for (const Extent& extent : region.extents()) (void)region.uffd()->unregister(extent.start, extent.bytes);
  std::uint64_t pages = 0;
  for (const PageRun run : there) pages += run.count;
  throw SystemError("page: " + std::to_string(pages) + " pages of the memory of process " +
                        std::to_string(region.owner()->pid()) + " are there already, page " +
                        std::to_string(there.front().first.value) +
                        " first: it must be untouched, reads included, before it is paged",
                    EEXIST);
}

}  // namespace memferry
