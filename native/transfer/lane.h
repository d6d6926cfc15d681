// One way out of the source during a scatter: a data connection to the destination, the demand connection, or the
// connection to one server. What was sent on it and is not acknowledged lies in batches, each ended by a barrier.
//
// A lane that acknowledges slowly is given less: its window is what it acknowledged in kWindowTime. So what a slow
// receiver still has in hand when nothing else is left drains about that fast.
//
// Pure but for the clock that is handed in; the owner serialises.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "transfer/events.h"
#include "wire/frame.h"

namespace memferry {

class Lane {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::uint64_t kLeastWindow = 1ULL << 20;
  static constexpr std::uint64_t kLargestWindow = 8ULL << 20;
  static constexpr std::chrono::milliseconds kWindowTime{80};
  // After so many bytes a barrier: often enough for the window to move smoothly, seldom enough not to count.
  static constexpr std::uint64_t kBatchBytes = 512ULL << 10;

  // A batch has no more frames than that, and a frame is refused once.
  static constexpr std::size_t kMostRefusals = kLargestWindow / 4096;

  struct Batch {
    std::uint64_t tag = 0;
    std::uint64_t bytes = 0;
    std::vector<RegionRun> runs;
    std::vector<RegionRun> torn;     // the receiver could not verify them
    std::vector<RegionRun> no_room;  // nor keep these
    wire::Holders holders;           // who holds its pages once it is acknowledged
    Clock::time_point sent{};
    bool returned =
        false;  // its pages are in the queue again; its acknowledgement still counts when it comes
  };

  // Sent, and not yet behind a barrier. One batch has one answer to who holds it: where holders_change(), a barrier
  // comes first.
  void sent(std::span<const RegionRun> runs, std::uint64_t bytes, wire::Holders holders);
  [[nodiscard]] bool holders_change(wire::Holders holders) const {
    return !open_.runs.empty() && open_.holders != holders;
  }
  [[nodiscard]] std::uint64_t open_bytes() const { return open_.bytes; }
  [[nodiscard]] bool anything_open() const { return open_.bytes > 0; }
  // The barrier's tag; everything open is behind it.
  std::uint64_t close(Clock::time_point now);
  // nullopt: not the tag of the oldest batch.
  std::optional<Batch> acknowledged(std::uint64_t tag, Clock::time_point now);
  // The receiver does not hold these pages, which came on this lane and are not acknowledged. False: they did not.
  bool refused(std::uint32_t region, PageRun run, bool no_room);
  // Every run that is not acknowledged; `for_good`: the connection is gone and no acknowledgement will come.
  std::vector<RegionRun> take_back(bool for_good);

  // Whether anything that is not acknowledged is to be passed on to that server.
  [[nodiscard]] bool passes_on_to(std::uint8_t ordinal) const {
    return open_.holders.second == ordinal ||
           std::any_of(batches_.begin(), batches_.end(),
                       [&](const Batch& batch) { return batch.holders.second == ordinal; });
  }
  [[nodiscard]] bool has_room() const { return outstanding_ + open_.bytes < window_; }
  [[nodiscard]] bool idle() const { return batches_.empty() && open_.bytes == 0; }
  // When the oldest batch was sent, or became the oldest; none when idle.
  [[nodiscard]] std::optional<Clock::time_point> waiting_since() const;
  [[nodiscard]] bool anything_to_take_back() const;
  [[nodiscard]] std::uint64_t window() const { return window_; }

 private:
  Batch open_;
  std::deque<Batch> batches_;
  std::uint64_t next_tag_ = 1;
  std::uint64_t outstanding_ = 0;
  std::uint64_t window_ = kLeastWindow;
  double rate_ = 0;  // bytes/s, smoothed
  Clock::time_point last_acknowledged_{};
};

}  // namespace memferry
