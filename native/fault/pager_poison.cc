// Pages that will never come: whoever touches one gets SIGBUS instead of zeros.
#include <sys/mman.h>

#include "fault/pager.h"
#include "os/sys_error.h"

namespace memferry {
void Pager::poison_missing() {
  {
    const std::lock_guard lock(mutex_);
    poisoning_ = true;  // whatever is claimed and then fails, or faults later, is poisoned by on_fault()
  }
  if (!serving()) return;
  deliver_all();
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    const ArrivalMap& map = *maps_[region];
    const PageNumber end{map.pages()};
    for (PageNumber from{0};;) {
      const auto missing = map.received.next_clear(from, end, map.pages());
      if (!missing) break;
      poison(region, *missing);
      from = missing->end();
    }
  }
  poison_lost();
}

std::vector<PageRun> Pager::give_up(std::uint32_t region, PageRun run) {
  ArrivalMap& map = *maps_[region];
  std::vector<PageRun> given_up;
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    // Under the lock on_fault() looks at both bits.
    const std::lock_guard lock(mutex_);
    if (map.received.set(page)) continue;
    map.lost.set(page);
    if (!given_up.empty() && given_up.back().end() == page) {
      ++given_up.back().count;
    } else {
      given_up.push_back({page, 1});
    }
  }
  return given_up;
}

void Pager::poison_lost() {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    ArrivalMap& map = *maps_[region];
    for (PageNumber from{0};;) {
      const auto run = map.lost.next_set(from, PageNumber{map.pages()}, map.pages());
      if (!run) break;
      from = run->end();
      PageRun fresh = *run;
      while (fresh.count > 0 && map.poisoned.test(fresh.first))
        fresh = {PageNumber{fresh.first.value + 1}, fresh.count - 1};
      if (fresh.count == 0) continue;
      {
        const std::lock_guard lock(mutex_);
        map.poisoned.set_run(fresh);
      }
      poison(region, fresh);
    }
  }
}

void Pager::poison(std::uint32_t region, PageRun run) {
  ArrivalMap& map = *maps_[region];
  Userfaultfd& uffd = uffd_of(region);
  const std::uint64_t page_size = map.page_size();
  bool supported = (uffd.features() & abi::kUffdFeaturePoison) != 0;
  map.for_each_run(run, [&](PageRun part) {
    const OwnerAddress start = map.region().owner_address(part.first);
    const std::uint64_t bytes = part.count * page_size;
    int tries = 0;
    for (std::uint64_t done = 0; done < bytes && supported;) {
      PageResult result;
      try {
        result = uffd.poison(start.plus(done), bytes - done, true);
      } catch (const SystemError&) {
        supported = false;
        break;
      }
      done += result.bytes_done;
      if (result.outcome == PageOutcome::kExists) {
        // Poisoned before, or populated by whoever broke the rules: what is there is not the guest's content.
        const PageNumber page{part.first.value + done / page_size};
        if (!poison_populated(region, page)) supported = false;
        done += page_size;
      } else if (result.outcome == PageOutcome::kGone) {
        break;
      } else if (result.outcome != PageOutcome::kOk && !wait_again(tries)) {
        supported = false;
      }
    }
    if (supported) return;
    if (map.region().owner()) {
      // Another process's memory cannot be made inaccessible otherwise, and it may not read zeros.
      map.region().owner()->end();
      return;
    }
    // Coarser, but no access goes through. When even this fails (too many mappings), all of the region goes.
    const std::span<std::byte> own = map.region().contiguous(part);
    if (::mprotect(own.data(), own.size(), PROT_NONE) != 0) {
      map.for_each_part({PageNumber{0}, map.pages()}, [](std::span<std::byte> all, PageNumber) {
        ::mprotect(all.data(), all.size(), PROT_NONE);
      });
    }
    uffd.wake(start, bytes);
  });
  const std::lock_guard lock(mutex_);
  waiting_.take(region, run, [](const WaitingFault&) {});
}

bool Pager::poison_populated(std::uint32_t region, PageNumber page) {
  ArrivalMap& map = *maps_[region];
  const OwnerAddress address = map.region().owner_address(page);
  if (map.region().remote()) {
    // What cannot be read is poisoned already; what can be is not to be dropped from here.
    std::byte byte{};
    try {
      return map.region().owner()->read_some(address, std::span(&byte, 1)) == 0;
    } catch (const OwnerGone&) {
      return true;
    }
  }
  std::byte* const view = map.region().contiguous({page, 1}).data();
  if (::madvise(view, map.page_size(), MADV_REMOVE) != 0) ::madvise(view, map.page_size(), MADV_DONTNEED);
  const PageOutcome outcome = uffd_of(region).poison(address, map.page_size(), true).outcome;
  // Of a shared file the hole does away with the content; a mark that is left in the owner's page table stays.
  return outcome == PageOutcome::kOk || outcome == PageOutcome::kGone ||
         (map.region().owner() && outcome == PageOutcome::kExists);
}

}  // namespace memferry
