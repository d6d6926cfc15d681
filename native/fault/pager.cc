#include "fault/pager.h"

#include <poll.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <thread>

#include "os/sys_error.h"

namespace memferry {
namespace {

constexpr std::size_t kEventsAtOnce = 32;
constexpr int kFaultThreadNice = -20;
constexpr int kAfterErrorMs = 100;
// The layout is changing or memory is short: about two seconds of trying, first without sleeping.
constexpr int kSpinningTries = 64;
constexpr int kTries = 4096;
constexpr std::chrono::microseconds kBetweenTries{500};
constexpr std::uint64_t kUnderLayout = 64;
constexpr std::size_t kMostElsewhere = 1024;  // what is left out is asked for again by and by

// Of the pages right before `page`, as many as have come: what a walk may skip of what was brought ahead of it.
std::uint64_t here_before(const ArrivalMap& map, PageNumber page) {
  constexpr std::uint64_t kMost = 1024;
  std::uint64_t count = 0;
  for (std::uint64_t at = page.value; count < kMost && at > 0;) {
    if (at % 64 == 0 && map.received.word(at / 64 - 1) == ~std::uint64_t{0}) {
      count += 64;
      at -= 64;
    } else if (map.received.test(PageNumber{at - 1})) {
      ++count;
      --at;
    } else {
      break;
    }
  }
  return count;
}

// So late after it was to wake the thread has not been let run: what it waits for may have come long ago.
constexpr std::chrono::milliseconds kOverslept{5};

std::uint64_t wanted_features(bool huge) {
  // Without it a mapping that fails is put over pages that are lost.
  const Userfaultfd::Offer offer = Userfaultfd::probe();
  return (offer.features & abi::kUffdFeaturePoison) |
         (huge ? UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS : 0);
}

}  // namespace

Pager::Pager(std::vector<ArrivalMap*> maps, std::function<void(std::string, std::string)> broken)
    : maps_(std::move(maps)), broken_(std::move(broken)), attached_(maps_.size()), children_(maps_.size()) {
  bool huge = false;
  for (ArrivalMap* const map : maps_) {
    huge_.push_back(HugeMemory::of(*map));
    huge = huge || huge_.back();
  }
  const auto ours = [](const ArrivalMap* map) { return !map->region().owner(); };
  // Not one for faults of user code alone: system calls on a missing page would fail with EFAULT.
  if (std::any_of(maps_.begin(), maps_.end(), ours)) own_ = Userfaultfd::open(wanted_features(huge), false);
  if (own_ && (own_->features() & abi::kUffdFeaturePoison) == 0) failing_.emplace();
  take_attached();
  thread_.start("mf-faults", [this](WorkerThread& self) { run(self); });
}

Pager::~Pager() { stop(); }

Userfaultfd& Pager::uffd_of(std::uint32_t region) {
  Region& memory = maps_[region]->region();
  return memory.owner() ? *memory.uffd() : *own_;
}

void Pager::set_router(Router router) {
  // The thread runs already: what it does for a fault starts with this mutex.
  const std::lock_guard lock(mutex_);
  router_ = std::move(router);
}

void Pager::serve() {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    if (!maps_[region]->region().owner()) register_memory(region);
    if (huge_[region]) huge_[region]->open();
  }
  serve_attached();
}

void Pager::register_memory(std::uint32_t region) {
  const ArrivalMap& map = *maps_[region];
  const RegisterMode mode = huge_[region] ? huge_[region]->mode() : RegisterMode::kMissing;
  map.for_each_run({PageNumber{0}, map.pages()}, [&](PageRun part) {
    uffd_of(region).register_range(map.region().owner_address(part.first), part.count * map.page_size(),
                                   mode);
  });
}

void Pager::set_online(bool online) {
  {
    const std::lock_guard lock(mutex_);
    online_ = online;
    waiting_.defer_all();
  }
  if (online || router_) thread_.wake();
}

void Pager::ask_again(bool routed) {
  {
    const std::lock_guard lock(mutex_);
    ++asked_again_;
    if (routed) {
      ++rerouted_;
      waiting_.defer_routed();
    }
    if (!waiting_.any_deferred()) return;
  }
  thread_.wake();
}

