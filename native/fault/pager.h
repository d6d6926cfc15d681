// The destination's fault handler: it registers the regions with userfaultfd, asks the source for pages that
// somebody waits for, and installs what arrives, whichever channel brings it. It needs no thread of the
// owner's: an owner that is blocked on a missing page itself is served like anyone else.
//
// Life: construct (idle) -> serve() (from now on what is not received is missing) -> finish() when every page
// is there, or poison_missing() and then stop(): what is missing fails to be read, and never reads as zeros.
//
// Threads: one of its own reads the faults. install*() from the channels' threads; the rest from the owner's
// and the supervisor's.
//
// What the guest itself discards (madvise) while pages are on their way becomes zeros for the guest where the
// page had arrived, as the guest asked; a page that had not arrived yet still comes from the source, as if
// the discard had come before the move. Unmapping a part of a region is only legal after close().
//
// Memory of reserved huge pages (fault/pager_huge.cc), of this process or another, is installed by whole ones: a fault asks
// for all of a huge page that is missing, and what cannot be had takes the whole one with it.
//
// Memory of another process (fault/pager_attached.cc) is paged by the userfaultfd that came with it, from the pager's
// construction on: whoever touches it there waits until serve(). What its owner discards reads as zeros from then on,
// arrived or not, as far as the userfaultfd tells (EVENT_REMOVE; of a shared file that says the same of MADV_DONTNEED,
// which drops nothing: its owner must not use that there while pages are on their way). Private memory's pages that came before serve() lie in
// the region's waiting room, and are installed from there: at once where somebody waits, the others by a thread.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "fault/arrival_map.h"
#include "fault/demand_writer.h"
#include "fault/forked_copies.h"
#include "fault/huge_memory.h"
#include "fault/latency_histogram.h"
#include "fault/sequential_detector.h"
#include "fault/waiting_faults.h"
#include "os/failing_memory.h"
#include "os/userfaultfd.h"
#include "os/worker_thread.h"

namespace memferry {

class Pager {
 public:
  using Clock = std::chrono::steady_clock;
  // Pages that were asked for as neighbours of another one are given this long before they are asked for by
  // themselves: the source may have sent them by another channel, or may not send neighbours at all.
  static constexpr std::chrono::microseconds kExpectedWithin{500};

  // How long after a fault the push still makes room for the next one.
  static constexpr std::chrono::milliseconds kLately{100};

  // `maps` outlive the pager. `broken` is called at most once, from a thread that installs or serves, when the
  // memory is not what it should be; it must not block. Throws SystemError (userfaultfd).
  Pager(std::vector<ArrivalMap*> maps, std::function<void(std::string code, std::string message)> broken);
  ~Pager();  // stop()
  Pager(const Pager&) = delete;
  Pager& operator=(const Pager&) = delete;

  // How long somebody else than a source that is there may take to answer before the source is asked.
  static constexpr std::chrono::milliseconds kTriedWithin{20};

  struct Asked {
    std::uint32_t region = 0;
    PageRun run;
    bool source_online = false;
    bool walk = false;   // part of a walk, and asked for the first time
    bool tried = false;  // kTried was the answer before
    bool late = false;   // and who was asked then has not answered in time
    bool huge = false;   // a part of a huge page
  };
  // Where a request goes. Without a router everything goes to the source, while that is online. kSent: somebody else
  // was asked; kTried: the same, while the source is there and is to be asked where that takes long; kNobody: nobody can
  // be now, ask_again() when that changes; kComing, for a `walk` alone: it was asked for ahead of time, and is given
  // kExpectedWithin. From the pager's thread; must not block.
  enum class Route { kSource, kSent, kTried, kNobody, kComing };
  using Router = std::function<Route(const Asked& asked)>;
  void set_router(Router router);  // before serve()
  // What waits and was not sent is sent now; with `routed` what was sent elsewhere than to the source as well.
  void ask_again(bool routed);
  // The source has not got this page any more.
  void ask_elsewhere(std::uint32_t region, PageNumber page);
  // Asks for a missing page as if somebody waited for it: who does not answer is not there. Once until it is here.
  void probe(std::uint32_t region, PageNumber page);

  // Installs what lies in waiting rooms, for a migration that never pages. False when it cannot: broken() has been called.
  [[nodiscard]] bool deliver();
  // Registers every region as it is now. Nothing that is not received may be populated. Throws SystemError.
  void serve();
  // Requests can be sent (everything that waits is asked for again), or not.
  void set_online(bool online);
  [[nodiscard]] DemandWriter& writer() { return writer_; }

