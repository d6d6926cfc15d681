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

// Reported first, poisoned then: until that whoever touches it waits.
void SnapshotPager::give_up(PageNumber page, const std::string& why) {
  const bool before = lost_.set(page);
  // Removed meanwhile, and read by nobody any more. (The reader notes a removal first, and takes back a loss then.)
  if (removed_.test(page)) {
    lost_.clear(page);
    return;
  }
  if (before || ending_.load(std::memory_order_acquire)) return;
  const std::lock_guard lock(lost_mutex_);
  why_lost_ = why;
  if (poison_at_.load(std::memory_order_acquire) == 0) tell_lost_locked();
}

// One report at a time, however much is lost: what is lost before the pages of the last one are poisoned is in the next.
void SnapshotPager::tell_lost_locked() {
  RestoreEvent event{
      .kind = RestoreEvent::Kind::kLost, .code = "PAGES_LOST", .message = why_lost_, .lost = {}};
  const auto untold = [this](PageNumber page) { return !told_lost_.test(page) && !removed_.test(page); };
  for_each_lost(untold, [&](PageRun run) {
    told_lost_.set_run(run);
    event.lost.push_back(run);
  });
  if (event.lost.empty()) return;
  emit(event);
  poison_at_.store((Clock::now() + config_.loss_grace).time_since_epoch().count(), std::memory_order_release);
  reader_.wake();
}

void SnapshotPager::acknowledge_loss() {
  Clock::rep at = poison_at_.load(std::memory_order_acquire);
  while (at != 0 && !poison_at_.compare_exchange_weak(at, 1, std::memory_order_acq_rel)) {
  }
  reader_.wake();
}

void SnapshotPager::poison_lost() {
  for_each_lost([this](PageNumber page) { return told_lost_.test(page) && !poisoned_.set(page); },
                [this](PageRun run) { poison(run); });
  const std::lock_guard lock(lost_mutex_);
  poison_at_.store(0, std::memory_order_release);
  tell_lost_locked();
}

// Runs of lost pages of which `which` is true.
template <class Which, class Each>
void SnapshotPager::for_each_lost(Which which, Each each) const {
  const PageNumber end{layout_.pages()};
  for (PageNumber from{0}; from < end;) {
    const auto run = lost_.next_set(from, end, layout_.pages());
    if (!run) return;
    for (PageNumber page = run->first; page < run->end(); ++page.value) {
      if (!which(page)) continue;
      PageRun part{page, 1};
      while (part.end() < run->end() && which(part.end())) ++part.count;
      each(part);
      page = PageNumber{part.end().value - 1};
    }
    from = run->end();
  }
}

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