void Pager::ask_elsewhere(std::uint32_t region, PageNumber page) {
  {
    const std::lock_guard lock(mutex_);
    const PageRun unit = fails_with(region, page);
    if (!huge_[region]) {
      waiting_.defer(region, page);
    } else if (waiting_.contains(region, unit.first) && elsewhere_.size() < kMostElsewhere) {
      // Not all of the huge page again: the rest is on its way.
      elsewhere_.push_back({region, {page, std::min(unit.end().value - page.value, kMostAtOnce)}});
    }
  }
  thread_.wake();
}

void Pager::probe(std::uint32_t region, PageNumber page) {
  const PageRun unit = fails_with(region, page);
  {
    // Whoever installs it marks it received first, and then looks under this lock who waits.
    const std::lock_guard lock(mutex_);
    const ArrivalMap& map = *maps_[region];
    if (poisoning_ || waiting_.contains(region, unit.first) || map.received.count(unit) == unit.count) return;
    WaitingFault fault;
    fault.region = region;
    fault.page = unit.first;
    fault.window = unit.count;
    fault.seen = Clock::now();
    fault.probe = true;
    if (huge_[region]) fault.again = again_of_huge();
    waiting_.add(fault);
  }
  thread_.wake();
}

void Pager::run(WorkerThread& self) {
  set_this_thread_nice(kFaultThreadNice);
  std::vector<Request> requests;
  std::vector<pollfd> waiting{pollfd{self.wake_fd(), POLLIN, 0}};
  std::vector<std::uint32_t> from{
      0};  // a region of each descriptor; one beyond the last for this process's own
  if (own_) {
    waiting.push_back({own_->fd(), POLLIN, 0});
    from.push_back(static_cast<std::uint32_t>(maps_.size()));
  }
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    if (!attached_[region].events) continue;
    waiting.push_back({uffd_of(region).fd(), POLLIN, 0});
    from.push_back(region);
  }
  std::optional<Clock::time_point> due;
  while (!self.stopping()) {
    const auto left = due ? std::max<Clock::duration>(*due - Clock::now(), Clock::duration::zero())
                          : Clock::duration::zero();
    const auto seconds = std::chrono::floor<std::chrono::seconds>(left);
    const timespec soon{seconds.count(), std::chrono::nanoseconds(left - seconds).count()};
    ::ppoll(waiting.data(), waiting.size(), due ? &soon : nullptr, nullptr);
    if ((waiting[0].revents & POLLIN) != 0) self.drain_wake();
    requests.clear();
    try {
      for (std::size_t i = 1; i < waiting.size(); ++i) {
        if ((waiting[i].revents & POLLIN) != 0) read_faults(from[i], requests);
      }
      const Clock::time_point now = Clock::now();
      const std::lock_guard lock(mutex_);
      if (due && now > *due + kOverslept) waiting_.put_off_tried(now, now + kOverslept);
      if (online_ || router_) {
        waiting_.request_due(now, [&](const WaitingFault& fault, bool overdue) {
          requests.push_back({.region = fault.region,
                              .run = {fault.page, fault.window},
                              .tried = fault.tried,
                              .late = fault.tried && overdue,
                              .huge = huge_[fault.region] != nullptr});
          if (!router_) waiting_.set_at_source(fault.region, fault.page, true);
        });
        requests.insert(requests.end(), elsewhere_.begin(), elsewhere_.end());
        elsewhere_.clear();
      }
      due = online_ || router_ ? waiting_.next_due() : std::nullopt;
    } catch (const std::exception& error) {
      break_off("SYSTEM", error.what());
      self.wait(kAfterErrorMs);  // until stop(): the owner has been told
    }
    // It is not among what was waiting when that was asked.
    if (const auto sent = send(requests)) due = due ? std::min(*due, *sent) : sent;
  }
}

