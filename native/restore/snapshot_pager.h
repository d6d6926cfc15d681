// Restores the memory of another process lazily: serves the missing-page faults of a userfaultfd that its owner made
// and handed over, from a snapshot that is mapped in this process, and brings what a sequential reader will want next
// ahead of it.
//
// What the owner removes (a balloon's MADV_DONTNEED, told by UFFD_EVENT_REMOVE) reads as zeros from then on, never as
// the snapshot's bytes. The kernel holds the owner in madvise() until its event has been read, and zaps the range only
// after that. So a copy must not straddle the reading of an event:
//
//   owner                      reader                    pre-paging
//   madvise: event, waits                                page is not removed: copy it
//                              reads the event
//   zaps the range             marks it removed
//                                                        UFFDIO_COPY    <- the old bytes again, and no fault to tell
//
// Whoever copies beside the reader therefore looks and copies inside `gate_`, and the reader reads inside it (test:
// RemoveDuringPrePaging). Nobody waits inside of it: while an event is unread the kernel answers EAGAIN, and then the
// gate is left first (PITFALL: else madvise() and the copy wait for each other).
//
// Faults are delivered before events that were raised earlier, so a fault may come before the REMOVE that caused it: the
// copy that would be wrong then gets EAGAIN, is deferred, and looked at again after the events.
//
// Life: construct -> faults are served -> close(), or the owner's death. What has not been brought by close() is
// poisoned, and fails to be read; what the owner removed is zeros. Then the ranges are let go, although the owner has
// its own copy of the descriptor: nobody waits for good.
//
// Threads: one reads events and serves faults, one brings pages ahead, some wait for a slow disk. Everything public from
// any thread, close() not from `on_event`.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <latch>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "fault/latency_histogram.h"
#include "fault/loss_reports.h"
#include "os/mapping.h"
#include "os/process.h"
#include "os/userfaultfd.h"
#include "os/worker_thread.h"
#include "page/bitmap.h"
#include "restore/copying.h"
#include "restore/guest_layout.h"
#include "restore/read_ahead.h"

namespace memferry {

enum class PrePaging {
  kNone,
  kSequential,  // only in front of who reads in sequence
  kAll,         // that, and everything else in order
};

struct RestoreEvent {
  enum class Kind {
    kComplete,  // everything is there, and nothing of this is needed any more
    kLost,  // `lost` cannot be read from the snapshot; poisoned after acknowledge_loss() or the grace period
    kOwnerGone,  // the owner has ended, or runs another program; nothing more happens
    kFailed,     // over: `code` and `message` say why; what was missing is poisoned
  };
  Kind kind;
  std::string code;
  std::string message;
  std::vector<PageRun> lost;
};

struct RestoreStats {
  std::uint64_t pages = 0;
  std::uint64_t installed = 0;  // of them at any time
  std::uint64_t removed = 0;    // now
  std::uint64_t faults = 0;
  std::uint64_t zeros = 0;  // faults that were answered with zeros
  std::uint64_t ahead = 0;  // pages that nobody had waited for
  std::uint64_t again =
      0;  // faults and runs that had to wait for an event to be read, or for a copy under way
  std::uint64_t slow = 0;  // faults whose page was not in memory here
  std::uint64_t remove_events = 0;
  std::uint64_t lost = 0;  // now: what is removed is no loss any more
};

class SnapshotPager {
 public:
  struct Config {
    Userfaultfd uffd;  // adopted
    std::shared_ptr<Process> owner;
    std::vector<RestoreSpan> spans;
    std::uint64_t page_size = 0;
    PrePaging pre_paging = PrePaging::kSequential;
    std::chrono::milliseconds loss_grace{250};
    // How soon an exec of the owner's is noticed, which no descriptor tells of, and the loss of what it holds.
    std::chrono::milliseconds look_after_owner{500};
    // From the pager's threads; must not block.
    std::function<void(const RestoreEvent&)> on_event;
    // What the spans' `from` lies in. `read_now` reads a page of it if that needs no waiting; empty: there is no such way.
    std::shared_ptr<const void> source;
    std::function<bool(const std::byte* from, std::span<std::byte> into)> read_now;
    // How many of the `bytes` at `from` the source still has: what is cut off within a page reads as zeros in a mapping.
    // Empty: it never shrinks.
    std::function<std::uint64_t(const std::byte* from, std::uint64_t bytes)> still_has;
    // The source itself is on its way here (a region that a migration fills): a page that is missing there is waited for
    // by whoever needs it, and what is brought in order is only what has come, until source_complete().
    bool source_arrives = false;
  };

