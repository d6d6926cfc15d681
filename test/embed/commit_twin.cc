// Decisions that exist in C++ and in TypeScript, for commit-twin.test.ts to compare. A line on standard input is a question
// as JSON, a line on standard output the answer; what is asked the argument says:
//   destination, source   a sequence of events of that machine: what each of them led to
//   placement             a guest and servers: null, or why they do not hold it
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "control/commit_destination.h"
#include "control/commit_source.h"
#include "control/json.h"
#include "control/messages.h"
#include "control/placement.h"

namespace {

using memferry::control::Cause;
using memferry::control::CommitQuestion;
using memferry::control::DestinationAction;
using memferry::control::DestinationEvent;
using memferry::control::DestinationPhase;
using memferry::control::DestinationState;
using memferry::control::Json;
using memferry::control::SourceAction;
using memferry::control::SourceEvent;
using memferry::control::SourceLink;
using memferry::control::SourceOutcome;
using memferry::control::SourcePhase;
using memferry::control::SourceState;
using memferry::control::SourceTimer;

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

Json destination(const Json& events) {
  Json steps = Json::array();
  DestinationState state;
  for (const Json& event : events) {
    const auto step = memferry::control::step_destination(state, event_of(event));
    state = step.state;
    Json actions = Json::array();
    for (const DestinationAction& action : step.actions) actions.push_back(action_json(action));
    steps.push_back({{"state", state_json(state)}, {"actions", std::move(actions)}});
  }
  return steps;
}

const std::map<std::string, SourceTimer> kTimers = {{"pause", SourceTimer::kPause},
                                                    {"ready", SourceTimer::kReady},
                                                    {"retry", SourceTimer::kRetry},
                                                    {"doubt", SourceTimer::kDoubt}};

std::string name_of(SourceTimer timer) {
  for (const auto& [name, known] : kTimers) {
    if (known == timer) return name;
  }
  return {};
}

SourceEvent source_event(const Json& json) {
  using Type = SourceEvent::Type;
  static const std::map<std::string, Type> plain = {{"switch", Type::kSwitch},
                                                    {"paused", Type::kPaused},
                                                    {"transferred", Type::kTransferred},
                                                    {"connection-lost", Type::kConnectionLost},
                                                    {"fence", Type::kFence},
                                                    {"ask-again", Type::kAskAgain},
                                                    {"release", Type::kRelease}};
  const auto type = json.at("type").get<std::string>();
  if (const auto found = plain.find(type); found != plain.end()) return SourceEvent::of(found->second);
  if (type == "timer") return SourceEvent::over(kTimers.at(json.at("timer").get<std::string>()));
  if (type == "redialled" || type == "redial-failed") {
    return SourceEvent::dialled(type == "redialled" ? Type::kRedialled : Type::kRedialFailed,
                                json.at("epoch").get<std::uint32_t>());
  }
  if (type == "message") {
    // As it would arrive: through the schema.
    return SourceEvent::heard(memferry::control::commit_answer(json.at("message")).value());
  }
  const Json& cause = json.at("cause");
  return SourceEvent::failed({cause.at("code").get<std::string>(), cause.at("message").get<std::string>()},
                             type == "fail" ? Type::kFail : Type::kPauseFailed);
}

Json source_state_json(const SourceState& state) {
  static const std::map<SourcePhase, std::string> names = {{SourcePhase::kRunning, "running"},
                                                           {SourcePhase::kPausing, "pausing"},
                                                           {SourcePhase::kTransferring, "transferring"},
                                                           {SourcePhase::kPreparing, "preparing"},
                                                           {SourcePhase::kGranted, "granted"},
                                                           {SourcePhase::kInDoubt, "in-doubt"},
                                                           {SourcePhase::kLost, "lost"},
                                                           {SourcePhase::kDeparted, "departed"},
                                                           {SourcePhase::kReclaimed, "reclaimed"},
                                                           {SourcePhase::kReleased, "released"}};
  static const std::map<SourceLink, std::string> links = {
      {SourceLink::kUp, "up"}, {SourceLink::kDialling, "dialling"}, {SourceLink::kDown, "down"}};
  Json json = {{"phase", names.at(state.phase)}};
  if (state.phase == SourcePhase::kGranted || state.phase == SourcePhase::kInDoubt ||
      state.phase == SourcePhase::kLost)
    json["epoch"] = state.epoch;
  if (state.phase == SourcePhase::kGranted) {
    json["redials"] = state.redials;
    json["waits"] = state.waits;
    json["link"] = links.at(state.link);
  }
  if (state.phase == SourcePhase::kReclaimed) {
    json["pauseOutstanding"] = state.pause_outstanding;
    json["cause"] = cause_json(state.cause);
  }
  return json;
}

Json source_action_json(const SourceAction& action) {
  static const std::map<SourceOutcome, std::string> outcomes = {{SourceOutcome::kDeparted, "departed"},
                                                                {SourceOutcome::kReclaimed, "reclaimed"},
                                                                {SourceOutcome::kInDoubt, "in-doubt"},
                                                                {SourceOutcome::kLost, "lost"}};
  switch (action.type) {
    case SourceAction::Type::kPause:
      return {{"type", "pause"}};
    case SourceAction::Type::kAbortPause:
      return {{"type", "abort-pause"}};
    case SourceAction::Type::kRunHere:
      return {{"type", "run-here"}};
    case SourceAction::Type::kSend:
      return {{"type", "send"}, {"message", memferry::control::to_json(action.question)}};
    case SourceAction::Type::kRedial:
      return {{"type", "redial"}, {"epoch", action.epoch}};
    case SourceAction::Type::kStartTimer:
      return {{"type", "start-timer"}, {"timer", name_of(action.timer)}};
    case SourceAction::Type::kStopTimer:
      return {{"type", "stop-timer"}, {"timer", name_of(action.timer)}};
    case SourceAction::Type::kSettle:
      break;
  }
  Json json = {{"type", "settle"}, {"outcome", outcomes.at(action.outcome)}};
  if (action.outcome != SourceOutcome::kDeparted) json["cause"] = cause_json(action.cause);
  return json;
}

Json source(const Json& events) {
  Json steps = Json::array();
  SourceState state;
  for (const Json& event : events) {
    const auto step = memferry::control::step_source(state, source_event(event));
    state = step.state;
    Json actions = Json::array();
    for (const SourceAction& action : step.actions) actions.push_back(source_action_json(action));
    steps.push_back({{"state", source_state_json(state)}, {"actions", std::move(actions)}});
  }
  return steps;
}

Json placement(const Json& asked) {
  const Json& need = asked.at("need");
  try {
    memferry::control::must_hold({need.at("bytes").get<std::uint64_t>(),
                                  need.at("pages").get<std::uint64_t>(), need.at("replicas").get<unsigned>()},
                                 asked.at("freeBytes").get<std::vector<std::uint64_t>>());
  } catch (const memferry::control::Failure& failure) {
    return cause_json(failure.cause());
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  static const std::map<std::string, Json (*)(const Json&)> decisions = {
      {"destination", destination}, {"source", source}, {"placement", placement}};
  const auto decide = decisions.find(argc > 1 ? argv[1] : "");
  if (decide == decisions.end()) return 2;
  std::ios::sync_with_stdio(false);
  for (std::string line; std::getline(std::cin, line);)
    std::cout << memferry::control::to_text(decide->second(Json::parse(line))) << '\n';
  return 0;
}
