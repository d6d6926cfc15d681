// What a SnapshotPager brings beside the faults: ahead of a sequential reader, everything in order, and single pages that
// a slow disk has.
#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <span>
#include <thread>

#include "restore/snapshot_pager.h"
#include "restore/touch.h"

namespace memferry {

namespace {

// As long as a fault may have to wait for the gate: some 40 us.
constexpr std::uint64_t kChunkBytes = 128ULL << 10U;
// More walks than can be served are not worth remembering: the newest count.
constexpr std::size_t kMostJobs = 32;
constexpr std::chrono::microseconds kAgainAfter{50};
constexpr std::chrono::milliseconds kMemoryAfter{2};
constexpr int kSweepAgainMs = 5;
// Somebody waits for what is brought ahead of a walk, and the reader for the gate.
constexpr int kWalkThreadNice = -20;

}  // namespace

void SnapshotPager::source_complete() {
  source_arrives_.store(false, std::memory_order_release);
  ahead_thread_.wake();
}

void SnapshotPager::queue_ahead(PageRun run) {
  if (config_.pre_paging == PrePaging::kNone) return;
  {
    const std::lock_guard lock(jobs_mutex_);
    if (ahead_jobs_.size() >= kMostJobs) ahead_jobs_.pop_front();
    ahead_jobs_.push_back(run);
  }
  ahead_thread_.wake();
}

void SnapshotPager::bring_ahead(WorkerThread& self) {
  PageNumber swept{config_.pre_paging == PrePaging::kAll ? 0 : layout_.pages()};
  const std::uint64_t chunk = std::max<std::uint64_t>(1, kChunkBytes / layout_.page_size());
  bool behind = false;
  const int usual_nice = ::getpriority(PRIO_PROCESS, 0);  // this thread's
  bool hurries = false;
  while (!self.stopping() && !ending_.load(std::memory_order_acquire)) {
    PageRun job{};
    {
      const std::lock_guard lock(jobs_mutex_);
      if (!ahead_jobs_.empty()) {
        job = ahead_jobs_.front();
        ahead_jobs_.pop_front();
      }
    }
    if (job.count == 0 && swept.value == layout_.pages() && behind) {
      // Some of the source had not come yet.
      self.wait(kSweepAgainMs);
      behind = false;
      swept = PageNumber{0};
    }
    const bool sweeping = job.count == 0 && swept.value < layout_.pages();
    if (sweeping) {
      job = {swept, std::min(chunk, layout_.pages() - swept.value)};
      swept = job.end();
    }
    if (job.count == 0) {
      self.wait(-1);
      continue;
    }
    if (hurries == sweeping) {
      hurries = !sweeping;
      set_this_thread_nice(hurries ? std::min(kWalkThreadNice, usual_nice) : usual_nice);
    }
    try {
      if (sweeping && source_arrives_.load(std::memory_order_acquire)) behind = true;
      while (job.count > 0 && bring({job.first, std::min(chunk, job.count)}, sweeping, self)) {
        const std::uint64_t done = std::min(chunk, job.count);
        job = {PageNumber{job.first.value + done}, job.count - done};
      }
    } catch (const std::exception& error) {
      // Without its owner there is nothing to bring, which the reader notices by itself.
      if (config_.owner->alive()) fail("SYSTEM", error.what());
      return;
    }
    if (sweeping && swept.value == layout_.pages() && !behind) reader_.wake();  // it may be complete
  }
}

// False when it is not to go on. What cannot be read is left to whoever needs it, or is given up when all is wanted.
bool SnapshotPager::bring(PageRun run, bool sweeping, WorkerThread& self) {
  while (run.count > 0 && !self.stopping()) {
    PageRun part = wanted_part(run);
    if (part.count == 0) return true;
    // Only the sweep has to see to it that nothing is left out.
    if (const PageRun by_reader = reader_copies_.now(); !sweeping && by_reader.count > 0) {
      if (part.first >= by_reader.first && part.first < by_reader.end()) {
        const PageNumber behind = std::min(by_reader.end(), run.end());
        run = {behind, run.end().value - behind.value};
        continue;
      }
      if (part.first < by_reader.first && by_reader.first < part.end())
        part.count = by_reader.first.value - part.first.value;
    }
    const GuestLayout::Piece piece = layout_.piece(part);
    const std::span<const std::byte> source(piece.from, piece.run.count * layout_.page_size());
    const bool only_what_came = sweeping && source_arrives_.load(std::memory_order_acquire);
    const std::uint64_t readable = (only_what_came ? resident(source) : touch(source)) / layout_.page_size();
    std::uint64_t installed = 0;
    if (readable > 0) {
      if (over_.load(std::memory_order_acquire) || ending_.load(std::memory_order_acquire)) return false;
      for (;;) {
        const Served served = install_in_gate({piece.run.first, readable}, &installed, &ahead_copies_);
        note_memory(served);
        if (served == Served::kDone) break;
        again_.fetch_add(1, std::memory_order_relaxed);
        if (self.stopping() || ending_.load(std::memory_order_acquire)) return false;
        std::this_thread::sleep_for(served == Served::kAgain ? kAgainAfter : kMemoryAfter);
      }
      ahead_.fetch_add(installed, std::memory_order_relaxed);
    }
    PageNumber next{piece.run.first.value + readable};
    if (readable < piece.run.count) {
      if (sweeping && !only_what_came) (void)losses_.lose(next, "the snapshot cannot be read");
      ++next.value;
    }
    run = {next, run.end().value - next.value};
  }
  return !self.stopping();
}

// The content is in memory by now, so that the copy waits for nothing inside the gate.
SnapshotPager::Served SnapshotPager::install_in_gate(PageRun run, std::uint64_t* installed,
                                                     Copying* copying) {
  while (reader_waits_.load(std::memory_order_acquire)) ::sched_yield();
  const std::lock_guard gate(gate_);
  if (over_.load(std::memory_order_acquire)) return Served::kDone;
  std::optional<Copying::Held> held;
  if (copying != nullptr) held.emplace(*copying, run);
  return install(run, installed);
}

void SnapshotPager::wait_for_disk(WorkerThread& self) {
  for (;;) {
    PageNumber page{};
    {
      std::unique_lock lock(jobs_mutex_);
      slow_jobs_changed_.wait(lock, [&] { return !slow_jobs_.empty() || self.stopping(); });
      if (self.stopping()) return;
      page = slow_jobs_.front();
      slow_jobs_.pop_front();
    }
    try {
      const GuestLayout::Piece piece = layout_.piece({page, 1});
      if (!removed_.test(page) && touch({piece.from, layout_.page_size()}) < layout_.page_size()) {
        (void)losses_.lose(page, "the snapshot cannot be read");
        if (losses_.lost(page)) continue;  // else it has been removed
      }
      for (;;) {
        std::uint64_t installed = 0;
        Served served = install_in_gate({page, 1}, &installed);
        // Removed while the disk was waited for: what waits gets zeros.
        if (served == Served::kDone && removed_.test(page) && !over_.load(std::memory_order_acquire))
          served = install_zeros(page);
        note_memory(served);
        if (served == Served::kDone || self.stopping()) break;
        std::this_thread::sleep_for(served == Served::kAgain ? kAgainAfter : kMemoryAfter);
      }
    } catch (const std::exception& error) {
      if (config_.owner->alive()) fail("SYSTEM", error.what());
      return;
    }
  }
}

}  // namespace memferry
