#include "control/park_commit.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <utility>

namespace memferry::control {

namespace {

using Event = SourceEvent::Type;

constexpr std::chrono::milliseconds kRetry{500};
// Between two looks at whether the park was cancelled.
constexpr std::chrono::milliseconds kLook{50};
constexpr std::chrono::milliseconds kLeastDial{50};
constexpr std::array<SourceTimer, 4> kTimers = {SourceTimer::kPause, SourceTimer::kReady, SourceTimer::kRetry,
                                                SourceTimer::kDoubt};

}  // namespace

ParkCommit::ParkCommit(StagedImage& image, Timeouts timeouts, std::function<bool()> cancelled)
    : image_(image), timeouts_(timeouts), cancelled_(std::move(cancelled)) {}

ParkCommit::Settlement ParkCommit::run() { return settle({Event::kSwitch, Event::kTransferred}); }

ParkCommit::Settlement ParkCommit::ask_again() { return settle({Event::kAskAgain}); }

ParkCommit::Settlement ParkCommit::settle(std::initializer_list<SourceEvent::Type> first) {
  settled_.reset();
  try {
    for (const SourceEvent::Type type : first) dispatch(SourceEvent::of(type));
    return until_settled();
  } catch (const std::exception& error) {
    events_.clear();
    dispatching_ = false;
    timers_ = {};
    if (!state_.committed()) throw;
    // No memory, no thread: GRANT may have left, so that is no failure. What was known by then stays known.
    if (state_.phase == SourcePhase::kLost) return {SourceOutcome::kLost, {"GUEST_LOST", error.what()}};
    if (state_.phase == SourcePhase::kDeparted) return {SourceOutcome::kDeparted, {}};
    if (state_.phase == SourcePhase::kGranted) state_.phase = SourcePhase::kInDoubt;
    return {SourceOutcome::kInDoubt, {"MIGRATION_IN_DOUBT", error.what()}};
  }
}

ParkCommit::Settlement ParkCommit::until_settled() {
  while (!settled_) {
    if (!state_.committed() && cancelled_()) {
      dispatch(SourceEvent::failed({"CANCELLED", "the park was cancelled"}));
      continue;
    }
    const Clock::time_point now = Clock::now();
    Clock::time_point until = now + kLook;
    for (const SourceTimer each : kTimers) {
      if (!timer(each)) continue;
      if (*timer(each) <= now) {
        timer(each).reset();
        dispatch(SourceEvent::over(each));
      } else {
        until = std::min(until, *timer(each));
      }
    }
    if (!settled_) listen(until);
  }
  return *settled_;
}

void ParkCommit::listen(Clock::time_point until) {
  if (!image_.has_home()) return std::this_thread::sleep_until(until);
  try {
    if (auto answer = image_.hear_home(until)) dispatch(SourceEvent::heard(std::move(*answer)));
  } catch (const std::exception&) {
    image_.forget_home();
    dispatch(SourceEvent::of(Event::kConnectionLost));
  }
}

// What an action leads to comes after all the actions before it.
void ParkCommit::dispatch(SourceEvent event) {
  events_.push_back(std::move(event));
  if (std::exchange(dispatching_, true)) return;
  while (!events_.empty()) {
    const SourceEvent next = std::move(events_.front());
    events_.pop_front();
    SourceStep step = step_source(state_, next);
    state_ = std::move(step.state);
    for (const SourceAction& action : step.actions) carry_out(action);
  }
  dispatching_ = false;
}

void ParkCommit::carry_out(const SourceAction& action) {
  switch (action.type) {
    case SourceAction::Type::kPause:
      return dispatch(SourceEvent::of(Event::kPaused));
    case SourceAction::Type::kAbortPause:
    case SourceAction::Type::kRunHere:  // the caller's, once it is told
      return;
    case SourceAction::Type::kSend:
      // One that cannot leave is a lost connection, which is heard of where it is listened to; GRANT has its timers.
      (void)image_.tell_home(to_json(action.question));
      return;
    case SourceAction::Type::kRedial:
      return redial(action.epoch);
    case SourceAction::Type::kStartTimer:
      timer(action.timer) = Clock::now() + duration(action.timer);
      return;
    case SourceAction::Type::kStopTimer:
      timer(action.timer).reset();
      return;
    case SourceAction::Type::kSettle:
      settled_ = Settlement{action.outcome, action.cause};
      return;
  }
}

void ParkCommit::redial(std::uint32_t epoch) {
  std::chrono::milliseconds patience = timeouts_.connect;
  if (const auto& bound = timer(SourceTimer::kDoubt)) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(*bound - Clock::now());
    patience = std::clamp(left, kLeastDial, std::max(patience, kLeastDial));
  }
  Event outcome = Event::kRedialled;
  try {
    image_.redial_home(patience);
  } catch (const std::exception&) {
    outcome = Event::kRedialFailed;
  }
  dispatch(SourceEvent::dialled(outcome, epoch));
}

std::chrono::milliseconds ParkCommit::duration(SourceTimer of) const {
  switch (of) {
    case SourceTimer::kReady:
      return timeouts_.ready;
    case SourceTimer::kDoubt:
      return timeouts_.doubt;
    case SourceTimer::kRetry:
      return kRetry;
    case SourceTimer::kPause:
      break;
  }
  return timeouts_.ready;  // the guest stands: it is stopped at once
}

}  // namespace memferry::control