void Pager::read_faults(std::uint32_t from, std::vector<Request>& requests) {
  std::array<uffd_msg, kEventsAtOnce> events;
  std::size_t count = 0;
  const bool others = from < maps_.size();
  Userfaultfd& uffd = others ? uffd_of(from) : *own_;
  {
    std::unique_lock<std::shared_mutex> whole;
    if (others && attached_[from].removed) {
      reader_waits_.store(true);
      whole = std::unique_lock(layout_);
      reader_waits_.store(false);
    }
    count = uffd.read_events(events);
    for (std::size_t i = 0; others && i < count; ++i) {
      // One that fails keeps nobody from the others, which are read for good.
      try {
        on_event(events[i], from);
      } catch (const std::exception& error) {
        break_off("SYSTEM", error.what());
      }
    }
  }
  // Before serve() others wait: it wakes them, and their faults come again.
  if (others && !serving()) return;
  const Clock::time_point now = Clock::now();
  for (std::size_t i = 0; i < count; ++i) {
    if (events[i].event != UFFD_EVENT_PAGEFAULT) continue;
    const auto place = place_of(from, OwnerAddress{events[i].arg.pagefault.address});
    if (place) on_fault(place->first, place->second, now, requests);
  }
}

// In the memory of the same process only: others may use the same addresses.
std::optional<std::pair<std::uint32_t, PageNumber>> Pager::place_of(std::uint32_t from,
                                                                    OwnerAddress at) const {
  const auto pid_of = [&](std::uint32_t region) {
    return region < maps_.size() && maps_[region]->region().owner() ? maps_[region]->region().owner()->pid()
                                                                    : 0;
  };
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    if (pid_of(region) != pid_of(from)) continue;
    const auto page = maps_[region]->region().page_at(at);
    if (page && page->value < maps_[region]->pages()) return std::pair(region, *page);
  }
  return std::nullopt;  // let go of since
}

bool Pager::lately(const std::atomic<Clock::rep>& last) {
  const Clock::rep at = last.load(std::memory_order_relaxed);
  return at != 0 && Clock::now().time_since_epoch() - Clock::duration(at) < kLately;
}

bool Pager::faulted_lately() const { return lately(last_request_); }

bool Pager::strayed_lately() const { return lately(last_stray_); }

// With the mutex held. The first faults of a walk look like strays, until it is sure of itself.
void Pager::note_kind(const SequentialDetector::Advice& advice, Clock::time_point now) {
  if (advice.sure) {
    strays_ = {strays_.back()};
  } else if (!advice.walks && !advice.expected) {
    std::shift_right(strays_.begin(), strays_.end(), 1);
    strays_.front() = now.time_since_epoch().count();
  } else {
    return;
  }
  last_stray_.store(strays_.front(), std::memory_order_relaxed);
}

std::optional<Pager::Clock::time_point> Pager::send(const std::vector<Request>& requests) {
  std::optional<Clock::time_point> first_due;
  const auto due_within = [&first_due](Clock::duration time) {
    const Clock::time_point due = Clock::now() + time;
    first_due = first_due ? std::min(*first_due, due) : due;
    return due;
  };
  if (!requests.empty()) {
    last_request_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  }
  for (const Request& request : requests) {
    if (request.huge) {
      send_huge(request);
      continue;
    }
    if (router_) {
      bool online = false;
      std::uint64_t asked = 0;
      std::uint64_t rerouted = 0;
      {
        const std::lock_guard lock(mutex_);
        online = online_;
        asked = asked_again_;
        rerouted = rerouted_;
        // Before it can be answered, and taken back where it turns out otherwise.
        if (online) waiting_.set_at_source(request.region, request.run.first, true);
      }
      const Route route = router_({.region = request.region,
                                   .run = request.run,
                                   .source_online = online,
                                   .walk = request.walk,
                                   .tried = request.tried,
                                   .late = request.late});
      if (route == Route::kComing) {
        const std::lock_guard lock(mutex_);
        waiting_.set_at_source(request.region, request.run.first, false);
        waiting_.expect(request.region, request.run.first, due_within(kExpectedWithin));
        continue;
      }
      if (route != Route::kSource) {
        const std::lock_guard lock(mutex_);
        waiting_.set_at_source(request.region, request.run.first, false);
        if (route == Route::kNobody) waiting_.defer(request.region, request.run.first);
        if (route == Route::kTried) {
          waiting_.try_until(request.region, request.run.first, due_within(kTriedWithin));
        }
        // What has changed while the router was asked may be what this request needs.
        if (route == Route::kNobody ? asked != asked_again_ : rerouted != rerouted_) {
          waiting_.defer(request.region, request.run.first);
          thread_.wake();
        }
        continue;
      }
    }
    wire::FrameHeader header = wire::make_header(wire::FrameType::kFaultRequest, request.region, request.run);
    wire::seal(header);
    // What a cut swallows is asked for again by set_online().
    if (!writer_.send(header)) break;
  }
  return first_due;
}

