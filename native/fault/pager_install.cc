// What arrives becomes the guest's memory: pages are claimed, copied or made zeros, and whoever waits for one is let go
// on. (Huge pages: pager_huge.cc.)
#include <sched.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "fault/pager.h"
#include "os/sys_error.h"

namespace memferry {
namespace {

// The layout is changing or memory is short: about two seconds of trying, first without sleeping.
constexpr int kSpinningTries = 64;
constexpr int kTries = 4096;
constexpr std::chrono::microseconds kBetweenTries{500};
constexpr std::uint64_t kUnderLayout = 64;

}  // namespace

// For the pager's own thread, when an event that it has not read yet is in the way: whoever waits faults again, behind it.
void Pager::raise_again(std::uint32_t region, PageNumber page) {
  const PageRun run = fails_with(region, page);
  uffd_of(region).wake(maps_[region]->region().owner_address(run.first),
                       run.count * maps_[region]->page_size());
}

// Gives zeros to a page that is absent, and wakes its waiters either way.
void Pager::serve_zero(std::uint32_t region, PageNumber page, Patience patience) {
  ArrivalMap& map = *maps_[region];
  const OwnerAddress address = map.region().owner_address(page);
  Userfaultfd& uffd = uffd_of(region);
  for (int tries = 0;;) {
    const PageResult result = uffd.zeropage(address, map.page_size(), true);
    switch (result.outcome) {
      case PageOutcome::kOk:
        map.present.set(page);
        return;
      case PageOutcome::kExists:
        uffd.wake(address, map.page_size());
        return;
      case PageOutcome::kGone:
        return;  // completed or unmapped since; unregister() wakes the waiters
      default:
        if (result.outcome == PageOutcome::kAgain && patience == Patience::kOwnThread)
          return raise_again(region, page);
        if (!wait_again(tries)) {
          break_off("SYSTEM", "no zero page can be installed");
          return;
        }
    }
  }
}

Pager::Installed Pager::install(std::uint32_t region, PageRun run, const std::byte* bytes) {
  if (huge_[region]) return install_huge(region, run, bytes);
  ArrivalMap& map = *maps_[region];
  Installed result;
  std::uint64_t page = run.first.value;
  const std::uint64_t end = run.end().value;
  while (page < end && result.intact) {
    if (map.received.set(PageNumber{page})) {
      ++page;
      continue;
    }
    const std::uint64_t first = page++;
    while (page < end && !map.received.set(PageNumber{page})) ++page;
    const PageRun claimed{PageNumber{first}, page - first};
    result.intact = copy_claimed(region, claimed, bytes + (first - run.first.value) * map.page_size());
    if (result.intact) result.pages += claimed.count;
    ++page;  // claimed by somebody else, or the end
  }
  return result;
}

Pager::Copied Pager::copy_with(std::uint32_t region, PageRun run, const std::byte* bytes, Patience patience) {
  ArrivalMap& map = *maps_[region];
  int tries = 0;
  // Under a lock that whoever reads the events waits for.
  const std::uint64_t usual = attached_[region].removed ? kUnderLayout : run.count;
  std::uint64_t most = usual;
  while (run.count > 0) {
    PageRun part = map.region().contiguous_run(run);
    part.count = std::min(part.count, most);
    PageResult result;
    try {
      result = attached_[region].removed ? copy_present(region, part, bytes)
                                         : uffd_of(region).copy(map.region().owner_address(part.first), bytes,
                                                                part.count * map.page_size(), true);
    } catch (const SystemError& error) {
      map.received.clear_run(run);
      break_off("SYSTEM", error.what());
      return Copied::kFailed;
    }
    const std::uint64_t done = result.bytes_done / map.page_size();
    if (done > 0) {
      const PageRun installed{run.first, done};
      map.present.set_run(installed);
      arrived(region, installed);
      run = {PageNumber{run.first.value + done}, run.count - done};
      bytes += result.bytes_done;
      tries = 0;
      most = usual;
    }
    if (result.outcome == PageOutcome::kAgain && patience == Patience::kOwnThread && done == 0)
      return Copied::kAgain;
    if (result.outcome == PageOutcome::kGone && run.count > 1) {
      // Over the border of two mappings the kernel does nothing at all.
      Mapped mapped;
      try {
        mapped = mapped_alike(region, run);
      } catch (const SystemError&) {
        // Its owner is gone, most likely: told below.
      }
      if (mapped.there && mapped.count < std::min(run.count, part.count - done) && wait_again(tries)) {
        most = mapped.count;
        continue;
      }
    }
    const bool again = result.outcome == PageOutcome::kAgain || result.outcome == PageOutcome::kNoMemory;
    if (result.outcome == PageOutcome::kOk || (again && wait_again(tries))) continue;
    // Missing again, so that it is poisoned and not read.
    map.received.clear_run(run);
    if (result.outcome == PageOutcome::kExists) {
      // Nobody else installs a page that we have claimed: somebody wrote where only the pager may.
      break_off("SYSTEM", "page " + std::to_string(run.first.value) + " of region " + std::to_string(region) +
                              " is populated, though it never arrived");
    } else if (result.outcome == PageOutcome::kGone) {
      break_off_gone(region);
    } else {
      break_off("SYSTEM", result.outcome == PageOutcome::kNoMemory ? "no memory for a page"
                                                                   : "a page cannot be installed");
    }
    return Copied::kFailed;
  }
  return Copied::kAll;
}

// Zeros are installed only where somebody waits: untouched memory costs nothing.
Pager::Installed Pager::install_zeros(std::uint32_t region, PageRun run) {
  if (huge_[region]) return install_huge(region, run, nullptr);
  ArrivalMap& map = *maps_[region];
  Installed result;
  std::vector<PageNumber> waited_for;
  const PageNumber end = run.end();
  std::uint64_t page = run.first.value;
  while (page < end.value) {
    if (map.received.set(PageNumber{page})) {
      ++page;
      continue;
    }
    const std::uint64_t first = page++;
    while (page < end.value && !map.received.set(PageNumber{page})) ++page;
    const PageRun claimed{PageNumber{first}, page - first};
    map.zero.set_run(claimed);
    result.pages += claimed.count;
    // Under the same lock on_fault() looks at the bits: either it sees zeros, or we see its entry.
    const Clock::time_point now = Clock::now();
    const std::lock_guard lock(mutex_);
    waiting_.take(region, claimed, [&](const WaitingFault& fault) {
      if (fault.remote) latencies_.record(now - fault.seen);
      if (!fault.probe) waited_for.push_back(fault.page);
    });
    ++page;
  }
  for (const PageNumber waited : waited_for) serve_zero(region, waited, Patience::kWaits);
  return result;
}

void Pager::arrived(std::uint32_t region, PageRun run) {
  const Clock::time_point now = Clock::now();
  std::vector<PageNumber> again;
  {
    const std::lock_guard lock(mutex_);
    waiting_.take(region, run, [&](const WaitingFault& fault) {
      if (fault.remote) latencies_.record(now - fault.seen);
      if (!fault.probe) again.push_back(fault.page);
    });
  }
  // The page may have been discarded since it was installed, and a fault that came of that before it was marked present
  // counts as waiting for this install: it comes again.
  for (const PageNumber page : again) raise_again(region, page);
}

bool Pager::wait_again(int& tries) const {
  if (++tries > kTries) return false;
  if (tries < kSpinningTries) {
    ::sched_yield();
  } else {
    std::this_thread::sleep_for(kBetweenTries);
  }
  return true;
}

}  // namespace memferry
