#include "fault/source_pager.h"

#include <poll.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <utility>

#include "fault/begin_paging.h"
#include "fault/gone.h"

namespace memferry {
namespace {

constexpr std::uint64_t kPrepageBytes = 256 * 1024;
constexpr int kFaultThreadNice = -20;
constexpr int kPrepageNice = 5;
constexpr int kTries = 4096;  // the layout is changing: about two seconds
constexpr int kSpinningTries = 64;
constexpr std::chrono::microseconds kBetweenTries{500};

void between_tries(int tries) {
  if (tries < kSpinningTries) {
    ::sched_yield();
  } else {
    std::this_thread::sleep_for(kBetweenTries);
  }
}

}  // namespace

SourcePager::SourcePager(Config config)
    : config_(std::move(config)),
      memory_(*config_.region),
      page_size_(memory_.page_size()),
      pages_(memory_.pages()),
      ledger_(config_.ledger >= 0 ? PageLedger(pages_, config_.ledger) : PageLedger(pages_)),
      losses_({.pages = pages_,
               .grace = config_.loss_grace,
               .needless = [this](PageNumber page) { return ledger_.test(page); },
               .report =
                   [this](const std::string& why, std::vector<PageRun> lost) {
                     tell(EventKind::kLost, "PAGES_LOST", why, std::move(lost));
                   }}) {
  if (memory_.uffd() == nullptr || !config_.source)
    throw std::invalid_argument("a pager without a userfaultfd");
  if (!memory_.begin_events()) throw std::invalid_argument("another pager has this memory's userfaultfd");
  try {
    memory_.check_attached("page");
    // Once it has begun, a part of it may be ordinary memory already, when its last pager ended in finishing.
    if (ledger_.begun()) {
      for (const Extent& extent : memory_.extents())
        memory_.uffd()->register_missing(extent.start, extent.bytes);
    } else {
      begin_paging(memory_);
      ledger_.begin();
    }
    note_what_was_read();
    look_for_what_is_there();
    user_ = memory_.enlist([this] { leave(); });
    if (!user_) throw RegionGone("page");
    faults_thread_.start("mf-faults", [this](WorkerThread& self) { run(self); });
    prepage_thread_.start("mf-prepage", [this](WorkerThread& self) { prepage(self); });
    // Whoever waits for a page that a predecessor has been asked for faults again.
    for (const Extent& extent : memory_.extents()) memory_.uffd()->wake(extent.start, extent.bytes);
  } catch (...) {
    leave();
    throw;
  }
}

// After the registration: what is missing now stays so until it is brought.
void SourcePager::look_for_what_is_there() {
  for (const PageRun run : memory_.pages_there()) (void)ledger_.set(run);
  for (PageNumber page{0}; page.value < pages_; ++page.value) found_ += ledger_.test(page) ? 1 : 0;
  settled_ = found_;
}

// By a predecessor that died before it had noted it. Twice is fine: what was discarded once stays settled.
void SourcePager::note_what_was_read() {
  for (const uffd_msg& event : ledger_.events()) {
    if (event.event == UFFD_EVENT_FORK || event.event == UFFD_EVENT_PAGEFAULT)
      continue;  // gone; raised again
    on_event(event);
  }
  ledger_.forget_events(PageLedger::kEvents);
}

void SourcePager::leave() {
  {
    const std::lock_guard lock(leaving_);
    prepage_thread_.stop();
    faults_thread_.stop();
    // What is discarded from here on is the successor's to know.
    // One that never began knows nothing of the memory.
    const auto missing = !ledger_.begun()    ? Region::Missing::kUnknown
                         : settled_ < pages_ ? Region::Missing::kSome
                                             : Region::Missing::kNone;
    if (!over_.exchange(true)) memory_.end_events(missing);
    // What children have of a file is ordinary memory as well, then.
    if (settled_ >= pages_) children_.reset();
  }
}

void SourcePager::end() {
  leave();
  // There is no successor: whoever discards goes on, or what is missing could not be made to fail.
  if (memory_.begin_events()) memory_.end_events(Region::Missing::kNone);
  for_each_unsettled([this](PageRun run) { poison(run); });
}

template <typename Visit>
void SourcePager::for_each_unsettled(Visit visit) const {
  for (PageNumber at{0}; at.value < pages_;) {
    if (ledger_.test(at)) {
      ++at.value;
      continue;
    }
    PageRun run{at, 1};
    while (run.end().value < pages_ && !ledger_.test(run.end())) ++run.count;
    visit(run);
    at = run.end();
  }
}

SourcePager::Stats SourcePager::stats() const {
  const auto us = [](std::chrono::nanoseconds time) { return static_cast<double>(time.count()) / 1000.0; };
  return {pages_,
          settled_,
          found_,
          faults_,
          losses_.count(),
          us(latencies_.quantile(0.5)),
          us(latencies_.quantile(0.99))};
}

void SourcePager::tell(EventKind kind, std::string code, std::string message, std::vector<PageRun> lost) {
  if (kind == EventKind::kFailed && failed_.exchange(true)) return;
  if (config_.on_event) config_.on_event({kind, std::move(code), std::move(message), std::move(lost)});
}

void SourcePager::run(WorkerThread& self) {
  set_this_thread_nice(kFaultThreadNice);
  std::array<pollfd, 2> waiting{pollfd{self.wake_fd(), POLLIN, 0}, pollfd{memory_.uffd()->fd(), POLLIN, 0}};
  const std::span<uffd_msg, PageLedger::kEvents> read = ledger_.events();
  std::array<uffd_msg, PageLedger::kEvents> events;
  std::vector<std::byte> buffer(SequentialDetector::kLargestWindow * page_size_);
  while (!self.stopping()) {
    (void)::poll(waiting.data(), waiting.size(), -1);
    if ((waiting[0].revents & POLLIN) != 0) self.drain_wake();
    if ((waiting[1].revents & POLLIN) == 0) continue;
    try {
      std::size_t count = 0;
      {
        const std::unique_lock whole(layout_);
        count = memory_.uffd()->read_events(read);
        std::copy_n(read.begin(), count, events.begin());
        for (std::size_t i = 0; i < count; ++i) {
          // One that fails keeps nobody from the others, which are read for good.
          try {
            on_event(events[i]);
          } catch (const std::exception& error) {
            tell(EventKind::kFailed, "SYSTEM", error.what());
          }
        }
        ledger_.forget_events(count);
      }
      for (std::size_t i = 0; i < count; ++i) {
        if (events[i].event != UFFD_EVENT_PAGEFAULT) continue;
        const auto seen = std::chrono::steady_clock::now();
        const auto page = memory_.page_at(OwnerAddress{events[i].arg.pagefault.address});
        if (!page) continue;
        serve(*page, buffer);
        ++faults_;
        latencies_.record(std::chrono::steady_clock::now() - seen);
      }
    } catch (const std::exception& error) {
      tell(EventKind::kFailed, "SYSTEM", error.what());
      self.wait(100);
    }
  }
}

// Under layout_.
void SourcePager::on_event(const uffd_msg& event) {
  switch (event.event) {
    case UFFD_EVENT_REMOVE:
    case UFFD_EVENT_UNMAP: {  // nobody can touch it any more: whatever is mapped there next is not ours
      const OwnerAddress start{event.arg.remove.start};
      const OwnerAddress end{event.arg.remove.end};
      memory_.for_each_run_between(start, end, [this](PageRun run) { settle(run); });
      // A loss that is discarded is zeros like anything else; who waits for it looks again.
      memory_.for_each_run_between(start, end, [this](PageRun run) {
        if (losses_.forget(run) > 0) wake(run);
      });
      break;
    }
    case UFFD_EVENT_REMAP:
      tell(EventKind::kFailed, "REGION_GONE",
           "the owner has moved a part of its memory while pages are missing there");
      break;
    case UFFD_EVENT_FORK:
      if (!children_) {
        const auto missing = [this](const ForkedCopies::Visit& visit) {
          for_each_unsettled([&](PageRun run) {
            while (run.count > 0) {
              const PageRun part = memory_.contiguous_run(run);
              visit(memory_.owner_address(part.first), part.count * page_size_);
              run = {part.end(), run.count - part.count};
            }
          });
        };
        children_ = std::make_unique<ForkedCopies>(missing, !memory_.remote(),
                                                   [this](OwnerAddress) { return page_size_; });
      }
      children_->add(UniqueFd(static_cast<int>(event.arg.fork.ufd)));
      break;
    default:
      break;
  }
}

void SourcePager::serve(PageNumber page, std::vector<std::byte>& buffer) {
  if (ledger_.test(page)) {
    // Installed since, or dropped by the owner.
    const OwnerAddress at = memory_.owner_address(page);
    for (int tries = 0; tries < kTries; ++tries) {
      const PageResult result = memory_.uffd()->zeropage(at, page_size_, true);
      if (result.outcome == PageOutcome::kExists) memory_.uffd()->wake(at, page_size_);
      if (result.outcome != PageOutcome::kAgain && result.outcome != PageOutcome::kNoMemory) return;
      between_tries(tries);
      // What is in the way may be an event that this very thread has to read: the fault comes again.
      if (result.outcome == PageOutcome::kAgain) return memory_.uffd()->wake(at, page_size_);
    }
    return;
  }
  if (losses_.lost(page)) return;  // it is being poisoned, which wakes whoever waits
  std::uint64_t lacking = 1;
  while (lacking < SequentialDetector::kLargestWindow && page.value + lacking < pages_ &&
         !ledger_.test(PageNumber{page.value + lacking}) && !losses_.lost(PageNumber{page.value + lacking})) {
    ++lacking;
  }
  const auto advice = detector_.fault(0, page, lacking);
  cursor_.store(page.value, std::memory_order_relaxed);
  // The page first and alone: what follows it is only a guess.
  (void)bring({page, 1}, buffer);
  if (advice.pages > 1) (void)bring({PageNumber{page.value + 1}, advice.pages - 1}, buffer);
}

// False when it must be tried again: for the faults' thread, when there is an event to be read first.
bool SourcePager::bring(PageRun run, std::vector<std::byte>& buffer) {
  while (run.count > 0) {
    const PageRun part = memory_.contiguous_run(run);
    const std::span<std::byte> bytes =
        std::span(buffer).first(static_cast<std::size_t>(part.count * page_size_));
    try {
      config_.source->read(part, bytes);
    } catch (const std::exception& error) {
      // One page may be what is wrong.
      if (part.count > 1) {
        for (PageNumber page = part.first; page < part.end(); ++page.value) (void)bring({page, 1}, buffer);
      } else {
        (void)losses_.lose(part.first, error.what());
      }
      run = {part.end(), run.count - part.count};
      continue;
    }
    const Outcome outcome = install(part, bytes.data());
    if (outcome == Outcome::kAgain) {
      memory_.uffd()->wake(memory_.owner_address(part.first), part.count * page_size_);
      return false;
    }
    run = {part.end(), run.count - part.count};
  }
  return true;
}

SourcePager::Outcome SourcePager::install(PageRun run, const std::byte* bytes) {
  PieceSize pieces;
  while (run.count > 0) {
    std::uint64_t count = 1;
    std::uint64_t done = 0;
    PageOutcome outcome = PageOutcome::kOk;
    {
      const std::shared_lock sharing(layout_);
      if (ledger_.test(run.first)) {
        done = 1;  // by somebody else, or dropped
      } else {
        while (count < std::min(run.count, pieces.most()) &&
               !ledger_.test(PageNumber{run.first.value + count}))
          ++count;
        const PageResult result =
            memory_.uffd()->copy(memory_.owner_address(run.first), bytes, count * page_size_, true);
        outcome = result.outcome;
        done = result.bytes_done / page_size_;
        settle({run.first, done});
      }
    }
    if (outcome == PageOutcome::kExists) {
      const PageNumber there{run.first.value + done++};
      // It may have been lost, and poisoned, before it could be read after all.
      if (!brought(there) && !losses_.lost(there)) {
        memory_.owner()->end();  // it would read what is not its own
        throw SystemError("page " + std::to_string(there.value) +
                              " is populated, though nobody has brought it: its owner was ended",
                          EEXIST);
      }
      memory_.uffd()->wake(memory_.owner_address(there), page_size_);
    }
    run = {PageNumber{run.first.value + done}, run.count - done};
    bytes += done * page_size_;
    if (outcome == PageOutcome::kAgain || outcome == PageOutcome::kNoMemory) return Outcome::kAgain;
    if (outcome == PageOutcome::kGone) {
      if (pieces.refused(count - done)) continue;
      confirm_unmapped(*memory_.owner(), memory_.owner_address(run.first), page_size_, "page");
      settle({run.first, 1});
      memory_.uffd()->wake(memory_.owner_address(run.first), page_size_);
      bytes += page_size_;
      run = {PageNumber{run.first.value + 1}, run.count - 1};
    }
  }
  return Outcome::kHere;
}

// Of a page that is there: both threads may have been at it, and each notes what it has installed under the lock.
bool SourcePager::brought(PageNumber page) {
  const std::unique_lock whole(layout_);
  return ledger_.test(page);
}

void SourcePager::wake(PageRun run) {
  while (run.count > 0) {
    const PageRun part = memory_.contiguous_run(run);
    memory_.uffd()->wake(memory_.owner_address(part.first), part.count * page_size_);
    run = {part.end(), run.count - part.count};
  }
}

void SourcePager::settle(PageRun run) { settled_ += ledger_.set(run); }

void SourcePager::poison(PageRun run) {
  if (!poison_missing(run)) memory_.owner()->end();  // it may not read zeros
}

bool SourcePager::poison_missing(PageRun run) {
  Userfaultfd& uffd = *memory_.uffd();
  int tries = 0;
  PieceSize pieces;
  while (run.count > 0) {
    PageRun part = memory_.contiguous_run(run);
    part.count = std::min(part.count, pieces.most());
    PageResult result;
    bool supported = (uffd.features() & abi::kUffdFeaturePoison) != 0;
    try {
      if (supported) result = uffd.poison(memory_.owner_address(part.first), part.count * page_size_, true);
    } catch (const SystemError&) {
      supported = false;
    }
    if (!supported || tries > kTries) return false;
    std::uint64_t done = result.bytes_done / page_size_;
    if (result.outcome == PageOutcome::kExists) ++done;  // came after all
    if (result.outcome == PageOutcome::kOk) pieces.went_well();
    if (result.outcome == PageOutcome::kGone && !pieces.refused(part.count - done)) {
      try {
        confirm_unmapped(*memory_.owner(), memory_.owner_address(PageNumber{run.first.value + done}),
                         page_size_, "UFFDIO_POISON");
      } catch (const OwnerGone&) {
        return true;
      } catch (const SystemError&) {
        return false;
      }
      ++done;
    }
    if (result.outcome == PageOutcome::kAgain || result.outcome == PageOutcome::kNoMemory)
      between_tries(++tries);
    run = {PageNumber{run.first.value + done}, run.count - done};
  }
  return true;
}

void SourcePager::prepage(WorkerThread& self) {
  set_this_thread_nice(kPrepageNice);
  const std::uint64_t at_once = std::max<std::uint64_t>(1, kPrepageBytes / page_size_);
  std::vector<std::byte> buffer(at_once * page_size_);
  std::uint64_t seen = 0;
  PageNumber at{0};
  int tries = 0;
  while (!self.stopping()) {
    if (const auto due = losses_.due(); due && LossReports::Clock::now() >= *due) {
      losses_.poison([this](PageRun run) {
        poison(run);
        settle(run);
      });
    }
    if (settled_ >= pages_) return finish();
    if (!config_.prepage || failed_) {
      (void)self.wait(20);
      continue;
    }
    // Where somebody works comes first.
    const std::uint64_t cursor = cursor_.load(std::memory_order_relaxed);
    if (cursor != seen) at = PageNumber{seen = cursor};
    if (at.value >= pages_) at = PageNumber{0};
    const auto lacking = [this](PageNumber page) { return !ledger_.test(page) && !losses_.lost(page); };
    while (at.value < pages_ && !lacking(at)) ++at.value;
    if (at.value >= pages_) {
      (void)self.wait(1);
      continue;
    }
    PageRun run{at, 1};
    while (run.count < at_once && run.end().value < pages_ && lacking(run.end())) ++run.count;
    try {
      if (bring(run, buffer)) {
        at = run.end();
        tries = 0;
      } else if (++tries > kTries) {
        tell(EventKind::kFailed, "SYSTEM", "pages cannot be installed");
      } else {
        between_tries(tries);
      }
    } catch (const std::exception& error) {
      tell(EventKind::kFailed, "SYSTEM", error.what());
    }
  }
}

// On the prepaging thread. What is missing from here on was dropped by the owner, and is zeros.
void SourcePager::finish() {
  try {
    for (const Extent& extent : memory_.extents())
      (void)memory_.uffd()->unregister(extent.start, extent.bytes);
    tell(EventKind::kDone, "", "");
  } catch (const std::exception& error) {
    tell(EventKind::kFailed, "SYSTEM", error.what());
  }
}

}  // namespace memferry
