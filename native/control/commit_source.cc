#include "control/commit_source.h"

#include <algorithm>
#include <utility>

#include "control/text.h"

namespace memferry::control {

namespace {

using Action = SourceAction::Type;
using Event = SourceEvent::Type;
using Phase = SourcePhase;
using Timer = SourceTimer;

// A wait for an answer is at most this many times `retry`.
constexpr std::uint32_t kLongestWait = 16;

SourceAction act(Action type) {
  SourceAction action;
  action.type = type;
  return action;
}

SourceAction start(Timer timer) {
  SourceAction action = act(Action::kStartTimer);
  action.timer = timer;
  return action;
}

SourceAction stop(Timer timer) {
  SourceAction action = act(Action::kStopTimer);
  action.timer = timer;
  return action;
}

SourceAction send(CommitQuestion::Type type, std::uint32_t epoch, Cause cause = {}) {
  SourceAction action = act(Action::kSend);
  action.question = {type, epoch, std::move(cause)};
  return action;
}

SourceAction settle(SourceOutcome outcome, Cause cause = {}) {
  SourceAction action = act(Action::kSettle);
  action.outcome = outcome;
  action.cause = std::move(cause);
  return action;
}

SourceState in(Phase phase) {
  SourceState state;
  state.phase = phase;
  return state;
}

SourceState at(Phase phase, std::uint32_t epoch) {
  SourceState state = in(phase);
  state.epoch = epoch;
  return state;
}

SourceState reclaimed(bool pause_outstanding, Cause cause) {
  SourceState state = in(Phase::kReclaimed);
  state.pause_outstanding = pause_outstanding;
  state.cause = std::move(cause);
  return state;
}

SourceState linked(const SourceState& state, SourceLink link) {
  SourceState now = state;
  now.link = link;
  return now;
}

SourceStep stay(const SourceState& state) { return {state, {}}; }

// Before GRANT: the guest is this side's, the other is told, and can never have been granted.
SourceStep reclaim(const SourceState& state, const Cause& cause, bool pause_answered = false) {
  const bool outstanding = state.phase == Phase::kPausing && !pause_answered;
  SourceStep step{reclaimed(outstanding, cause), {}};
  if (state.phase == Phase::kPausing) step.actions.push_back(stop(Timer::kPause));
  if (state.phase == Phase::kPreparing) step.actions.push_back(stop(Timer::kReady));
  if (outstanding) step.actions.push_back(act(Action::kAbortPause));
  // Running comes before telling: the guest must not stand while a slow connection takes the message.
  if (state.phase == Phase::kTransferring || state.phase == Phase::kPreparing)
    step.actions.push_back(act(Action::kRunHere));
  step.actions.push_back(send(CommitQuestion::Type::kCancel, 0, told(cause)));
  step.actions.push_back(settle(SourceOutcome::kReclaimed, cause));
  return step;
}

// After GRANT, by the other side's refusal or the caller's fence alone.
SourceStep take_back(const Cause& cause) {
  return {reclaimed(false, cause),
          {stop(Timer::kRetry), stop(Timer::kDoubt), act(Action::kRunHere),
           settle(SourceOutcome::kReclaimed, cause)}};
}

SourceStep depart() {
  return {in(Phase::kDeparted), {stop(Timer::kRetry), stop(Timer::kDoubt), settle(SourceOutcome::kDeparted)}};
}

SourceStep doubt(const SourceState& state) {
  return {
      at(Phase::kInDoubt, state.epoch),
      {stop(Timer::kRetry), stop(Timer::kDoubt),
       settle(SourceOutcome::kInDoubt,
              {"MIGRATION_IN_DOUBT",
               "the destination was granted the guest and has not answered; the source keeps its pages and "
               "does not run it"})}};
}

SourceStep fenced() {
  return take_back({"PEER_LOST", "the caller declared the destination dead; the guest runs at the source"});
}

// Twice as long after each redial: a network whose round trip is longer than the wait would have every connection dropped
// before its answer is there.
SourceStep ask(const SourceState& state, CommitQuestion::Type type) {
  SourceState now = state;
  now.waits = (state.redials >= 4 ? kLongestWait : std::uint32_t{1} << state.redials) - 1;
  return {now, {start(Timer::kRetry), send(type, state.epoch)}};
}

SourceStep redial(const SourceState& state) {
  SourceState now = at(Phase::kGranted, state.epoch + 1);
  now.redials = state.redials + 1;
  now.link = SourceLink::kDialling;
  SourceAction dial = act(Action::kRedial);
  dial.epoch = now.epoch;
  return {now, {stop(Timer::kRetry), std::move(dial)}};
}

SourceStep retry(const SourceState& state) {
  if (state.waits == 0) return redial(state);
  SourceState now = state;
  --now.waits;
  return {now, {start(Timer::kRetry)}};
}

SourceStep heard_before_grant(const SourceState& state, const CommitAnswer& answer) {
  switch (answer.type) {
    case CommitAnswer::Type::kReady:
      if (state.phase != Phase::kPreparing || answer.epoch != 0) return stay(state);
      // The bound first: were anything to fail between the two, an unanswered GRANT would still end.
      return {at(Phase::kGranted, 0),
              {stop(Timer::kReady), start(Timer::kDoubt), start(Timer::kRetry),
               send(CommitQuestion::Type::kGrant, 0)}};
    case CommitAnswer::Type::kRefused:
      return reclaim(state, answer.cause);
    case CommitAnswer::Type::kUnknownMigration:
      return reclaim(state,
                     {"PEER_LOST", "the destination no longer knows the migration; the guest runs on here"});
    case CommitAnswer::Type::kResumed:
      // Without a GRANT no destination that keeps the protocol says so; one that lies is not believed.
      return reclaim(state, {"PROTOCOL_ERROR",
                             "the destination claimed to have resumed a guest that it was not granted"});
  }
  return stay(state);
}

SourceStep before_grant(const SourceState& state, const SourceEvent& event) {
  switch (event.type) {
    case Event::kSwitch:
      if (state.phase != Phase::kRunning) return stay(state);
      return {in(Phase::kPausing), {act(Action::kPause), start(Timer::kPause)}};
    case Event::kPaused:
      if (state.phase != Phase::kPausing) return stay(state);
      return {in(Phase::kTransferring), {stop(Timer::kPause)}};
    case Event::kPauseFailed:
      return state.phase == Phase::kPausing ? reclaim(state, event.cause, true) : stay(state);
    case Event::kTransferred:
      if (state.phase != Phase::kTransferring) return stay(state);
      return {in(Phase::kPreparing), {send(CommitQuestion::Type::kPrepare, 0), start(Timer::kReady)}};
    case Event::kFail:
      return reclaim(state, event.cause);
    case Event::kRelease:
      return reclaim(state, {"CANCELLED", "the migration was closed before the commit"});
    case Event::kConnectionLost:
      return reclaim(
          state, {"PEER_LOST",
                  "the connection to the destination was lost before the commit; the guest runs on here"});
    case Event::kTimer:
      if (event.timer == Timer::kPause && state.phase == Phase::kPausing)
        return reclaim(state, {"PAUSE_TIMEOUT", "the guest did not pause in time"});
      if (event.timer == Timer::kReady && state.phase == Phase::kPreparing)
        return reclaim(state, {"PREPARE_TIMEOUT", "the destination was not ready in time"});
      return stay(state);
    case Event::kMessage:
      return heard_before_grant(state, event.answer);
    default:
      return stay(state);
  }
}

SourceStep heard_granted(const SourceState& state, const CommitAnswer& answer) {
  if (answer.epoch > state.epoch) return stay(state);
  switch (answer.type) {
    case CommitAnswer::Type::kResumed:
      return depart();
    case CommitAnswer::Type::kRefused:
      return take_back(answer.cause);
    case CommitAnswer::Type::kReady:
      // The answer to QUERY: GRANT never arrived. An old READY was answered by a GRANT already.
      if (answer.epoch != state.epoch || state.epoch == 0 || state.link != SourceLink::kUp)
        return stay(state);
      return ask(state, CommitQuestion::Type::kGrant);
    case CommitAnswer::Type::kUnknownMigration:
      if (answer.epoch != state.epoch) return stay(state);
      return {
          at(Phase::kLost, state.epoch),
          {stop(Timer::kRetry), stop(Timer::kDoubt),
           settle(SourceOutcome::kLost,
                  {"GUEST_LOST",
                   "the destination was granted the guest and has since been restarted; the source does not "
                   "run it"})}};
  }
  return stay(state);
}

SourceStep granted(const SourceState& state, const SourceEvent& event) {
  switch (event.type) {
    case Event::kMessage:
      return heard_granted(state, event.answer);
    case Event::kConnectionLost: {
      if (state.link != SourceLink::kUp) return stay(state);
      // The first redial goes out at once; later ones wait for `retry`, so that a peer that accepts and closes cannot make
      // the source spin.
      if (state.redials == 0) return redial(state);
      SourceState now = linked(state, SourceLink::kDown);
      now.waits = 0;
      return {now, {start(Timer::kRetry)}};
    }
    case Event::kRedialled:
      if (state.link != SourceLink::kDialling || event.epoch != state.epoch) return stay(state);
      return ask(linked(state, SourceLink::kUp), CommitQuestion::Type::kQuery);
    case Event::kRedialFailed:
      if (state.link != SourceLink::kDialling || event.epoch != state.epoch) return stay(state);
      return {linked(state, SourceLink::kDown), {start(Timer::kRetry)}};
    case Event::kTimer:
      if (event.timer == Timer::kRetry)
        return state.link == SourceLink::kDialling ? stay(state) : retry(state);
      return event.timer == Timer::kDoubt ? doubt(state) : stay(state);
    case Event::kFence:
      return fenced();
    case Event::kRelease: {
      // Before the bound the promise is still open: it says what is known, which is nothing.
      SourceStep step = doubt(state);
      step.state = in(Phase::kReleased);
      return step;
    }
    default:
      return stay(state);
  }
}

SourceStep unresolved(const SourceState& state, const SourceEvent& event) {
  switch (event.type) {
    case Event::kMessage:
      if (event.answer.epoch > state.epoch) return stay(state);
      if (event.answer.type == CommitAnswer::Type::kResumed) return depart();
      if (event.answer.type == CommitAnswer::Type::kRefused) return take_back(event.answer.cause);
      return stay(state);
    case Event::kFence:
      return fenced();
    case Event::kAskAgain: {
      if (state.phase == Phase::kLost) return stay(state);
      SourceStep step = redial(at(Phase::kGranted, state.epoch));
      step.actions.insert(step.actions.begin(), start(Timer::kDoubt));
      return step;
    }
    case Event::kRelease:
      return stay(in(Phase::kReleased));
    default:
      return stay(state);
  }
}

SourceStep after_reclaim(const SourceState& state, const SourceEvent& event) {
  if (!state.pause_outstanding) return stay(state);
  // A pause that succeeds after the migration has given up would leave the guest standing for ever.
  if (event.type == Event::kPaused) return {reclaimed(false, state.cause), {act(Action::kRunHere)}};
  if (event.type == Event::kPauseFailed) return stay(reclaimed(false, state.cause));
  return stay(state);
}

}  // namespace

SourceStep step_source(const SourceState& state, const SourceEvent& event) {
  switch (state.phase) {
    case Phase::kRunning:
    case Phase::kPausing:
    case Phase::kTransferring:
    case Phase::kPreparing:
      return before_grant(state, event);
    case Phase::kGranted:
      return granted(state, event);
    case Phase::kInDoubt:
    case Phase::kLost:
      return unresolved(state, event);
    case Phase::kReclaimed:
      return after_reclaim(state, event);
    case Phase::kDeparted:
    case Phase::kReleased:
      return stay(state);
  }
  return stay(state);
}

}  // namespace memferry::control
