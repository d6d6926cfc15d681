#include "fault/sequential_detector.h"

#include <algorithm>

namespace memferry {

SequentialDetector::Advice SequentialDetector::fault(std::uint32_t region, PageNumber page,
                                                     std::uint64_t lacking, std::uint64_t here_before) {
  Walk* oldest = &walks_[0];
  for (Walk& walk : walks_) {
    if (walk.last_use < oldest->last_use) oldest = &walk;
    if (walk.end == 0 || walk.region != region) continue;
    if (page.value > walk.first && page.value < walk.end) {
      walk.last_use = ++uses_;
      return {.pages = 1, .expected = true, .walks = walk.size >= kSureWindow};
    }
    const std::uint64_t reach = walk.size == 1 ? 1 : 2 * walk.size;
    const std::uint64_t skips = walk.size == 1 ? std::min(here_before, kFirstSkip) : here_before;
    if (page.value >= walk.end && (page.value - walk.end < reach || page.value - walk.end <= skips)) {
      const std::uint64_t size = walk.size == 1 ? kFirstWindow : std::min(walk.size * 2, kLargestWindow);
      const std::uint64_t window = std::min(size, lacking);
      walk = {region, page.value, page.value + window, size, ++uses_};
      return {.pages = window, .walks = size >= kSureWindow, .sure = size == kSureWindow};
    }
  }
  *oldest = {region, page.value, page.value + 1, 1, ++uses_};
  return {};
}

}  // namespace memferry
