// The end of a SnapshotPager, and pages that cannot be had: nothing that is missing may read as zeros.
#include <array>
#include <cerrno>
#include <thread>

#include "fault/gone.h"
#include "os/sys_error.h"
#include "restore/snapshot_pager.h"

namespace memferry {

namespace {

constexpr int kPoisonTries = 4000;
constexpr std::chrono::microseconds kBetweenTries{500};

}  // namespace

// What is removed meanwhile is zeros, and is left out.
void SnapshotPager::poison(PageRun run) {
  const std::uint64_t size = layout_.page_size();
  if ((config_.uffd.features() & abi::kUffdFeaturePoison) == 0)
    throw SystemError("UFFDIO_POISON (Linux 6.6)", ENOTSUP);
  PieceSize pieces;
  int tries = 0;
  for (PageNumber at = run.first; at < run.end();) {
    if (removed_.test(at)) {
      ++at.value;
      continue;
    }
    std::uint64_t count = 1;
    while (count < pieces.most() && at.value + count < run.end().value &&
           !removed_.test(PageNumber{at.value + count}))
      ++count;
    const GuestLayout::Piece piece = layout_.piece({at, count});
    const PageResult result = config_.uffd.poison(piece.at, piece.run.count * size, true);
    const std::uint64_t done = result.bytes_done / size;
    if (done > 0) tries = 0;
    at.value += done;
    if (result.outcome == PageOutcome::kOk) {
      pieces.went_well();
    } else if (result.outcome == PageOutcome::kExists) {
      config_.uffd.wake(piece.at.plus(done * size), size);
      ++at.value;
    } else if (result.outcome == PageOutcome::kGone) {
      if (pieces.refused(piece.run.count - done)) continue;
      confirm_unmapped(*config_.owner, piece.at.plus(done * size), size, "UFFDIO_POISON");
      removed_.set(at);
      ++at.value;
    } else if (++tries < kPoisonTries) {
      // Its owner is in madvise(): what it removes need not be poisoned any more.
      read_events_only();
      std::this_thread::sleep_for(kBetweenTries);
    } else {
      throw SystemError("UFFDIO_POISON", result.error);
    }
  }
}

// The faults are raised again for the next reading.
void SnapshotPager::read_events_only() {
  std::vector<Fault> faults;
  read_events(faults);
  for (const Fault& fault : faults) config_.uffd.wake(layout_.piece({fault.page, 1}).at, layout_.page_size());
}

// The reader's last act, with nobody else installing any more. What cannot be poisoned costs the owner its life: it would
// read zeros, or wait for good.
void SnapshotPager::end(bool owner_lives) {
  if (over_.exchange(true, std::memory_order_acq_rel) || !owner_lives) return;
  try {
    std::vector<Fault> ignored;
    read_events(ignored);
    for (PageNumber from{0}; from.value < layout_.pages();) {
      const auto absent = installed_.next_clear(from, PageNumber{layout_.pages()}, layout_.pages());
      if (!absent) break;
      for (PageNumber page = absent->first; page < absent->end();) {
        PageNumber end = page;
        while (end < absent->end() && !removed_.test(end)) ++end.value;
        if (end > page) poison({page, end.value - page.value});
        page = PageNumber{end.value + 1};
      }
      from = absent->end();
    }
    for (const RestoreSpan& span : layout_.spans()) (void)config_.uffd.unregister(span.at, span.bytes);
  } catch (const OwnerGone&) {
    return;
  } catch (const std::exception&) {
    try {
      config_.owner->end();
    } catch (const std::exception&) {
      return;  // it has ended
    }
  }
}

void SnapshotPager::close() {
  const std::lock_guard lock(close_mutex_);
  ending_.store(true, std::memory_order_release);
  losses_.stop();
  for (const auto& thread : slow_threads_) thread->request_stop();
  {
    const std::lock_guard jobs(jobs_mutex_);
    ahead_jobs_.clear();
    slow_jobs_.clear();
  }
  slow_jobs_changed_.notify_all();
  ahead_thread_.stop();
  for (const auto& thread : slow_threads_) thread->stop();
  reader_.stop();
}

}  // namespace memferry