// The event may be late: since it was raised the page may have been installed (its waiter is awake already),
// or installed and then discarded by the guest (its waiter needs zeros).
void Pager::on_fault(std::uint32_t region, PageNumber page, Clock::time_point now,
                     std::vector<Request>& requests) {
  if (huge_[region]) return on_huge_fault(region, page, now, requests);
  // It came before the switch, and waits here.
  if (attached_[region].room && attached_[region].room->clear(page)) {
    if (deliver_run(region, {page, 1}, Patience::kOwnThread) == Copied::kAgain) {
      attached_[region].room->set(page);
      raise_again(region, page);
    }
    return;
  }
  const ArrivalMap& map = *maps_[region];
  bool zeros = false;
  bool poisoned = false;
  {
    const std::lock_guard lock(mutex_);
    const bool received = map.received.test(page);
    if (map.lost.test(page)) {
      // Reported first, poisoned then: until that poison() wakes whoever waits.
      poisoned = map.poisoned.test(page) || poisoning_;
      if (!poisoned && !waiting_.contains(region, page)) {
        waiting_.add({.region = region,
                      .page = page,
                      .state = WaitingFault::State::kArriving,
                      .seen = now,
                      .due = {},
                      .asked = {}});
      }
    } else if (received && (map.present.test(page) || map.zero.test(page))) {
      zeros = true;
    } else if (poisoning_ && !received) {
      poisoned = true;
    } else if (!waiting_.contains(region, page)) {
      WaitingFault fault;
      fault.region = region;
      fault.page = page;
      fault.seen = now;
      if (received) {
        // Being installed: UFFDIO_COPY will wake the waiter, or install_zeros() will find this entry.
        fault.state = WaitingFault::State::kArriving;
      } else {
        const auto lacking =
            map.received.next_clear(page, PageNumber{map.pages()}, SequentialDetector::kLargestWindow);
        const bool here = lacking && lacking->first == page;
        const SequentialDetector::Advice advice =
            detector_.fault(region, page, here ? lacking->count : 1, here_before(map, page));
        note_kind(advice, now);
        fault.window = advice.pages;
        if (advice.expected) {
          fault.state = WaitingFault::State::kExpected;
          fault.due = now + kExpectedWithin;
        } else if (online_ || router_) {
          fault.state = WaitingFault::State::kRequested;
          fault.remote = true;
          fault.at_source = !router_;
          fault.asked = now;
          requests.push_back({.region = region, .run = {page, fault.window}, .walk = advice.walks});
        }
      }
      waiting_.add(fault);
    } else {
      waiting_.wanted(region, page, now);
    }
  }
  if (zeros) serve_zero(region, page, Patience::kOwnThread);
  if (poisoned) poison(region, {page, 1}, Patience::kOwnThread);
}

// For the pager's own thread, when an event that it has not read yet is in the way: whoever waits faults again, behind it.
void Pager::raise_again(std::uint32_t region, PageNumber page) {
  const PageRun run = fails_with(region, page);
  uffd_of(region).wake(maps_[region]->region().owner_address(run.first),
                       run.count * maps_[region]->page_size());
}

// Gives zeros to a page that is absent, and wakes its waiters either way.
void Pager::serve_zero(std::uint32_t region, PageNumber page, Patience patience) {
  ArrivalMap& map = *maps_[region];
  const OwnerAddress address = map.region().owner_address(page);
  Userfaultfd& uffd = uffd_of(region);
  for (int tries = 0;;) {
    const PageResult result = uffd.zeropage(address, map.page_size(), true);
    switch (result.outcome) {
      case PageOutcome::kOk:
        map.present.set(page);
        return;
      case PageOutcome::kExists:
        uffd.wake(address, map.page_size());
        return;
      case PageOutcome::kGone:
        return;  // completed or unmapped since; unregister() wakes the waiters
      default:
        if (result.outcome == PageOutcome::kAgain && patience == Patience::kOwnThread)
          return raise_again(region, page);
        if (!wait_again(tries)) {
          break_off("SYSTEM", "no zero page can be installed");
          return;
        }
    }
  }
}

