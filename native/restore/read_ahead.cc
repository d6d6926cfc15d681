#include "restore/read_ahead.h"

#include <algorithm>

namespace memferry {

namespace {

// Pages that were there already raise no fault: a walk may skip so many.
constexpr std::uint64_t kSkipped = 4;

}  // namespace

ReadAhead::ReadAhead(std::uint64_t page_size, std::uint64_t pages)
    : pages_(pages),
      at_once_(std::max<std::uint64_t>(1, kAtOnceBytes / page_size)),
      first_(std::max<std::uint64_t>(1, kFirstBytes / page_size)),
      most_(std::max<std::uint64_t>(1, kMostBytes / page_size)) {}

ReadAhead::Advice ReadAhead::advise(Walk& walk, std::uint64_t page, std::uint64_t ahead) const {
  const std::uint64_t total = std::min(ahead, pages_ - page);
  const std::uint64_t now = std::min(total, at_once_);
  walk.next = page + 1;
  walk.end = page + total;
  walk.ahead = ahead;
  return {now, {PageNumber{page + now}, total - now}};
}

ReadAhead::Advice ReadAhead::fault(PageNumber page) {
  ++uses_;
  Walk* oldest = &walks_[0];
  for (Walk& walk : walks_) {
    if (walk.last_use < oldest->last_use) oldest = &walk;
    if (walk.end == 0) continue;
    // Inside of what was advised: it has overtaken the background. Behind it: all of that has been used.
    const bool inside = page.value >= walk.next && page.value < walk.end;
    const bool behind = page.value >= walk.end && page.value <= walk.end + kSkipped;
    if (!inside && !behind) continue;
    walk.last_use = uses_;
    return advise(walk, page.value, inside ? walk.ahead : std::clamp(walk.ahead * 2, first_, most_));
  }
  *oldest = {page.value + 1, page.value + 1, 1, uses_};
  return {};
}

}  // namespace memferry
