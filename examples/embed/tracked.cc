// The C++ classes behind the C interface, from the static library: which pages did somebody write? (These classes may
// change with every version; the C interface does not.)
#include <memferry.h>

#include <cstdio>
#include <cstring>

#include "control/tombstones.h"
#include "page/bitmap.h"
#include "page/region.h"
#include "restore/guest_layout.h"
#include "track/dirty_tracker.h"

int main() {
  constexpr std::uint64_t kPages = 1024;
  const auto region = memferry::Region::allocate(kPages * memferry_page_size());
  for (const memferry::TrackerProbe& probe : memferry::probe_trackers()) {
    if (!probe.available) {
      std::printf("%s: %s\n", probe.name.c_str(), probe.reason.c_str());
      continue;
    }
    const auto tracker = memferry::make_tracker(*memferry::tracker_kind(probe.name), region);
    tracker->arm();
    std::memset(region->address(memferry::PageNumber{7}).pointer(), 1 + static_cast<int>(probe.name.size()),
                1);
    memferry::AtomicBitmap dirty(kPages);
    const std::uint64_t written = tracker->collect(dirty);
    std::printf("%s: %llu page written\n", probe.name.c_str(), static_cast<unsigned long long>(written));
    if (written != 1 || !dirty.test(memferry::PageNumber{7})) return 1;
    tracker->disarm();
  }
  // The same memory as a snapshot's pager names it, and what a destination remembers of migrations: of none yet.
  const auto memory = region->extents().front();
  const memferry::GuestLayout layout({{memory.start, memory.bytes, nullptr}}, memferry_page_size());
  if (layout.pages() != kPages || memferry::control::Tombstones().has("0123")) return 1;
  // Both at once, in one program.
  memferry_region* other = nullptr;
  memferry_error error{};
  error.size = sizeof error;
  if (memferry_region_allocate(memferry_page_size() + 1, &other, &error) != MEMFERRY_REGION_UNALIGNED)
    return 1;
  std::printf("%s: %s\n", memferry_code_name(error.code), error.text);
  return 0;
}
