// The pager's own thread: it reads the faults, tells what each one needs, and has what waits asked for in its time.
#include <poll.h>

#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "fault/pager.h"

namespace memferry {
namespace {

constexpr std::size_t kEventsAtOnce = 32;
constexpr int kFaultThreadNice = -20;
constexpr int kAfterErrorMs = 100;

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

}  // namespace

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

}  // namespace memferry
