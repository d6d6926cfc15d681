// Pages that will never come: whoever touches one gets SIGBUS instead of zeros.
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "fault/pager.h"
#include "os/sys_error.h"

namespace memferry {
namespace {

// Each piece splits a mapping in three, and a process may have 65530 by default: at most a quarter of them for the
// losses of one guest.
constexpr std::uint32_t kMostFailingPieces = 8192;

}  // namespace

void Pager::poison_missing() {
  {
    const std::lock_guard lock(mutex_);
    poisoning_ = true;  // whatever is claimed and then fails, or faults later, is poisoned by on_fault()
  }
  if (!serving()) return;
  deliver_all();
  give_up_rooms();
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

void Pager::poison(std::uint32_t region, PageRun run, Patience patience) {
  if (huge_[region]) return poison_huge(region, run, patience);
  ArrivalMap& map = *maps_[region];
  bool again = false;
  for (PageNumber from = run.first;;) {
    // A page that somebody has faulted on fails no more, if it ever did: its owner may have discarded it since.
    const auto left = patience == Patience::kOwnThread ? std::optional(run)
                                                       : map.failing.next_clear(from, run.end(), run.count);
    if (!left) break;
    from = left->end();
    map.for_each_run(*left, [&](PageRun part) {
      const Poisoned outcome = poison_part(region, part, patience);
      if (outcome == Poisoned::kAgain) {
        again = true;
        raise_again(region, part.first);
      }
      if (outcome == Poisoned::kCannot) make_failing(region, part);
    });
    if (patience == Patience::kOwnThread) break;
  }
  if (again) return;
  const std::lock_guard lock(mutex_);
  waiting_.take(region, run, [](const WaitingFault&) {});
}

// kCannot when the kernel cannot do it (before Linux 6.6), or has no memory for it, or says that pages are gone which are
// mapped.
Pager::Poisoned Pager::poison_part(std::uint32_t region, PageRun part, Patience patience) {
  ArrivalMap& map = *maps_[region];
  Userfaultfd& uffd = uffd_of(region);
  if ((uffd.features() & abi::kUffdFeaturePoison) == 0) return Poisoned::kCannot;
  const OwnerAddress start = map.region().owner_address(part.first);
  const std::uint64_t page_size = map.page_size();
  const std::uint64_t bytes = part.count * page_size;
  int tries = 0;
  std::uint64_t most = bytes;
  for (std::uint64_t done = 0; done < bytes;) {
    PageResult result;
    try {
      result = uffd.poison(start.plus(done), std::min(most, bytes - done), true);
    } catch (const SystemError&) {
      return Poisoned::kCannot;
    }
    map.failing.set_run({PageNumber{part.first.value + done / page_size}, result.bytes_done / page_size});
    done += result.bytes_done;
    if (result.bytes_done > 0) most = bytes;
    if (result.outcome == PageOutcome::kExists) {
      const PageNumber there{part.first.value + done / page_size};
      // It fails already; or it was on its way when it was listed as missing, and has come; or the fault that asks for
      // it is an old one. Else whoever broke the rules has populated it: what is there is not the guest's content.
      const bool come = map.received.test(there) && !map.lost.test(there);
      if (!come && !map.failing.test(there) && patience != Patience::kOwnThread) {
        if (!poison_populated(region, there)) return Poisoned::kCannot;
        map.failing.set(there);
      } else {
        uffd.wake(start.plus(done), page_size);
      }
      done += page_size;
    } else if (result.outcome == PageOutcome::kGone) {
      if (letting_go_.load() || result.error == ESRCH) return Poisoned::kDone;
      // Over the border of two mappings the kernel does nothing at all.
      try {
        const std::uint64_t at = done / page_size;
        const Mapped mapped = mapped_alike(region, {PageNumber{part.first.value + at}, part.count - at});
        if (!mapped.there) {
          done += mapped.count * page_size;
          most = bytes;
        } else if (!wait_again(tries) || mapped.count * page_size >= std::min(most, bytes - done)) {
          // Too often; or it is in one mapping and not registered: somebody has put it over the region's.
          return Poisoned::kCannot;
        } else {
          most = mapped.count * page_size;
        }
      } catch (const OwnerGone&) {
        return Poisoned::kDone;
      } catch (const SystemError&) {
        return Poisoned::kCannot;
      }
    } else if (result.outcome == PageOutcome::kAgain && patience == Patience::kOwnThread && done == 0) {
      return Poisoned::kAgain;
    } else if (result.outcome != PageOutcome::kOk && !wait_again(tries)) {
      return Poisoned::kCannot;
    }
  }
  return Poisoned::kDone;
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

// Another mapping over the pages, that fails when it is touched. Where that would take too many mappings, coarser, but
// no access goes through: one over all of the region takes none beside its own.
void Pager::make_failing(std::uint32_t region, PageRun part) {
  ArrivalMap& map = *maps_[region];
  map.failing.set_run(part);
  // Another process's memory cannot be made to fail so, and it may not read zeros.
  if (map.region().owner()) return map.region().owner()->end();
  const std::span<std::byte> own = map.region().contiguous(part);
  if (failing_pieces_.fetch_add(1, std::memory_order_relaxed) < kMostFailingPieces &&
      ((failing_ && failing_->put_over(Address::of(own.data()), own.size())) ||
       ::mprotect(own.data(), own.size(), PROT_NONE) == 0)) {
    own_->wake(map.region().owner_address(part.first), own.size());
    return;
  }
  map.for_each_run({PageNumber{0}, map.pages()}, [&](PageRun all) {
    const std::span<std::byte> bytes = map.region().contiguous(all);
    if (!(failing_ && failing_->put_over(Address::of(bytes.data()), bytes.size()))) {
      ::mprotect(bytes.data(), bytes.size(), PROT_NONE);
    }
    own_->wake(map.region().owner_address(all.first), bytes.size());
  });
}

}  // namespace memferry
