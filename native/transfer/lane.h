// One way out of the source during a scatter: a data connection to the destination, the demand connection, or the
// connection to one server. What was sent on it and is not acknowledged lies in batches, each ended by a barrier.
//
// A lane that acknowledges slowly is given less: its window is what it acknowledges in kWindowTime beyond the shortest
// time that an answer ever took. So what a slow receiver still has in hand when nothing else is left drains about that
// fast, and a far one keeps its rate. The rate is taken over kRateTime: a
// receiver that gets its CPU in slices acknowledges in bursts, and within a burst looks a hundred times as fast.
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
  static constexpr std::uint64_t kLeastWindow = 256ULL << 10;
  static constexpr std::uint64_t kFirstWindow = 1ULL << 20;
  static constexpr std::uint64_t kLargestWindow = 8ULL << 20;
  static constexpr std::chrono::milliseconds kWindowTime{60};
  // Of acknowledgements no older than the one says how fast it is, over no less than the other.
  static constexpr std::chrono::milliseconds kRateTime{240};
  static constexpr std::chrono::milliseconds kLeastRateTime{20};
  // After so many bytes a barrier: often enough for the window to move smoothly, seldom enough not to count. (2 MiB where
  // the window is the largest made scatters within one machine no faster.)
  static constexpr std::uint64_t kBatchBytes = 512ULL << 10;

  // Of one batch. A frame is refused once by its server and once by the replica's, a reference page by page.
  static constexpr std::size_t kMostRefusals = 2048;
  // And each page by either of them: more of the same would only be work.
  static constexpr std::uint64_t kMostRefusalsAPage = 2;
  // After so many frames a barrier: compressed, many fit into kBatchBytes.
  static constexpr std::size_t kBatchFrames = kMostRefusals / 4;
  // Not acknowledged, at most, where each is small: the window does not bound those. Well below the barriers that a
  // server keeps for one that hesitates (ScatterAnswers::kMostBarriers).
  static constexpr std::size_t kMostBatches = 64;

  struct Batch {
    std::uint64_t tag = 0;
    std::uint64_t bytes = 0;
    std::uint64_t raw_bytes = 0;  // of pages with content, as they lie in memory
    std::size_t frames = 0;
    std::uint64_t pages = 0;
    std::uint64_t pages_refused = 0;
    bool references = false;  // all of it, or nothing
    std::vector<RegionRun> runs;
    std::vector<RegionRun> torn;     // the receiver could not verify them
    std::vector<RegionRun> no_room;  // nor keep these
    wire::Holders holders;           // who holds its pages once it is acknowledged
    Clock::time_point sent{};
    // The first of its runs are in the queue again; its acknowledgement still counts when it comes.
    std::size_t returned_runs = 0;
    [[nodiscard]] bool returned() const { return returned_runs > 0; }
  };

  // Sent, and not yet behind a barrier; a run a frame. One batch has one answer to who holds it and is of one kind:
  // where needs_barrier(), a barrier comes first.
  void sent(std::span<const RegionRun> runs, std::uint64_t bytes, wire::Holders holders,
            bool references = false, std::uint64_t raw_bytes = 0);
  [[nodiscard]] bool needs_barrier(wire::Holders holders, bool references = false) const {
    return !open_.runs.empty() && (open_.holders != holders || open_.references != references);
  }
  [[nodiscard]] bool anything_open() const { return open_.bytes > 0; }
  // Enough for a barrier of its own; a small window is not to be one batch.
  [[nodiscard]] bool batch_is_full() const {
    return open_.bytes >= std::min(kBatchBytes, window_ / 2) || open_.frames >= kBatchFrames;
  }
  // The barrier's tag; everything open is behind it.
  std::uint64_t close(Clock::time_point now);
  // nullopt: not the tag of the oldest batch.
  std::optional<Batch> acknowledged(std::uint64_t tag, Clock::time_point now);
  // The receiver does not hold these pages, which came on this lane and are not acknowledged. False: they did not, or
  // more is refused than the batch can be.
  bool refused(std::uint32_t region, PageRun run, bool no_room);
  // The receiver says how much it has worked off so far, or the same again: it is at it. False: less than before.
  bool worked(std::uint64_t so_far, Clock::time_point now);
  // Since when it gives no sign, where it has been waited for since then. A receiver that only says that it is at it is
  // not borne with for ever, least of all one that gets nowhere.
  [[nodiscard]] Clock::time_point silent_since(Clock::time_point waited_since,
                                               Clock::duration longest_turn = wire::kLongestTurn,
                                               Clock::duration longest_answer = wire::kLongestAnswer) const;
  // Every run that is not acknowledged; `for_good`: the connection is gone and no acknowledgement will come. Otherwise
  // the lane owes them: an acknowledgement that still comes counts, and until then it is to get nothing more.
  std::vector<RegionRun> take_back(bool for_good);
  [[nodiscard]] bool owes() const {
    return open_.returned() || (!batches_.empty() && batches_.front().returned());
  }

  // Whether anything that is not acknowledged is to be passed on to that server.
  [[nodiscard]] bool passes_on_to(std::uint8_t ordinal) const {
    return open_.holders.second == ordinal ||
           std::any_of(batches_.begin(), batches_.end(),
                       [&](const Batch& batch) { return batch.holders.second == ordinal; });
  }
  [[nodiscard]] bool has_room() const { return outstanding_ + open_.bytes < window_; }
  // However much else it has in hand: eviction waits for records, and they are few bytes.
  [[nodiscard]] bool has_room_for_record() const { return batches_.size() < kMostBatches; }
  [[nodiscard]] bool has_room_for_small_batch() const { return has_room() && has_room_for_record(); }
  [[nodiscard]] bool idle() const { return batches_.empty() && open_.bytes == 0; }
  // When the oldest batch was sent, or became the oldest; none when idle.
  [[nodiscard]] std::optional<Clock::time_point> waiting_since() const;
  // When the oldest batch was sent, whatever was acknowledged since; none when idle.
  [[nodiscard]] std::optional<Clock::time_point> oldest_sent() const;
  [[nodiscard]] bool anything_to_take_back() const;
  [[nodiscard]] std::uint64_t window() const { return window_; }

 private:
  Batch open_;
  std::deque<Batch> batches_;
  std::uint64_t next_tag_ = 1;
  std::uint64_t outstanding_ = 0;
  std::uint64_t window_ = kFirstWindow;
  Clock::time_point last_acknowledged_{};
  std::uint64_t worked_ = 0;
  Clock::time_point grew_at_{};
  Clock::time_point said_at_{};
  Clock::duration shortest_answer_ = Clock::duration::max();
  struct Acknowledged {
    Clock::time_point at;
    std::uint64_t bytes;
  };
  // The first entry is where the count begins: its bytes are not in it.
  std::deque<Acknowledged> lately_;
};

}  // namespace memferry