  // Installs those of the pages that nobody has claimed yet, gives how many they were. False in `intact`
  // when one could not be installed: broken() has been called, and the page counts as missing.
  struct Installed {
    std::uint64_t pages = 0;
    bool intact = true;
  };
  Installed install(std::uint32_t region, PageRun run, const std::byte* bytes);
  Installed install_zeros(std::uint32_t region, PageRun run);
  // These will never come: claims those that nobody has claimed and gives them. They fail to be read after
  // poison_lost(); until then whoever touches one waits.
  [[nodiscard]] std::vector<PageRun> give_up(std::uint32_t region, PageRun run);
  // The pages that fail to be read when this one does: of huge memory a whole one's.
  [[nodiscard]] PageRun fails_with(std::uint32_t region, PageNumber page) const {
    return huge_[region] ? huge_[region]->unit(page) : PageRun{page, 1};
  }
  // They are to come again, and nobody runs in the memory yet: before they are dropped.
  void forget(std::uint32_t region, PageRun run) {
    if (huge_[region]) huge_[region]->forget(run);
  }
  void poison_lost();
  // Everything has arrived: the memory is ordinary again.
  void finish();
  // From now on pages that are not received fail when they are touched, and who waits for one is woken.
  void poison_missing();
  void stop();

  [[nodiscard]] bool serving() const { return serving_.load(std::memory_order_acquire); }
  [[nodiscard]] const LatencyHistogram& latencies() const { return latencies_; }
  // Whether somebody had to wait for a remote page within the last moments.
  [[nodiscard]] bool faulted_lately() const;
  // The same of pages that no reading ahead would have brought in time: of faults that do not walk forward.
  [[nodiscard]] bool strayed_lately() const;
  // How long the longest wait for an answer of the source has lasted; of somebody, and of a probe.
  [[nodiscard]] std::chrono::nanoseconds longest_wait() const;
  [[nodiscard]] std::chrono::nanoseconds longest_probe() const;
  [[nodiscard]] std::uint64_t extra_bytes() const;
  [[nodiscard]] FaultScope scope() const { return own_ ? own_->scope() : FaultScope::kKernelAndUser; }

 private:
  struct Request {
    std::uint32_t region;
    PageRun run;
    bool walk = false;   // part of a walk, and asked for the first time
    bool tried = false;  // was sent elsewhere already
    bool late = false;   // and has not come
    bool huge = false;   // what is missing of a huge page
  };
  // Of a huge page, in one piece.
  static constexpr std::uint64_t kMostAtOnce = 64;

  void run(WorkerThread& self);
  void on_fault(std::uint32_t region, PageNumber page, Clock::time_point now, std::vector<Request>& requests);
  std::optional<Clock::time_point> send(const std::vector<Request>& requests);  // when one of them is due
  [[nodiscard]] static bool lately(const std::atomic<Clock::rep>& last);
  void note_kind(const SequentialDetector::Advice& advice, Clock::time_point now);
  // The pager's own thread must not wait for the layout to settle: it may do so only once that thread has read an event.
  enum class Patience { kWaits, kOwnThread };
  enum class Copied { kAll, kFailed, kAgain };  // kAgain: none of it, and only for kOwnThread
  void serve_zero(std::uint32_t region, PageNumber page, Patience patience);
  bool copy_claimed(std::uint32_t region, PageRun run, const std::byte* bytes) {
    return copy_with(region, run, bytes, Patience::kWaits) == Copied::kAll;
  }
  Copied copy_with(std::uint32_t region, PageRun run, const std::byte* bytes, Patience patience);
  void raise_again(std::uint32_t region, PageNumber page);
  void arrived(std::uint32_t region, PageRun run);
  void poison(std::uint32_t region, PageRun run, Patience patience = Patience::kWaits);
  // kAgain: the event that is in the way must be read first, and only for kOwnThread.
  enum class Poisoned { kDone, kCannot, kAgain };
  Poisoned poison_part(std::uint32_t region, PageRun part, Patience patience);
  // Pages of `run` from its first on that lie in one mapping. None: they are in no mapping, and `count` says how many.
  struct Mapped {
    bool there = false;
    std::uint64_t count = 0;
  };
  [[nodiscard]] Mapped mapped_alike(std::uint32_t region, PageRun run) const;
  bool poison_populated(std::uint32_t region, PageNumber page);
  void make_failing(std::uint32_t region, PageRun part);
  void break_off(const char* code, const std::string& message);
  void break_off_gone(std::uint32_t region);
  void register_memory(std::uint32_t region);
  bool wait_again(int& tries) const;
  [[nodiscard]] Userfaultfd& uffd_of(std::uint32_t region);
  void read_faults(std::uint32_t from, std::vector<Request>& requests);