Pager::Installed Pager::install(std::uint32_t region, PageRun run, const std::byte* bytes) {
  if (huge_[region]) return install_huge(region, run, bytes);
  ArrivalMap& map = *maps_[region];
  Installed result;
  std::uint64_t page = run.first.value;
  const std::uint64_t end = run.end().value;
  while (page < end && result.intact) {
    if (map.received.set(PageNumber{page})) {
      ++page;
      continue;
    }
    const std::uint64_t first = page++;
    while (page < end && !map.received.set(PageNumber{page})) ++page;
    const PageRun claimed{PageNumber{first}, page - first};
    result.intact = copy_claimed(region, claimed, bytes + (first - run.first.value) * map.page_size());
    if (result.intact) result.pages += claimed.count;
    ++page;  // claimed by somebody else, or the end
  }
  return result;
}

Pager::Copied Pager::copy_with(std::uint32_t region, PageRun run, const std::byte* bytes, Patience patience) {
  ArrivalMap& map = *maps_[region];
  int tries = 0;
  // Under a lock that whoever reads the events waits for.
  const std::uint64_t usual = attached_[region].removed ? kUnderLayout : run.count;
  std::uint64_t most = usual;
  while (run.count > 0) {
    PageRun part = map.region().contiguous_run(run);
    part.count = std::min(part.count, most);
    PageResult result;
    try {
      result = attached_[region].removed ? copy_present(region, part, bytes)
                                         : uffd_of(region).copy(map.region().owner_address(part.first), bytes,
                                                                part.count * map.page_size(), true);
    } catch (const SystemError& error) {
      map.received.clear_run(run);
      break_off("SYSTEM", error.what());
      return Copied::kFailed;
    }
    const std::uint64_t done = result.bytes_done / map.page_size();
    if (done > 0) {
      const PageRun installed{run.first, done};
      map.present.set_run(installed);
      arrived(region, installed);
      run = {PageNumber{run.first.value + done}, run.count - done};
      bytes += result.bytes_done;
      tries = 0;
      most = usual;
    }
    if (result.outcome == PageOutcome::kAgain && patience == Patience::kOwnThread && done == 0)
      return Copied::kAgain;
    if (result.outcome == PageOutcome::kGone && run.count > 1) {
      // Over the border of two mappings the kernel does nothing at all.
      Mapped mapped;
      try {
        mapped = mapped_alike(region, run);
      } catch (const SystemError&) {
        // Its owner is gone, most likely: told below.
      }
      if (mapped.there && mapped.count < std::min(run.count, part.count - done) && wait_again(tries)) {
        most = mapped.count;
        continue;
      }
    }
    const bool again = result.outcome == PageOutcome::kAgain || result.outcome == PageOutcome::kNoMemory;
    if (result.outcome == PageOutcome::kOk || (again && wait_again(tries))) continue;
    // Missing again, so that it is poisoned and not read.
    map.received.clear_run(run);
    if (result.outcome == PageOutcome::kExists) {
      // Nobody else installs a page that we have claimed: somebody wrote where only the pager may.
      break_off("SYSTEM", "page " + std::to_string(run.first.value) + " of region " + std::to_string(region) +
                              " is populated, though it never arrived");
    } else if (result.outcome == PageOutcome::kGone) {
      break_off_gone(region);
    } else {
      break_off("SYSTEM", result.outcome == PageOutcome::kNoMemory ? "no memory for a page"
                                                                   : "a page cannot be installed");
    }
    return Copied::kFailed;
  }
  return Copied::kAll;
}

