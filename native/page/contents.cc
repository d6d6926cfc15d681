#include "page/contents.h"

#include <algorithm>
#include <vector>

#include "os/process_maps.h"

namespace memferry {
namespace {

// Memory in which a page that is not in its owner's page table reads as zeros: private and anonymous. A shared mapping
// may have been filled through another one, a file's pages come from the file.
std::vector<AddressRange> zero_fill_ranges(OwnerAddress start, std::uint64_t bytes, const Process* owner) {
  std::vector<AddressRange> ranges;
  const OwnerAddress end = start.plus(bytes);
  for_each_mapped_area(
      [&](const MappedArea& area) {
        if (area.start >= end) return false;
        const bool anonymous = area.name.empty() || area.name.front() == '[';
        if (area.end > start && anonymous && !area.shared) {
          ranges.push_back({std::max(area.start, start), std::min(area.end, end)});
        }
        return true;
      },
      owner);
  return ranges;
}

}  // namespace

Pagemap& OwnerPagemap::of(const Region& region) {
  if (!region.owner()) return own_ ? *own_ : own_.emplace(runs_at_once_);
  if (other_ != region.owner()) {
    other_ = region.owner();
    others_.reset();
  }
  return others_ ? *others_ : others_.emplace(other_, runs_at_once_);
}

void Contents::visit(const Region& region, PageRun run, const std::function<void(PageRun)>& found,
                     bool zero_fill) {
  if (run.count == 0) return;
  const bool by_file = region.file_content(run, found);
  if (by_file) return;
  const std::uint64_t page_size = region.page_size();
  for (PageRun left = run; left.count > 0;) {
    const PageRun part = region.contiguous_run(left);
    const OwnerAddress start = region.owner_address(part.first);
    const auto page_of = [&](OwnerAddress address) {
      return PageNumber{part.first.value + (address.value - start.value) / page_size};
    };
    // Everything has content but what lies in zero-filled memory and is not populated.
    PageNumber told = part.first;
    const auto tell_up_to = [&](PageNumber end) {
      if (told < end) found({told, end.value - told.value});
      told = std::max(told, end);
    };
    const std::uint64_t bytes = part.count * page_size;
    const std::vector<AddressRange> all_zeros = zero_fill
                                                    ? std::vector<AddressRange>{{start, start.plus(bytes)}}
                                                    : zero_fill_ranges(start, bytes, region.owner().get());
    for (const AddressRange& zeros : all_zeros) {
      tell_up_to(page_of(zeros.start));
      pagemap_.of(region).populated(zeros.start, zeros.end.value - zeros.start.value,
                                    [&](AddressRange range) {
                                      told = page_of(range.start);
                                      tell_up_to(page_of(range.end));
                                    });
      told = page_of(zeros.end);
    }
    tell_up_to(part.end());
    left = {part.end(), left.count - part.count};
  }
}

}  // namespace memferry
