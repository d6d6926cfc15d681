// Pages that will never come: whoever touches one gets SIGBUS instead of zeros.
#include <sys/mman.h>

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
  map.for_each_part(run, [&](std::span<std::byte> part, PageNumber) {
    if (!failing_ && poison_part(part, map.page_size())) return;
    make_failing(region, part);
    uffd_.wake(Address::of(part.data()), part.size());
  });
  const std::lock_guard lock(mutex_);
  waiting_.take(region, run, [](const WaitingFault&) {});
}

// False when the kernel cannot do it (before Linux 6.6), or has no memory for it.
bool Pager::poison_part(std::span<std::byte> part, std::uint64_t page_size) {
  int tries = 0;
  for (std::uint64_t done = 0; done < part.size();) {
    std::byte* page = part.data() + done;
    try {
      const PageResult result = uffd_.poison(Address::of(page), part.size() - done, true);
      done += result.bytes_done;
      page = part.data() + done;
      if (result.outcome == PageOutcome::kOk || result.outcome == PageOutcome::kGone) return true;
      if (result.outcome == PageOutcome::kExists) {
        // Poisoned before, or populated by whoever broke the rules: what is there is not the guest's content.
        if (::madvise(page, page_size, MADV_REMOVE) != 0) ::madvise(page, page_size, MADV_DONTNEED);
        if (uffd_.poison(Address::of(page), page_size, true).outcome != PageOutcome::kOk) return false;
        done += page_size;
      } else if (!wait_again(tries)) {
        return false;
      }
    } catch (const SystemError&) {
      return false;
    }
  }
  return true;
}

// Another mapping over the pages, that fails when it is touched. Where that would take too many mappings, coarser, but
// no access goes through: one over all of the region takes none beside its own.
void Pager::make_failing(std::uint32_t region, std::span<std::byte> part) {
  if (failing_pieces_.fetch_add(1, std::memory_order_relaxed) < kMostFailingPieces) {
    if (failing_ && failing_->put_over(Address::of(part.data()), part.size())) return;
    if (::mprotect(part.data(), part.size(), PROT_NONE) == 0) return;
  }
  const ArrivalMap& map = *maps_[region];
  map.for_each_part({PageNumber{0}, map.pages()}, [this](std::span<std::byte> all, PageNumber) {
    const Address start = Address::of(all.data());
    if (!(failing_ && failing_->put_over(start, all.size()))) ::mprotect(all.data(), all.size(), PROT_NONE);
    uffd_.wake(start, all.size());
  });
}

}  // namespace memferry
