#include "control/commit_destination.h"

#include <utility>

#include "control/text.h"

namespace memferry::control {

namespace {

using Action = DestinationAction::Type;
using Phase = DestinationPhase;

DestinationAction act(Action type) {
  DestinationAction action;
  action.type = type;
  return action;
}

DestinationAction send(CommitAnswer::Type type, std::uint32_t epoch) {
  DestinationAction action = act(Action::kSend);
  action.answer.type = type;
  action.answer.epoch = epoch;
  return action;
}

DestinationAction refused(std::uint32_t epoch, const Cause& cause) {
  DestinationAction action = send(CommitAnswer::Type::kRefused, epoch);
  action.answer.cause = told(cause);
  return action;
}

DestinationAction settled_abandoned(const Cause& cause) {
  DestinationAction action = act(Action::kSettleAbandoned);
  action.cause = cause;
  return action;
}

DestinationStep stay(const DestinationState& state) { return {state, {}}; }

DestinationStep abandon(const DestinationState& state, const Cause& cause) {
  DestinationStep step{{Phase::kAbandoned, state.epoch, cause}, {}};
  if (state.phase == Phase::kReady) step.actions.push_back(act(Action::kStopGrantTimer));
  // Told before it is torn down: the source's guest may be standing until it hears of it.
  step.actions.push_back(refused(state.epoch, cause));
  step.actions.push_back(act(Action::kAbandon));
  step.actions.push_back(settled_abandoned(cause));
  return step;
}

DestinationStep on_asked(const DestinationState& state, const CommitQuestion& question) {
  // Older than what the source has said since: its connection is gone, nobody reads the answer.
  if (question.epoch < state.epoch) return stay(state);
  DestinationState now = state;
  if (now.phase != Phase::kReceiving) now.epoch = question.epoch;
  const bool query = question.type == CommitQuestion::Type::kQuery;
  switch (now.phase) {
    case Phase::kReceiving:
    case Phase::kPreparing:
      return abandon(now, {"PROTOCOL_ERROR",
                           std::string(query ? "query" : "grant") + " for a guest that is not ready here"});
    case Phase::kReady:
      if (query) return {now, {send(CommitAnswer::Type::kReady, now.epoch)}};
      return {{Phase::kResumed, now.epoch, {}},
              {act(Action::kStopGrantTimer), act(Action::kResume),
               send(CommitAnswer::Type::kResumed, now.epoch), act(Action::kSettleResumed)}};
    case Phase::kResumed:
      return {now, {send(CommitAnswer::Type::kResumed, now.epoch)}};
    case Phase::kAbandoned:
      return {now, {refused(now.epoch, now.cause)}};
  }
  return stay(state);
}

DestinationStep on_message(const DestinationState& state, const CommitQuestion& question) {
  switch (question.type) {
    case CommitQuestion::Type::kPrepare:
      if (state.phase != Phase::kReceiving) return stay(state);
      return {{Phase::kPreparing, question.epoch, {}}, {act(Action::kPrepare)}};
    case CommitQuestion::Type::kCancel:
      // A source that cancels has not granted and never will.
      return state.final() ? stay(state) : abandon(state, question.cause);
    case CommitQuestion::Type::kGrant:
    case CommitQuestion::Type::kQuery:
      return on_asked(state, question);
  }
  return stay(state);
}

}  // namespace

DestinationStep step_destination(const DestinationState& state, const DestinationEvent& event) {
  switch (event.type) {
    case DestinationEvent::Type::kMessage:
      return on_message(state, event.question);
    case DestinationEvent::Type::kPrepared:
      if (state.phase != Phase::kPreparing) return stay(state);
      // The bound first: were the send to fail, this side would still come to an end.
      return {{Phase::kReady, state.epoch, {}},
              {act(Action::kStartGrantTimer), send(CommitAnswer::Type::kReady, state.epoch)}};
    case DestinationEvent::Type::kFail:
      return state.final() ? stay(state) : abandon(state, event.cause);
    case DestinationEvent::Type::kConnectionLost:
      // A source that loses its connection before GRANT runs on; one that had sent GRANT redials, and only a READY
      // destination can have been granted.
      if (state.phase != Phase::kReceiving && state.phase != Phase::kPreparing) return stay(state);
      return abandon(state,
                     {"PEER_LOST", "the connection to the source was lost before the guest was ready here"});
    case DestinationEvent::Type::kGrantTimer:
      if (state.phase != Phase::kReady) return stay(state);
      return abandon(
          state,
          {"PEER_LOST",
           "the destination was ready and heard nothing from the source; it will never run the guest"});
  }
  return stay(state);
}

std::optional<CommitAnswer> answer_unknown(const CommitQuestion& question) {
  if (question.type != CommitQuestion::Type::kGrant && question.type != CommitQuestion::Type::kQuery)
    return {};
  return CommitAnswer{CommitAnswer::Type::kUnknownMigration, question.epoch, {}};
}

}  // namespace memferry::control
