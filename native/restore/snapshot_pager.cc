#include "restore/snapshot_pager.h"

#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <stdexcept>
#include <thread>

#include "fault/gone.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"
#include "restore/registration.h"
#include "restore/touch.h"

namespace memferry {

namespace {

constexpr std::size_t kEventsAtOnce = 32;
constexpr int kFaultThreadNice = -20;
// A disk that is waited for must not hold up those whose pages are here.
constexpr int kSlowThreads = 4;
// Between the reading of an event and the owner's waking the kernel still answers EAGAIN.
constexpr std::chrono::microseconds kAgainAfter{20};
constexpr int kLastLooks = 3;
constexpr int kLastLookMs = 2;
constexpr std::uint64_t kLookEveryFaults = 1024;
// An owner without memory: two seconds of it.
constexpr std::chrono::milliseconds kMemoryAfter{2};
constexpr int kTriesWithoutMemory = 1000;

}  // namespace

SnapshotPager::SnapshotPager(Config config)
    : config_(std::move(config)),
      layout_(config_.spans, config_.page_size),
      huge_(layout_.page_size() != system_page_size()),
      write_protect_((config_.uffd.enabled() & abi::kUffdFeatureWpAsync) != 0),
      zeros_(huge_ ? Mapping::anonymous(layout_.page_size(), PROT_READ) : Mapping()),
      installed_(layout_.pages()),
      removed_(layout_.pages()),
      losses_({.pages = layout_.pages(),
               .grace = config_.loss_grace,
               .needless = [this](PageNumber page) { return removed_.test(page); },
               .report =
                   [this](const std::string& why, std::vector<PageRun> lost) {
                     emit({.kind = RestoreEvent::Kind::kLost,
                           .code = "PAGES_LOST",
                           .message = why,
                           .lost = std::move(lost)});
                   },
               .due_changed = [this] { reader_.wake(); }}),
      source_arrives_(config_.source_arrives),
      page_(config_.read_now && !huge_ ? layout_.page_size() : 0),
      read_ahead_(layout_.page_size(), layout_.pages()) {
  // What would follow its memory elsewhere, or its child's, is more than can be served by one descriptor.
  if ((config_.uffd.enabled() & (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP)) != 0)
    throw std::invalid_argument("a userfaultfd that follows fork or mremap");
  for (const RestoreSpan& span : layout_.spans()) {
    for (const std::uint64_t offset : {std::uint64_t{0}, span.bytes - layout_.page_size()}) {
      const Registration found = registration_at(config_.uffd, span.at.plus(offset), layout_.page_size());
      if (!found.missing) throw std::invalid_argument("a mapping that the userfaultfd does not serve");
      write_protect_ = write_protect_ && found.write_protect;
    }
  }
  const auto start = [this](WorkerThread& thread, const char* name,
                            void (SnapshotPager::*body)(WorkerThread&)) {
    thread.start(name, [this, body](WorkerThread& self) {
      begun_.wait();
      (this->*body)(self);
    });
  };
  try {
    for (int i = 0; i < kSlowThreads; ++i) {
      slow_threads_.push_back(std::make_unique<WorkerThread>());
      start(*slow_threads_.back(), "mf-disk", &SnapshotPager::wait_for_disk);
    }
    if (config_.pre_paging != PrePaging::kNone) start(ahead_thread_, "mf-ahead", &SnapshotPager::bring_ahead);
    start(reader_, "mf-restore", &SnapshotPager::run);
  } catch (...) {
    begun_.count_down();
    close();
    throw;
  }
  begun_.count_down();
}

void SnapshotPager::run(WorkerThread& self) {
  set_this_thread_nice(kFaultThreadNice);
  std::array<pollfd, 3> waiting{pollfd{config_.uffd.fd(), POLLIN, 0}, pollfd{self.wake_fd(), POLLIN, 0},
                                pollfd{config_.owner->pidfd(), POLLIN, 0}};
  std::vector<Fault> faults;
  Clock::time_point looked = Clock::now();
  std::uint64_t counted = 0;
  bool owner_lives = true;
  while (!self.stopping() && !failed_.load(std::memory_order_acquire)) {
    std::chrono::nanoseconds most = config_.look_after_owner;
    if (!faults.empty())
      most = without_memory_.load(std::memory_order_relaxed) > 0 ? std::chrono::nanoseconds(kMemoryAfter)
                                                                 : std::chrono::nanoseconds(kAgainAfter);
    if (const auto due = losses_.due())
      most = std::clamp<std::chrono::nanoseconds>(*due - Clock::now(), std::chrono::nanoseconds(0), most);
    const timespec timeout{most.count() / 1'000'000'000, most.count() % 1'000'000'000};
    const int ready = ::ppoll(waiting.data(), waiting.size(), &timeout, nullptr);
    if (ready > 0 && waiting[2].revents != 0) owner_lives = false;
    if (ready > 0 && waiting[1].revents != 0) self.drain_wake();
    const Clock::time_point now = Clock::now();
    if (now - looked >= config_.look_after_owner) {
      owner_lives = owner_lives && config_.owner->alive();
      looked = now;
    }
    if (!owner_lives) break;
    try {
      if (ready > 0 && waiting[0].revents != 0) read_events(faults);
      serve_all(faults);
      if (const auto due = losses_.due(); due && Clock::now() >= *due)
        losses_.poison([this](PageRun run) { poison(run); });
      const std::uint64_t served = faults_.load(std::memory_order_relaxed);
      if (ready == 0 || waiting[1].revents != 0 || served - counted >= kLookEveryFaults) {
        counted = served;
        finish_if_complete();
      }
    } catch (const OwnerGone&) {
      owner_lives = false;
      break;
    } catch (const std::exception& error) {
      owner_lives = config_.owner->alive();
      if (!owner_lives) break;
      fail("SYSTEM", error.what());
    }
  }
  ending_.store(true, std::memory_order_release);
  losses_.stop();
  if (owner_lives) {
    end(true);
    drain_until_stopped(self);
    return;
  }
  over_.store(true, std::memory_order_release);
  emit({.kind = RestoreEvent::Kind::kOwnerGone,
        .code = "",
        .message = "the process that owned the memory has ended",
        .lost = {}});
}

// The ranges are let go of. Who was on its way into an event by then waits for it to be read.
void SnapshotPager::drain_until_stopped(WorkerThread& self) {
  std::vector<Fault> ignored;
  std::array<pollfd, 2> waiting{pollfd{config_.uffd.fd(), POLLIN, 0}, pollfd{self.wake_fd(), POLLIN, 0}};
  for (int after = 0; !self.stopping() || after < kLastLooks;) {
    const bool stopping = self.stopping();
    if (::poll(waiting.data(), stopping ? 1 : 2, stopping ? kLastLookMs : -1) > 0) {
      if (waiting[1].revents != 0) self.drain_wake();
      if ((waiting[0].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0) return;
      if (waiting[0].revents != 0) read_events(ignored);
    }
    if (stopping) ++after;
  }
}

// All that is there: while an event is unread nothing can be installed anywhere.
void SnapshotPager::read_events(std::vector<Fault>& faults) {
  std::array<uffd_msg, kEventsAtOnce> events;
  reader_waits_.store(true, std::memory_order_release);
  const std::lock_guard gate(gate_);
  reader_waits_.store(false, std::memory_order_release);
  for (;;) {
    const std::size_t count = config_.uffd.read_events(events);
    const Clock::time_point now = Clock::now();
    for (std::size_t i = 0; i < count; ++i) on_event(events[i], now, faults);
    if (count < events.size()) return;
  }
}

void SnapshotPager::on_event(const uffd_msg& event, Clock::time_point now, std::vector<Fault>& faults) {
  switch (event.event) {
    case UFFD_EVENT_PAGEFAULT: {
      const auto page = layout_.page_at(OwnerAddress(event.arg.pagefault.address));
      if (!page) {
        fail("PROTOCOL", "a fault outside of the mappings that were named");
        return;
      }
      if ((event.arg.pagefault.flags & (UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_MINOR)) != 0) {
        fail("PROTOCOL", "a fault on a page that is there: the userfaultfd asks for more than missing pages");
        return;
      }
      faults_.fetch_add(1, std::memory_order_relaxed);
      faults.push_back({*page, now});
      return;
    }
    case UFFD_EVENT_REMOVE:
    case UFFD_EVENT_UNMAP:
      remove_events_.fetch_add(1, std::memory_order_relaxed);
      layout_.for_each_run(OwnerAddress(event.arg.remove.start), OwnerAddress(event.arg.remove.end),
                           [this](PageRun run) {
                             removed_.set_run(run);
                             installed_.clear_run(run);
                             // A loss that is discarded is zeros like anything else; who waits for it looks again.
                             if (losses_.forget(run) == 0) return;
                             for (PageRun left = run; left.count > 0;) {
                               const GuestLayout::Piece piece = layout_.piece(left);
                               config_.uffd.wake(piece.at, piece.run.count * layout_.page_size());
                               left = {piece.run.end(), left.count - piece.run.count};
                             }
                           });
      return;
    default:
      fail("PROTOCOL", "an event that was not asked for");
  }
}

void SnapshotPager::serve_all(std::vector<Fault>& faults) {
  std::size_t kept = 0;
  for (const Fault& fault : faults) {
    if (over_.load(std::memory_order_relaxed)) break;
    const Served served = serve(fault.page);
    note_memory(served);
    if (served != Served::kDone) {
      again_.fetch_add(1, std::memory_order_relaxed);
      faults[kept++] = fault;
    } else {
      latencies_.record(Clock::now() - fault.seen);
    }
  }
  faults.resize(kept);
}

SnapshotPager::Served SnapshotPager::serve(PageNumber page) {
  // Removed; or installed since the fault was raised; or discarded by an owner who does not tell. It is either there, and
  // whoever waits only has to look again, or it is zeros.
  if (removed_.test(page) || installed_.test(page)) return install_zeros(page);
  // Whoever waits for a lost page is woken when it is poisoned, or removed.
  if (losses_.lost(page)) return Served::kDone;
  // It is being copied at this moment, and whoever waits is woken with the last page of that. Looked at again until then.
  if (ahead_copies_.has(page)) return Served::kAgain;
  const ReadAhead::Advice advice = read_ahead_.fault(page);
  if (advice.later.count > 0) queue_ahead(advice.later);
  const GuestLayout::Piece piece = layout_.piece({page, advice.at_once});
  std::uint64_t installed = 0;
  if (piece.run.count == 1 && !page_.empty() && config_.read_now(piece.from, page_))
    return install(piece.run, &installed, page_.data());
  const std::uint64_t here =
      resident({piece.from, piece.run.count * layout_.page_size()}) / layout_.page_size();
  if (here == 0) {
    slow_.fetch_add(1, std::memory_order_relaxed);
    {
      const std::lock_guard lock(jobs_mutex_);
      slow_jobs_.push_back(page);  // bounded by the owner's threads: each waits for one page
    }
    slow_jobs_changed_.notify_one();
    return Served::kDone;
  }
  const Copying::Held held(reader_copies_, {page, here});
  const Served served = install({page, here}, &installed);
  if (installed > 1) ahead_.fetch_add(installed - 1, std::memory_order_relaxed);
  // Only the page itself is waited for; the rest may come when it will.
  return installed_.test(page) || removed_.test(page) ? Served::kDone : served;
}

PageRun SnapshotPager::wanted_part(PageRun run) const {
  PageNumber from = run.first;
  while (from < run.end()) {
    const auto free = installed_.next_clear(from, run.end(), run.count);
    if (!free) break;
    PageNumber at = free->first;
    while (at < free->end() && (removed_.test(at) || losses_.lost(at))) ++at.value;
    PageNumber end = at;
    while (end < free->end() && !removed_.test(end) && !losses_.lost(end)) ++end.value;
    if (end > at) return PageRun{at, end.value - at.value};
    from = free->end();
  }
  return PageRun{run.end(), 0};
}

// `content`: of the run's one page, where it has been read already.
SnapshotPager::Served SnapshotPager::install(PageRun run, std::uint64_t* installed,
                                             const std::byte* content) {
  const std::uint64_t size = layout_.page_size();
  bool single = false;
  PieceSize pieces;
  for (;;) {
    PageRun part = wanted_part(run);
    if (part.count == 0) return Served::kDone;
    part.count = single ? 1 : std::min(part.count, pieces.most());
    GuestLayout::Piece piece = layout_.piece(part);
    if (config_.still_has && content == nullptr) {
      piece.run.count = config_.still_has(piece.from, piece.run.count * size) / size;
      if (piece.run.count == 0) {
        (void)losses_.lose(piece.run.first, "the snapshot is shorter than it was");
        continue;
      }
    }
    PageResult result;
    try {
      result = config_.uffd.copy(piece.at, content != nullptr ? content : piece.from, piece.run.count * size,
                                 true, write_protect_);
    } catch (const SystemError& error) {
      if (error.error() != EFAULT && error.error() != EHWPOISON) throw;
      // The snapshot cannot be read there; which page it is shows one by one.
      if (piece.run.count == 1) (void)losses_.lose(piece.run.first, error.what());
      single = true;
      continue;
    }
    const std::uint64_t done = result.bytes_done / size;
    if (done > 0) {
      installed_.set_run({piece.run.first, done});
      *installed += done;
    }
    if (result.outcome == PageOutcome::kOk) {
      pieces.went_well();
      continue;
    }
    if (result.outcome == PageOutcome::kGone && pieces.refused(piece.run.count - done)) continue;
    const PageNumber stopped{piece.run.first.value + done};
    const Served served = outcome(result, stopped, "UFFDIO_COPY");
    if (served != Served::kDone) return served;
  }
}

// Between two tries, of whatever thread.
void SnapshotPager::note_memory(Served served) {
  if (served == Served::kDone) {
    without_memory_.store(0, std::memory_order_relaxed);
  } else if (served == Served::kNoMemory &&
             without_memory_.fetch_add(1, std::memory_order_relaxed) >= kTriesWithoutMemory) {
    throw SystemError("UFFDIO_COPY", ENOMEM);
  }
}

// Of a single page where it is kGone. After this it counts as there, or as removed, unless it has to be tried again.
SnapshotPager::Served SnapshotPager::outcome(const PageResult& result, PageNumber page, const char* what) {
  switch (result.outcome) {
    case PageOutcome::kAgain:
      return Served::kAgain;
    case PageOutcome::kExists:
      if (!removed_.test(page)) installed_.set(page);
      config_.uffd.wake(layout_.piece({page, 1}).at, layout_.page_size());
      return Served::kDone;
    case PageOutcome::kNoMemory:
      return Served::kNoMemory;
    case PageOutcome::kGone: {
      // Unmapped there, which is none of our business; it is nowhere to be installed.
      const OwnerAddress at = layout_.piece({page, 1}).at;
      confirm_unmapped(*config_.owner, at, layout_.page_size(), what);
      removed_.set(page);
      config_.uffd.wake(at, layout_.page_size());
      return Served::kDone;
    }
    default:
      throw SystemError(what, result.error);
  }
}

SnapshotPager::Served SnapshotPager::install_zeros(PageNumber page) {
  const OwnerAddress at = layout_.piece({page, 1}).at;
  const PageResult result = huge_ ? config_.uffd.copy(at, zeros_.data(), layout_.page_size(), true)
                                  : config_.uffd.zeropage(at, layout_.page_size(), true);
  if (result.outcome == PageOutcome::kOk) {
    zeros_served_.fetch_add(1, std::memory_order_relaxed);
    return Served::kDone;
  }
  return outcome(result, page, "UFFDIO_ZEROPAGE");
}

// Everything is there: from here on the memory is its owner's alone. Where it can be tracked by the same descriptor it
// stays registered for that, and what was noted until now counts as written.
void SnapshotPager::finish_if_complete() {
  if (over_.load(std::memory_order_relaxed)) return;
  for (PageNumber from{0}; from.value < layout_.pages();) {
    const auto absent = installed_.next_clear(from, PageNumber{layout_.pages()}, layout_.pages());
    if (!absent) break;
    for (PageNumber page = absent->first; page < absent->end(); ++page.value)
      if (!removed_.test(page)) return;
    from = absent->end();
  }
  over_.store(true, std::memory_order_release);
  for (const RestoreSpan& span : layout_.spans()) {
    (void)config_.uffd.unregister(span.at, span.bytes);
    if (write_protect_) config_.uffd.register_wp(span.at, span.bytes);
  }
  emit({.kind = RestoreEvent::Kind::kComplete, .code = "", .message = "", .lost = {}});
}

void SnapshotPager::fail(const std::string& code, const std::string& message) {
  if (failed_.exchange(true, std::memory_order_acq_rel)) return;
  emit({.kind = RestoreEvent::Kind::kFailed, .code = code, .message = message, .lost = {}});
  reader_.wake();
}

RestoreStats SnapshotPager::stats() const {
  const auto get = [](const std::atomic<std::uint64_t>& value) {
    return value.load(std::memory_order_relaxed);
  };
  return {.pages = layout_.pages(),
          .installed = installed_.count(),
          .removed = removed_.count(),
          .faults = get(faults_),
          .zeros = get(zeros_served_),
          .ahead = get(ahead_),
          .again = get(again_),
          .slow = get(slow_),
          .remove_events = get(remove_events_),
          .lost = losses_.count()};
}

}  // namespace memferry
