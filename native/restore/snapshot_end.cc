// The end of a SnapshotPager, and pages that cannot be had: nothing that is missing may read as zeros.
#include <array>
#include <cerrno>
#include <thread>

#include "os/sys_error.h"
#include "restore/snapshot_pager.h"

namespace memferry {

namespace {

constexpr int kPoisonTries = 4000;
constexpr std::chrono::microseconds kBetweenTries{500};

}  // namespace

// Reported first, poisoned then: until that whoever touches it waits.
void SnapshotPager::give_up(PageNumber page, const std::string& why) {
  if (lost_.set(page) || ending_.load(std::memory_order_acquire)) return;
  emit({.kind = RestoreEvent::Kind::kLost, .code = "PAGES_LOST", .message = why, .lost = {{page, 1}}});
  Clock::rep none = 0;
  poison_at_.compare_exchange_strong(none, (Clock::now() + config_.loss_grace).time_since_epoch().count());
  reader_.wake();
}

void SnapshotPager::acknowledge_loss() {
  if (poison_at_.load(std::memory_order_acquire) == 0) return;
  poison_at_.store(1, std::memory_order_release);
  reader_.wake();
}

void SnapshotPager::poison_lost() {
  poison_at_.store(0, std::memory_order_release);
  for (PageNumber from{0}; from.value < layout_.pages();) {
    const auto run = lost_.next_set(from, PageNumber{layout_.pages()}, layout_.pages());
    if (!run) return;
    for (PageNumber page = run->first; page < run->end(); ++page.value)
      if (!poisoned_.set(page)) poison({page, 1});
    from = run->end();
  }
}

void SnapshotPager::poison(PageRun run) {
  const std::uint64_t size = layout_.page_size();
  while (run.count > 0) {
    const GuestLayout::Piece piece = layout_.piece(run);
    std::uint64_t done = 0;
    for (int tries = 0; done < piece.run.count;) {
      if ((config_.uffd.features() & abi::kUffdFeaturePoison) == 0)
        throw SystemError("UFFDIO_POISON (Linux 6.6)", ENOTSUP);
      const PageResult result =
          config_.uffd.poison(piece.at.plus(done * size), (piece.run.count - done) * size, true);
      done += result.bytes_done / size;
      if (result.outcome == PageOutcome::kOk) break;
      if (result.outcome == PageOutcome::kExists) {
        config_.uffd.wake(piece.at.plus(done * size), size);
        ++done;
      } else if (result.outcome == PageOutcome::kGone) {
        config_.owner->require("UFFDIO_POISON");
        ++done;
      } else if (++tries < kPoisonTries) {
        // Its owner is in madvise(): what it removes need not be poisoned any more.
        std::vector<Fault> ignored;
        read_events(ignored);
        std::this_thread::sleep_for(kBetweenTries);
      } else {
        throw SystemError("UFFDIO_POISON", result.error);
      }
    }
    run = {piece.run.end(), run.count - piece.run.count};
  }
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
