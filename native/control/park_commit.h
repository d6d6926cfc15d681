// The commit of a park: what the source's machine (commit_source.h) decides is carried out with the image's home server in
// the role of the destination, whoever calls waiting for the outcome. The guest stands, so pausing it is nobody's work here.
//
// Threads: one caller at a time.
#pragma once

#include <array>
#include <chrono>
#include <deque>
#include <functional>
#include <initializer_list>
#include <optional>

#include "control/commit_source.h"
#include "control/staged_image.h"

namespace memferry::control {

class ParkCommit {
 public:
  struct Timeouts {
    std::chrono::milliseconds ready{10000};
    std::chrono::milliseconds doubt{30000};
    std::chrono::milliseconds connect{5000};
  };
  struct Settlement {
    SourceOutcome outcome = SourceOutcome::kReclaimed;
    Cause cause{};  // but for kDeparted
  };

  // `cancelled`: looked at until GRANT is sent. `image` outlives this.
  ParkCommit(StagedImage& image, Timeouts timeouts, std::function<bool()> cancelled);

  // Everything is at the servers: PREPARE, and on from there. Whatever is thrown, the guest is this side's.
  [[nodiscard]] Settlement run();
  // After kInDoubt.
  [[nodiscard]] Settlement ask_again();
  // GRANT may have left, and the guest was not given back since.
  [[nodiscard]] bool committed() const { return state_.committed(); }

 private:
  using Clock = std::chrono::steady_clock;
  [[nodiscard]] Settlement settle(std::initializer_list<SourceEvent::Type> first);
  [[nodiscard]] Settlement until_settled();
  void dispatch(SourceEvent event);
  void carry_out(const SourceAction& action);
  void redial(std::uint32_t epoch);
  void listen(Clock::time_point until);
  [[nodiscard]] std::chrono::milliseconds duration(SourceTimer of) const;
  [[nodiscard]] std::optional<Clock::time_point>& timer(SourceTimer of) {
    return timers_.at(static_cast<std::size_t>(of));
  }

  StagedImage& image_;
  const Timeouts timeouts_;
  const std::function<bool()> cancelled_;
  SourceState state_;
  std::deque<SourceEvent> events_;
  bool dispatching_ = false;
  std::array<std::optional<Clock::time_point>, 4> timers_;  // by SourceTimer: when it is over
  std::optional<Settlement> settled_;
};

}  // namespace memferry::control