  // Serves from here on. Throws std::invalid_argument (the layout; a userfaultfd that is not registered there, or asks for
  // too much), SystemError.
  explicit SnapshotPager(Config config);
  ~SnapshotPager() { close(); }
  SnapshotPager(const SnapshotPager&) = delete;
  SnapshotPager& operator=(const SnapshotPager&) = delete;

  // The source is all there.
  void source_complete();
  // The loss has been told to whom it concerns.
  void acknowledge_loss() { losses_.acknowledge(); }
  // Twice is fine.
  void close();

  [[nodiscard]] RestoreStats stats() const;
  // Pages that nobody has written count as clean, for a tracker by the same userfaultfd.
  [[nodiscard]] bool write_protects() const { return write_protect_; }
  [[nodiscard]] const LatencyHistogram& latencies() const { return latencies_; }

 private:
  using Clock = std::chrono::steady_clock;
  // kAgain: an event is to be read first; kNoMemory: the owner may have none at the moment. Neither is waited for here.
  enum class Served { kDone, kAgain, kNoMemory };
  struct Fault {
    PageNumber page;
    Clock::time_point seen;
  };

  // The reader's thread.
  void run(WorkerThread& self);
  void read_events(std::vector<Fault>& faults);
  void on_event(const uffd_msg& event, Clock::time_point now, std::vector<Fault>& faults);
  void serve_all(std::vector<Fault>& faults);
  Served serve(PageNumber page);
  void finish_if_complete();
  void end(bool owner_lives);
  void drain_until_stopped(WorkerThread& self);

  // Any of our threads. Those that install say whether an unread event is in the way.
  Served install(PageRun run, std::uint64_t* installed, const std::byte* content = nullptr);
  Served install_zeros(PageNumber page);
  [[nodiscard]] PageRun wanted_part(
      PageRun run) const;  // its first stretch that is neither there nor removed
  Served outcome(const PageResult& result, PageNumber page, const char* what);
  void poison(PageRun run);
  void read_events_only();
  void note_memory(Served served);
  void fail(const std::string& code, const std::string& message);
  void emit(const RestoreEvent& event) const { config_.on_event(event); }

  // The other threads.
  void bring_ahead(WorkerThread& self);
  bool bring(PageRun run, bool sweeping, WorkerThread& self);
  void queue_ahead(PageRun run);
  void wait_for_disk(WorkerThread& self);
  [[nodiscard]] Served install_in_gate(PageRun run, std::uint64_t* installed, Copying* copying = nullptr);

  Config config_;
  GuestLayout layout_;
  const bool huge_;
  // The ranges are registered for write protection that tells by itself (WP_ASYNC): pages are installed protected, so
  // that they count as clean until they are written.
  bool write_protect_;
  Mapping zeros_;  // of a huge page: there is no ZEROPAGE for those

  AtomicBitmap installed_;
  AtomicBitmap removed_;
  LossReports losses_;

  std::mutex gate_;        // see above
  Copying reader_copies_;  // more than one page, for who walks forward
  Copying ahead_copies_;
  std::atomic<bool> reader_waits_{false};
  std::atomic<bool> ending_{false};
  std::atomic<bool> over_{false};  // complete, or the owner has gone: the ranges are let go of
  std::atomic<bool> failed_{false};
  std::atomic<bool> source_arrives_;

  std::vector<std::byte> page_;         // the reader's
  std::atomic<int> without_memory_{0};  // tries since something could be installed
  ReadAhead read_ahead_;                // the reader's

  std::mutex jobs_mutex_;  // guards the next three
  std::deque<PageRun> ahead_jobs_;
  std::deque<PageNumber> slow_jobs_;
  std::condition_variable slow_jobs_changed_;

  LatencyHistogram latencies_;
  std::atomic<std::uint64_t> faults_{0};
  std::atomic<std::uint64_t> zeros_served_{0};
  std::atomic<std::uint64_t> ahead_{0};
  std::atomic<std::uint64_t> again_{0};
  std::atomic<std::uint64_t> slow_{0};
  std::atomic<std::uint64_t> remove_events_{0};

  std::latch begun_{1};     // until every thread is there, since they wake one another
  std::mutex close_mutex_;  // guards the joining in close()
  std::vector<std::unique_ptr<WorkerThread>> slow_threads_;
  WorkerThread ahead_thread_;
  WorkerThread reader_;
};

}  // namespace memferry