// Zeros are installed only where somebody waits: untouched memory costs nothing.
Pager::Installed Pager::install_zeros(std::uint32_t region, PageRun run) {
  if (huge_[region]) return install_huge(region, run, nullptr);
  ArrivalMap& map = *maps_[region];
  Installed result;
  std::vector<PageNumber> waited_for;
  const PageNumber end = run.end();
  std::uint64_t page = run.first.value;
  while (page < end.value) {
    if (map.received.set(PageNumber{page})) {
      ++page;
      continue;
    }
    const std::uint64_t first = page++;
    while (page < end.value && !map.received.set(PageNumber{page})) ++page;
    const PageRun claimed{PageNumber{first}, page - first};
    map.zero.set_run(claimed);
    result.pages += claimed.count;
    // Under the same lock on_fault() looks at the bits: either it sees zeros, or we see its entry.
    const Clock::time_point now = Clock::now();
    const std::lock_guard lock(mutex_);
    waiting_.take(region, claimed, [&](const WaitingFault& fault) {
      if (fault.remote) latencies_.record(now - fault.seen);
      if (!fault.probe) waited_for.push_back(fault.page);
    });
    ++page;
  }
  for (const PageNumber waited : waited_for) serve_zero(region, waited, Patience::kWaits);
  return result;
}

void Pager::arrived(std::uint32_t region, PageRun run) {
  const Clock::time_point now = Clock::now();
  std::vector<PageNumber> again;
  {
    const std::lock_guard lock(mutex_);
    waiting_.take(region, run, [&](const WaitingFault& fault) {
      if (fault.remote) latencies_.record(now - fault.seen);
      if (attached_[region].removed) again.push_back(fault.page);
    });
  }
  // The page may have been discarded since it was installed, and a fault that came of that before it was marked present
  // counts as waiting for this install: it comes again.
  for (const PageNumber page : again) raise_again(region, page);
}

void Pager::finish() {
  deliver_all();
  // Letting go of what is still missing would make zeros of it.
  if (broken_once_.load()) throw SystemError("a page could not be installed", EIO);
  letting_go_.store(true);
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    const ArrivalMap& map = *maps_[region];
    map.for_each_run({PageNumber{0}, map.pages()}, [&](PageRun part) {
      uffd_of(region).unregister(map.region().owner_address(part.first), part.count * map.page_size());
    });
  }
  stop();
}

void Pager::stop() {
  deliverer_.stop();
  thread_.stop();
  bool poisoned = false;
  {
    const std::lock_guard lock(mutex_);
    poisoned = poisoning_;
  }
  if (serving() && poisoned) give_up_rooms();
  if (!serving() || poisoned) {
    // Nothing was ever served: there is no guest here, and whoever waits in its memory need not. Or what is missing
    // fails by now: the rest (zeros that nobody has read, what the owner has dropped) is ordinary memory, and would be
    // waited for in vain, since the owner keeps its userfaultfd.
    for (std::uint32_t region = 0; region < maps_.size(); ++region) {
      if (!attached_[region].events) continue;
      for (const Extent& extent : maps_[region]->region().extents()) {
        try {
          (void)uffd_of(region).unregister(extent.start, extent.bytes);
        } catch (const SystemError&) {
          // Moved or mapped anew since.
        }
      }
    }
  }
  serving_.store(false, std::memory_order_release);
  if (own_) own_->close();
  failing_.reset();  // what was put over lost pages stays; a stopped pager may be kept for long
  let_go_attached();
}

std::chrono::nanoseconds Pager::longest_wait() const {
  const Clock::time_point now = Clock::now();
  const std::lock_guard lock(mutex_);
  return now - waiting_.oldest_at_source(now, false);
}

std::chrono::nanoseconds Pager::longest_probe() const {
  const Clock::time_point now = Clock::now();
  const std::lock_guard lock(mutex_);
  return now - waiting_.oldest_at_source(now, true);
}

void Pager::break_off(const char* code, const std::string& message) {
  if (!broken_once_.exchange(true)) broken_(code, message);
}

bool Pager::wait_again(int& tries) const {
  if (++tries > kTries) return false;
  if (tries < kSpinningTries) {
    ::sched_yield();
  } else {
    std::this_thread::sleep_for(kBetweenTries);
  }
  return true;
}

}  // namespace memferry