  // Of huge pages.
  void on_huge_fault(std::uint32_t region, PageNumber page, Clock::time_point now,
                     std::vector<Request>& requests);
  void send_huge(const Request& request);
  [[nodiscard]] std::chrono::milliseconds again_of_huge() const;
  Installed install_huge(std::uint32_t region, PageRun run, const std::byte* bytes);  // nullptr: zeros
  bool install_in_unit(std::uint32_t region, PageRun run, const std::byte* bytes, Installed& result);
  enum class Landed { kPart, kWhole, kNoMemory };
  Landed land_in_unit(std::uint32_t region, PageRun claimed, const std::byte* bytes);
  bool settle_huge(std::uint32_t region, PageRun unit);
  bool map_huge(std::uint32_t region, PageRun unit, Patience patience);
  void poison_huge(std::uint32_t region, PageRun run, Patience patience);
  Poisoned poison_unit(std::uint32_t region, PageRun unit, Patience patience);

  // Memory of others.
  struct Attached {
    std::unique_ptr<AtomicBitmap> room;  // received, and still in the waiting room; nullptr: there is none
    std::unique_ptr<AtomicBitmap>
        removed;  // discarded by the owner before it was here; nullptr: it tells neither that nor forks
    bool events = false;  // they are this pager's to read
  };
  void take_attached();
  void unregister_attached();
  void let_go_attached();
  void serve_attached();
  void deliver_all();
  Copied deliver_run(std::uint32_t region, PageRun run, Patience patience = Patience::kWaits);
  void give_up_rooms();
  void on_event(const uffd_msg& event, std::uint32_t from);
  void on_removed(std::uint32_t from, OwnerAddress start, OwnerAddress end);
  void add_child(std::uint32_t from, UniqueFd child);
  void visit_missing(pid_t owner, const ForkedCopies::Visit& visit) const;
  [[nodiscard]] std::shared_lock<std::shared_mutex> share_layout(std::uint32_t region);
  PageResult copy_present(std::uint32_t region, PageRun run, const std::byte* bytes);
  [[nodiscard]] std::optional<std::pair<std::uint32_t, PageNumber>> place_of(std::uint32_t from,
                                                                             OwnerAddress at) const;

  std::vector<ArrivalMap*> maps_;
  std::vector<std::unique_ptr<HugeMemory>> huge_;  // one a map, nullptr: of ordinary pages
  std::function<void(std::string, std::string)> broken_;
  std::atomic<bool> broken_once_{false};
  std::optional<Userfaultfd> own_;        // of this process's memory; none where all is of others
  std::optional<FailingMemory> failing_;  // where the kernel cannot poison pages
  std::atomic<std::uint32_t> failing_pieces_{0};
  std::vector<Attached> attached_;             // one a map
  std::atomic<std::uint64_t> undelivered_{0};  // in waiting rooms, or being installed from there
  std::atomic<bool> letting_go_{false};        // finish() unregisters: what is gone is no failure any more
  std::vector<std::unique_ptr<ForkedCopies>> children_;  // one a region that events are read for
  WorkerThread deliverer_;
  // Shared while a page of memory with `removed` is installed, whole while its events are read and noted: an install is
  // either before the discard, and dropped by it, or after it is known. Nothing that waits for events is done under it.
  std::shared_mutex layout_;
  std::atomic<bool> reader_waits_{false};  // who installs lets it go first
  DemandWriter writer_;
  Router router_;
  LatencyHistogram latencies_;
  std::atomic<bool> serving_{false};
  std::atomic<Clock::rep> last_request_{0};  // since the clock's epoch; 0: none yet
  std::atomic<Clock::rep> last_stray_{0};    // the same

  mutable std::mutex mutex_;  // guards the seven below; never held during a system call that can block
  WaitingFaults waiting_;
  SequentialDetector detector_;
  // When the last strays were, the newest first.
  std::array<Clock::rep, SequentialDetector::kBeforeSure + 1> strays_{};
  bool online_ = false;
  bool poisoning_ = false;
  std::uint64_t asked_again_ = 0;
  std::uint64_t rerouted_ = 0;
  std::vector<Request> elsewhere_;  // parts of huge pages that the source has not got any more

  WorkerThread thread_;
};

}  // namespace memferry
