// Pages the memory of another process from a PageSource, and can be followed by another one: when this process dies, or
// hands over, a new pager attaches to the same memory with the same userfaultfd and goes on where this one stopped.
//
//   what is there      is what the owner's memory says: its page tables, or the file that it is
//   what was dropped   (discarded by the owner, after it was there or before) is in the *ledger* (page_ledger.h): a bit
//                      for each page that was once settled, in a shared file where a successor is to know it
//   what was read      of the userfaultfd, and not noted yet, is in the ledger too: the kernel writes the events there
//   who waits          is woken when a pager begins, and faults again; who discards waits for its event to be read
//
// A successor without the ledger brings a page that was discarded from the source again: old content where the owner
// expects zeros. The first one refuses memory that anybody has touched: what is there would count as brought. Nobody may
// close the last userfaultfd in between: missing pages would read as zeros.
//
// Life: construct, which serves; everything is there (kDone): the memory is ordinary again; or leave() for a successor;
// or end(): what is missing fails to be read. Its destructor leaves.
//
// Threads: one reads the events and serves faults, one brings pages in order; both call on_event, which must not block.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fault/forked_copies.h"
#include "fault/latency_histogram.h"
#include "fault/loss_reports.h"
#include "fault/page_ledger.h"
#include "fault/page_source.h"
#include "fault/sequential_detector.h"
#include "os/worker_thread.h"
#include "page/region.h"

namespace memferry {

class SourcePager {
 public:
  enum class EventKind {
    kDone,    // every page is there
    kLost,    // these cannot be had from the source: they fail to be read from now on
    kFailed,  // paging is over, and what is missing waits: end() or a successor
  };
  struct Event {
    EventKind kind;
    std::string code;
    std::string message;
    std::vector<PageRun> lost;
  };
  struct Config {
    std::shared_ptr<Region> region;  // attached, with a userfaultfd
    std::unique_ptr<PageSource> source;
    int ledger = -1;      // a file for the ledger; -1: in memory
    bool prepage = true;  // brings everything in order, beside the faults
    // From the report of a loss to its poisoning: whoever is told has a moment first.
    std::chrono::milliseconds loss_grace{100};
    std::function<void(const Event&)> on_event;
  };
  struct Stats {
    std::uint64_t pages = 0;
    std::uint64_t settled = 0;  // there, or dropped by the owner
    std::uint64_t found = 0;    // of them there when it began
    std::uint64_t faults = 0;
    std::uint64_t lost = 0;  // now: what is discarded is no loss any more
    double p50_us = 0;
    double p99_us = 0;
  };

  // Throws SystemError, std::invalid_argument, OwnerGone.
  explicit SourcePager(Config config);
  ~SourcePager() { leave(); }
  SourcePager(const SourcePager&) = delete;
  SourcePager& operator=(const SourcePager&) = delete;

  // Stops. Whoever touches a missing page waits for a successor.
  void leave();
  // Stops, and what is missing fails to be read (or, where this kernel cannot do that, the owner is ended).
  void end();
  [[nodiscard]] Stats stats() const;

 private:
  enum class Outcome { kHere, kAgain, kGone };
  void look_for_what_is_there();
  void note_what_was_read();
  void run(WorkerThread& self);
  void prepage(WorkerThread& self);
  void on_event(const uffd_msg& event);
  void serve(PageNumber page, std::vector<std::byte>& buffer);
  bool bring(PageRun run, std::vector<std::byte>& buffer);
  Outcome install(PageRun run, const std::byte* bytes);
  void settle(PageRun run);
  void wake(PageRun run);
  void poison(PageRun run);
  [[nodiscard]] bool poison_missing(PageRun run);
  [[nodiscard]] bool brought(PageNumber page);
  template <typename Visit>
  void for_each_unsettled(Visit visit) const;
  void tell(EventKind kind, std::string code, std::string message, std::vector<PageRun> lost = {});
  void finish();

  Config config_;
  Region& memory_;
  const std::uint64_t page_size_;
  const std::uint64_t pages_;
  PageLedger ledger_;
  LossReports losses_;
  SequentialDetector detector_;
  LatencyHistogram latencies_;
  std::atomic<std::uint64_t> settled_{0};
  std::atomic<std::uint64_t> faults_{0};
  std::atomic<std::uint64_t> cursor_{0};
  std::atomic<bool> failed_{false};
  std::atomic<bool> over_{false};
  std::uint64_t found_ = 0;
  // Shared while pages are installed, whole while events are read and noted, see Pager::layout_.
  std::shared_mutex layout_;
  std::mutex leaving_;                      // one leave() at a time
  std::unique_ptr<ForkedCopies> children_;  // of the faults' thread
  std::unique_ptr<Region::User> user_;
  WorkerThread faults_thread_;
  WorkerThread prepage_thread_;
};

}  // namespace memferry
