// The faults that somebody waits for, and what was done about each. The kernel delivers a fault once, so
// what could not be sent (the connection is cut) must be kept until it can.
//
// Its size is bounded by the threads (and kernel-side accesses) that can wait at once, since a waiting thread
// raises no second fault and faults on the same page share an entry; so a flat array serves.
//
// Threads: none of its own; the caller serialises.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "page/range.h"

namespace memferry {

struct WaitingFault {
  enum class State {
    kDeferred,   // cannot be sent now
    kExpected,   // asked for, or inside a window that was: sent (again) only if it has not come by `due`
    kRequested,  // sent
    kArriving,   // another thread is installing this page
  };
  std::uint32_t region = 0;
  PageNumber page;
  std::uint64_t window = 1;
  State state = State::kDeferred;
  bool remote = false;                         // was asked for over the demand channel at least once
  std::chrono::steady_clock::time_point seen;  // when the event was read
  std::chrono::steady_clock::time_point due;
  std::chrono::steady_clock::time_point asked{};  // where at_source: when that began
  bool at_source = false;                         // was sent to the source, and not elsewhere since
  bool tried = false;    // was sent elsewhere although the source is there, which is not done twice
  bool put_off = false;  // the same, and given more time
  bool probe = false;    // nobody waits for it yet: it is asked for to see whether the source is there
  // Asked for again and again, each time after twice as long, because one answer may not bring all of it; 0: once.
  std::chrono::milliseconds again{0};
};

class WaitingFaults {
 public:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] bool contains(std::uint32_t region, PageNumber page) const {
    for (const WaitingFault& fault : faults_) {
      if (fault.region == region && fault.page == page) return true;
    }
    return false;
  }
  void add(const WaitingFault& fault) { faults_.push_back(fault); }
  // Somebody waits for the page from now on, where it was asked for as a probe.
  void wanted(std::uint32_t region, PageNumber page, Clock::time_point now) {
    for (WaitingFault& fault : faults_) {
      if (fault.region != region || fault.page != page || !fault.probe) continue;
      fault.probe = false;
      fault.seen = now;
      fault.asked = now;  // its answer has its whole time from here on
      fault.remote = fault.state != WaitingFault::State::kDeferred;
    }
  }

  // Takes out the faults on pages of `run`, calling taken(fault) for each.
  template <typename Taken>
  void take(std::uint32_t region, PageRun run, Taken taken) {
    for (std::size_t i = 0; i < faults_.size();) {
      WaitingFault& fault = faults_[i];
      if (fault.region == region && fault.page >= run.first && fault.page < run.end()) {
        taken(fault);
        fault = faults_.back();
        faults_.pop_back();
      } else {
        ++i;
      }
    }
  }

  // The connection is gone: everything that had been sent must be sent again.
  void defer_all() {
    for (WaitingFault& fault : faults_) defer(fault);
  }
  // Only what was sent to somebody else than the source.
  void defer_routed() {
    for (WaitingFault& fault : faults_) {
      if (!fault.at_source) defer(fault);
    }
  }
  void defer(std::uint32_t region, PageNumber page) {
    for (WaitingFault& fault : faults_) {
      if (fault.region == region && fault.page == page) defer(fault);
    }
  }
  void set_at_source(std::uint32_t region, PageNumber page, bool at_source) {
    for (WaitingFault& fault : faults_) {
      if (fault.region != region || fault.page != page) continue;
      if (at_source && !fault.at_source) fault.asked = Clock::now();
      fault.at_source = at_source;
    }
  }
  // Was sent elsewhere while the source is there too, which is asked only when it has not come by `due`.
  void try_until(std::uint32_t region, PageNumber page, Clock::time_point due) {
    for (WaitingFault& fault : faults_) {
      if (fault.region == region && fault.page == page) fault.tried = true;
    }
    expect(region, page, due);
  }
  // This process did not run when they were due: their answers may lie here unread. Once for each.
  void put_off_tried(Clock::time_point now, Clock::time_point due) {
    for (WaitingFault& fault : faults_) {
      if (!fault.tried || fault.put_off || fault.state != WaitingFault::State::kExpected || fault.due > now)
        continue;
      fault.put_off = true;
      fault.due = due;
    }
  }
  // It is on its way already: asked for by itself, and alone, only when it has not come by `due`.
  void expect(std::uint32_t region, PageNumber page, Clock::time_point due) {
    for (WaitingFault& fault : faults_) {
      if (fault.region != region || fault.page != page || fault.state == WaitingFault::State::kArriving)
        continue;
      fault.state = WaitingFault::State::kExpected;
      fault.window = 1;
      fault.due = due;
    }
  }
  [[nodiscard]] bool any_deferred() const {
    for (const WaitingFault& fault : faults_) {
      if (fault.state == WaitingFault::State::kDeferred) return true;
    }
    return false;
  }

  static constexpr std::chrono::milliseconds kLongestAgain{1000};

  // Marks as requested what must be sent now, calling due(fault, overdue) for each: it was expected, and has not come.
  template <typename Due>
  void request_due(Clock::time_point now, Due due) {
    for (WaitingFault& fault : faults_) {
      const bool overdue = fault.state == WaitingFault::State::kExpected && fault.due <= now;
      if (fault.state != WaitingFault::State::kDeferred && !overdue) continue;
      fault.state = WaitingFault::State::kRequested;
      fault.remote = !fault.probe;
      if (fault.again.count() > 0) {
        fault.state = WaitingFault::State::kExpected;
        fault.due = now + fault.again;
        fault.again = std::min(2 * fault.again, kLongestAgain);
      }
      due(fault, overdue);
    }
  }

  // When the first of those that are expected is due; nothing when none is.
  [[nodiscard]] std::optional<Clock::time_point> next_due() const {
    std::optional<Clock::time_point> first;
    for (const WaitingFault& fault : faults_) {
      if (fault.state == WaitingFault::State::kExpected && (!first || fault.due < *first)) first = fault.due;
    }
    return first;
  }
  // When the source was asked for what somebody waits for, the first of it; or for a probe. `now` when it owes no answer.
  [[nodiscard]] Clock::time_point oldest_at_source(Clock::time_point now, bool probe) const {
    for (const WaitingFault& fault : faults_) {
      if (fault.at_source && fault.probe == probe && fault.asked < now) now = fault.asked;
    }
    return now;
  }
  [[nodiscard]] std::size_t size() const { return faults_.size(); }

 private:
  static void defer(WaitingFault& fault) {
    if (fault.state == WaitingFault::State::kArriving) return;
    fault.state = WaitingFault::State::kDeferred;
    fault.at_source = false;
  }
  std::vector<WaitingFault> faults_;
};

}  // namespace memferry
