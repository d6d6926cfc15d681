// The destination's side of the commit, as a pure function: src/protocol/commit-destination.ts in C++, state for state
// and action for action (test/unit/commit-twin.test.ts compares the two). Rules for whoever drives it:
//
//  1. Store the new state first, then carry out the actions in order: `abandoned` is recorded before REFUSED leaves.
//  2. Every event goes in, whatever the state: the machine ignores what does not concern it.
//  3. One machine is one migration id, and its end is remembered (Tombstones): a late GRANT is answered by what was
//     decided, never decided again.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "control/failure.h"

namespace memferry::control {

struct CommitQuestion {
  enum class Type : std::uint8_t { kPrepare, kGrant, kQuery, kCancel };
  Type type = Type::kPrepare;
  std::uint32_t epoch = 0;
  Cause cause{};  // kCancel
};

struct CommitAnswer {
  enum class Type : std::uint8_t { kReady, kResumed, kRefused, kUnknownMigration };
  Type type = Type::kReady;
  std::uint32_t epoch = 0;
  Cause cause{};  // kRefused
};

enum class DestinationPhase : std::uint8_t {
  kReceiving,
  kPreparing,
  kReady,      // READY was or is about to be sent
  kResumed,    // the guest runs here. Final
  kAbandoned,  // it has not run here and never will. Final
};

struct DestinationState {
  DestinationPhase phase = DestinationPhase::kReceiving;
  std::uint32_t epoch = 0;  // the newest that the source has spoken with
  Cause cause{};            // kAbandoned
  [[nodiscard]] bool final() const {
    return phase == DestinationPhase::kResumed || phase == DestinationPhase::kAbandoned;
  }
};

struct DestinationEvent {
  enum class Type : std::uint8_t {
    kMessage,
    kPrepared,        // `prepare` has done everything that can fail
    kFail,            // any local failure up to READY, and the owner's close
    kConnectionLost,  // the newest control connection is gone
    kGrantTimer,
  };
  Type type = Type::kMessage;
  CommitQuestion question{};  // kMessage
  Cause cause{};              // kFail

  [[nodiscard]] static DestinationEvent of(Type type) {
    DestinationEvent event;
    event.type = type;
    return event;
  }
  [[nodiscard]] static DestinationEvent asked(CommitQuestion question) {
    DestinationEvent event;
    event.question = std::move(question);
    return event;
  }
  [[nodiscard]] static DestinationEvent failed(Cause cause) {
    DestinationEvent event = of(Type::kFail);
    event.cause = std::move(cause);
    return event;
  }
};

struct DestinationAction {
  enum class Type : std::uint8_t {
    kPrepare,          // run it; answer with kPrepared or kFail
    kResume,           // let the guest run: nothing in it can fail
    kAbandon,          // let everything of the guest go. Never after kResume
    kSend,             // to the newest connection; nothing happens when there is none
    kStartGrantTimer,  // from READY until this side refuses for good
    kStopGrantTimer,
    kSettleResumed,
    kSettleAbandoned,
  };
  Type type = Type::kPrepare;
  CommitAnswer answer{};  // kSend
  Cause cause{};          // kSettleAbandoned
};

struct DestinationStep {
  DestinationState state;
  std::vector<DestinationAction> actions;
};

[[nodiscard]] DestinationStep step_destination(const DestinationState& state, const DestinationEvent& event);
// To a GRANT or QUERY for a migration that this process has never heard of. No refusal: an earlier process at this
// address may have run the guest.
[[nodiscard]] std::optional<CommitAnswer> answer_unknown(const CommitQuestion& question);

}  // namespace memferry::control
