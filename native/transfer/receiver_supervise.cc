// The receiver's supervisor: whatever takes time or has a deadline, and every event, in order.
#include <algorithm>
#include <exception>
#include <mutex>
#include <string>
#include <utility>

#include "transfer/receiver_impl.h"

namespace memferry {

// And what fails to be read with them. `runs` are in order.
std::vector<RegionRun> Receiver::Impl::with_huge_pages(const std::vector<RegionRun>& runs) const {
  std::vector<RegionRun> all;
  for (const RegionRun& each : runs) {
    const PageNumber first = pager->fails_with(each.region, each.run.first).first;
    const PageNumber last{each.run.end().value - 1};
    const PageNumber end = pager->fails_with(each.region, last).end();
    if (!all.empty() && all.back().region == each.region && first <= all.back().run.end()) {
      PageRun& former = all.back().run;
      former.count = std::max(former.end(), end).value - former.first.value;
    } else {
      all.push_back({each.region, {first, end.value - first.value}});
    }
  }
  return all;
}

void Receiver::Impl::supervise() {
  std::unique_lock lock(mutex);
  for (;;) {
    if (!events.empty()) {
      const EngineEvent event = std::move(events.front());
      events.pop_front();
      lock.unlock();
      if (config.on_event) config.on_event(event);
      lock.lock();
      continue;
    }
    if (closing) return;
    const Clock::time_point now = Clock::now();
    if (complete_due && state == State::kPaging) {
      if (pages_lost > 0) {
        rest_here_locked();
      } else {
        complete_locked(lock);
      }
      continue;
    }
    // With servers each page has its own end: look_after_gather_locked().
    if (state == State::kPaging && !gather && (lost_due || now >= recover_by)) {
      give_up_source_locked(now);
      continue;
    }
    if (now >= poison_at && !delivering) {
      poison_locked(lock);
      continue;
    }
    Clock::time_point until = delivering ? recover_by : std::min(recover_by, poison_at);
    if (gather && state == State::kPaging && switched) {
      if (now >= gather_look_at) {
        look_after_gather_locked(lock);
        // It looks at every missing page: of a large guest that is not to be this thread's whole work.
        const Clock::time_point looked = Clock::now();
        gather_look_at = looked + std::max<Clock::duration>(kGatherLook, kGatherRest * (looked - now));
        continue;
      }
      until = std::min(until, gather_look_at);
    }
    if (state == State::kPaging && switched && !paused && !epoch_cut && demand_attached) {
      until = std::min(until, look_after_source_locked(now));
      if (epoch_cut) continue;
    }
    if (until == Clock::time_point::max()) {
      changed.wait(lock);
    } else {
      changed.wait_until(lock, until);
    }
  }
}

// All that could be had is here; the rest is reported, and poisoned in its time.
void Receiver::Impl::rest_here_locked() {
  complete_due = false;
  state = State::kLost;
  recover_by = Clock::time_point::max();
  EngineEvent event{};
  event.kind = EngineEventKind::kRestHere;
  push(std::move(event));
}

void Receiver::Impl::complete_locked(std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  std::string problem;
  try {
    pager->finish();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  lock.lock();
  if (!problem.empty()) {
    fail_locked("SYSTEM", problem);
    return;
  }
  state = State::kComplete;
  paused = false;
  recover_by = Clock::time_point::max();
  EngineEvent event{};
  event.kind = EngineEventKind::kComplete;
  push(std::move(event));
}

void Receiver::Impl::give_up_source_locked(Clock::time_point now) {
  if (lost_code.empty()) {
    lost_code = "RECOVERY_TIMEOUT";
    lost_message = "the source did not come back in time";
  }
  state = State::kLost;
  recover_by = Clock::time_point::max();
  poison_at = now + config.loss_grace;
  shut_down_all_locked();
  EngineEvent event{};
  event.kind = EngineEventKind::kLost;
  event.code = lost_code;
  event.message = lost_message;
  // Channels may still be installing what they have received: those pages are reported, and then not
  // poisoned, which errs on the safe side.
  event.lost = with_huge_pages(missing_runs(kMostLostRuns));
  push(std::move(event));
}

void Receiver::Impl::poison_locked(std::unique_lock<std::mutex>& lock) {
  poison_at = Clock::time_point::max();
  const bool all = state == State::kFailed || (state == State::kLost && pages_lost == 0);
  lock.unlock();
  if (all) {
    pager->poison_missing();
  } else {
    pager->poison_lost();
  }
  lock.lock();
}

}  // namespace memferry
