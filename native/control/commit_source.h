// The source's side of the commit, as a pure function: src/protocol/commit-source.ts in C++, state for state and action for
// action (test/embed/commit-twin.test.ts compares the two). Until GRANT is sent whatever fails ends in kReclaimed: the
// guest is this side's. From then on only the other side's own REFUSED, or the caller's proof that it is dead, leads back.
//
// Rules for whoever drives it:
//
//  1. Store the new state first, then carry out the actions in order: `granted` is recorded before GRANT can leave.
//  2. Every event goes in, whatever the state: the machine ignores what does not concern it.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "control/commit_destination.h"
#include "control/failure.h"

namespace memferry::control {

enum class SourcePhase : std::uint8_t {
  kRunning,
  kPausing,       // `pause` has not answered: the guest may still run
  kTransferring,  // the guest stands; what must arrive before PREPARE is on its way
  kPreparing,     // PREPARE was sent
  kGranted,       // GRANT was or is about to be sent, unanswered
  kInDoubt,       // the bound has passed without an answer; can be asked again
  kLost,       // the other side knows nothing of it: it was restarted, with or without having had the guest
  kDeparted,   // the guest is the other side's. Final
  kReclaimed,  // the guest is this side's, for good. Final
  kReleased,   // the caller let go of a guest whose fate is not known. Final
};

enum class SourceLink : std::uint8_t { kUp, kDialling, kDown };

struct SourceState {
  SourcePhase phase = SourcePhase::kRunning;
  std::uint32_t epoch = 0;            // kGranted, kInDoubt, kLost: the newest connection's
  std::uint32_t redials = 0;          // kGranted: how many were tried
  std::uint32_t waits = 0;            // kGranted: how often `retry` is started again before the next redial
  SourceLink link = SourceLink::kUp;  // kGranted
  bool pause_outstanding = false;     // kReclaimed: a pause may still succeed late and is then undone
  Cause cause{};                      // kReclaimed
  // The guest may not run here: it is the other side's, as far as anyone knows.
  [[nodiscard]] bool committed() const {
    return phase == SourcePhase::kGranted || phase == SourcePhase::kInDoubt || phase == SourcePhase::kLost ||
           phase == SourcePhase::kDeparted || phase == SourcePhase::kReleased;
  }
};

enum class SourceTimer : std::uint8_t {
  kPause,  // how long `pause` may take
  kReady,  // from PREPARE to READY
  kRetry,  // before the next redial
  kDoubt,  // from GRANT until MIGRATION_IN_DOUBT
};

struct SourceEvent {
  enum class Type : std::uint8_t {
    kSwitch,
    kPaused,
    kPauseFailed,
    kTransferred,  // what must be there before PREPARE is there
    kFail,         // any local failure, and the caller's cancel. Ignored from GRANT on
    kMessage,
    kConnectionLost,
    kRedialled,
    kRedialFailed,
    kTimer,
    kFence,     // proof that the other side is dead and stays so
    kAskAgain,  // in doubt
    kRelease,   // the caller gives up on the guest's fate
  };
  Type type = Type::kSwitch;
  CommitAnswer answer{};                    // kMessage
  Cause cause{};                            // kPauseFailed, kFail
  std::uint32_t epoch = 0;                  // kRedialled, kRedialFailed
  SourceTimer timer = SourceTimer::kPause;  // kTimer

  [[nodiscard]] static SourceEvent of(Type type) {
    SourceEvent event;
    event.type = type;
    return event;
  }
  [[nodiscard]] static SourceEvent failed(Cause cause, Type type = Type::kFail) {
    SourceEvent event = of(type);
    event.cause = std::move(cause);
    return event;
  }
  [[nodiscard]] static SourceEvent heard(CommitAnswer answer) {
    SourceEvent event = of(Type::kMessage);
    event.answer = std::move(answer);
    return event;
  }
  [[nodiscard]] static SourceEvent dialled(Type type, std::uint32_t epoch) {
    SourceEvent event = of(type);
    event.epoch = epoch;
    return event;
  }
  [[nodiscard]] static SourceEvent over(SourceTimer timer) {
    SourceEvent event = of(Type::kTimer);
    event.timer = timer;
    return event;
  }
};

enum class SourceOutcome : std::uint8_t { kDeparted, kReclaimed, kInDoubt, kLost };

struct SourceAction {
  enum class Type : std::uint8_t {
    kPause,
    kAbortPause,
    kRunHere,  // undo the pause
    kSend,
    kRedial,  // drop the connection, if any, and dial a new one with this epoch
    kStartTimer,
    kStopTimer,
    kSettle,
  };
  Type type = Type::kPause;
  CommitQuestion question{};                         // kSend
  std::uint32_t epoch = 0;                           // kRedial
  SourceTimer timer = SourceTimer::kPause;           // kStartTimer, kStopTimer
  SourceOutcome outcome = SourceOutcome::kDeparted;  // kSettle
  Cause cause{};                                     // kSettle, but for kDeparted
};

struct SourceStep {
  SourceState state;
  std::vector<SourceAction> actions;
};

[[nodiscard]] SourceStep step_source(const SourceState& state, const SourceEvent& event);

}  // namespace memferry::control
