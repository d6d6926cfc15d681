// The destination's commit machine in C++, for its twin in TypeScript: a line on standard input is a sequence of events
// as JSON, a line on standard output what each of them led to (commit-twin.test.ts compares).
#include <iostream>
#include <string>

#include "control/commit_destination.h"
#include "control/json.h"
#include "control/messages.h"

namespace {

using memferry::control::Cause;
using memferry::control::CommitQuestion;
using memferry::control::DestinationAction;
using memferry::control::DestinationEvent;
using memferry::control::DestinationPhase;
using memferry::control::DestinationState;
using memferry::control::Json;

Json cause_json(const Cause& cause) { return {{"code", cause.code}, {"message", cause.message}}; }

DestinationEvent event_of(const Json& json) {
  const auto type = json.at("type").get<std::string>();
  if (type == "prepared") return DestinationEvent::of(DestinationEvent::Type::kPrepared);
  if (type == "connection-lost") return DestinationEvent::of(DestinationEvent::Type::kConnectionLost);
  if (type == "timer") return DestinationEvent::of(DestinationEvent::Type::kGrantTimer);
  if (type == "fail") {
    const Json& cause = json.at("cause");
    return DestinationEvent::failed(
        {cause.at("code").get<std::string>(), cause.at("message").get<std::string>()});
  }
  // As it would arrive: through the schema.
  return DestinationEvent::asked(memferry::control::source_message(json.at("message")).commit);
}

Json state_json(const DestinationState& state) {
  switch (state.phase) {
    case DestinationPhase::kReceiving:
      return {{"phase", "receiving"}};
    case DestinationPhase::kPreparing:
      return {{"phase", "preparing"}, {"epoch", state.epoch}};
    case DestinationPhase::kReady:
      return {{"phase", "ready"}, {"epoch", state.epoch}};
    case DestinationPhase::kResumed:
      return {{"phase", "resumed"}, {"epoch", state.epoch}};
    case DestinationPhase::kAbandoned:
      return {{"phase", "abandoned"}, {"epoch", state.epoch}, {"cause", cause_json(state.cause)}};
  }
  return nullptr;
}

Json action_json(const DestinationAction& action) {
  switch (action.type) {
    case DestinationAction::Type::kPrepare:
      return {{"type", "prepare"}};
    case DestinationAction::Type::kResume:
      return {{"type", "resume"}};
    case DestinationAction::Type::kAbandon:
      return {{"type", "abandon"}};
    case DestinationAction::Type::kSend:
      return {{"type", "send"}, {"message", memferry::control::to_json(action.answer)}};
    case DestinationAction::Type::kStartGrantTimer:
      return {{"type", "start-timer"}, {"timer", "grant"}};
    case DestinationAction::Type::kStopGrantTimer:
      return {{"type", "stop-timer"}, {"timer", "grant"}};
    case DestinationAction::Type::kSettleResumed:
      return {{"type", "settle"}, {"outcome", "resumed"}};
    case DestinationAction::Type::kSettleAbandoned:
      return {{"type", "settle"}, {"outcome", "abandoned"}, {"cause", cause_json(action.cause)}};
  }
  return nullptr;
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);) {
    Json steps = Json::array();
    DestinationState state;
    for (const Json& event : Json::parse(line)) {
      const auto step = memferry::control::step_destination(state, event_of(event));
      state = step.state;
      Json actions = Json::array();
      for (const DestinationAction& action : step.actions) actions.push_back(action_json(action));
      steps.push_back({{"state", state_json(state)}, {"actions", std::move(actions)}});
    }
    std::cout << memferry::control::to_text(steps) << '\n';
  }
  return 0;
}
