// Who is asked for a page that somebody waits for, when, and when again. (What is asked of huge pages: pager_huge.cc.)
#include <algorithm>
#include <optional>
#include <vector>

#include "fault/pager.h"

namespace memferry {
namespace {

constexpr std::size_t kMostElsewhere = 1024;  // what is left out is asked for again by and by

}  // namespace

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

}  // namespace memferry
