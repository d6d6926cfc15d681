// How fast pages may be pushed. Three rules, strictest first:
//   - the user's bandwidth limit, over all channels;
//   - while faults are being answered, a rate just below what the link delivers, so that an answer finds no
//     queue in front of it (a separate socket is no priority: the queue is the network's);
//   - while faults are being answered on one host, where CPU is what they compete for: small chunks, by threads
//     that stand back.
// With no fault lately the push runs at full speed. Answers to faults debit the buckets and never wait.
//
// RateController and TokenBucket are pure: time and samples come from the caller.
// Threads: RateController and TokenBucket one at a time; Pacer any.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <vector>

namespace memferry::wire {

using TimePoint = std::chrono::steady_clock::time_point;
using Duration = std::chrono::steady_clock::duration;

// Bytes a second, as credit that may become debt: whoever sends takes all that it needs and the next one
// waits until the debt is paid.
class TokenBucket {
 public:
  // 0: no limit. The burst is what may go at once after a silence.
  void set_rate(double bytes_per_second, double burst_bytes, TimePoint now);
  [[nodiscard]] bool limited() const { return rate_ > 0; }
  void debit(std::uint64_t bytes, TimePoint now);
  // How long until something may be sent; zero: now.
  [[nodiscard]] Duration delay(TimePoint now);
  // At the last look: whether most of a burst may go.
  [[nodiscard]] bool well_filled() const { return credit_ > burst_ / 2; }

 private:
  void refill(TimePoint now);
  double rate_ = 0;
  double burst_ = 0;
  double credit_ = 0;
  TimePoint last_{};
};

// Finds the rate that fills a link and no queue, from what TCP knows: while bytes wait beyond what the round
// trip itself holds there is a queue, so fall just below what was delivered, let it drain, and grow again
// slowly. The queue is counted in bytes and not taken from TCP's round trip time: that one is smoothed over
// acknowledgements, so after a pause it still shows a queue that is long gone, and believing it once more after
// each fall would end at a standstill.
class RateController {
 public:
  static constexpr std::chrono::milliseconds kInterval{5};
  static constexpr std::chrono::milliseconds kLongestDrain{100};
  static constexpr std::chrono::microseconds kQueue{150};  // more than this is a queue
  static constexpr double kFall = 0.98;                    // of what was delivered
  static constexpr double kDeepestFall = 0.7;              // of the rate, whatever was delivered
  // A step upwards while there is no queue; the longer there was none, the larger: every kPatience intervals by
  // as much again.
  static constexpr double kGrowth = 0.001;
  static constexpr int kPatience = 20;
  static constexpr double kFastestGrowth = 0.01;
  // Until the first queue, where limiting began before the link had been full for kFull intervals: its rate is not
  // known yet.
  static constexpr double kProbe = 0.05;
  static constexpr int kFull = 4;
  // Back to what it delivered before, after a queue that was somebody's CPU: up to kKnown of that.
  static constexpr double kRegain = 0.05;
  static constexpr double kKnown = 0.95;
  // Nor does it grow beyond this many times what was ever delivered, where the push has less to send than it may.
  static constexpr double kHighest = 2;
  // A rate that was right a moment ago does not make a queue at once. When much less than that arrives, somebody
  // did not get a CPU, or the link became slower. Of the two only the second has a queue that does not go away, so the
  // rate stays until there has been one for kLongestStall; what waits drains meanwhile.
  static constexpr double kStall = 0.9;
  static constexpr std::chrono::milliseconds kLongestStall{250};
  // Of the rate at which limiting began, which was a full link's. Below it only a link that became slower
  // explains a queue, and that is learned in steps of kForget.
  static constexpr double kLowest = 0.5;
  static constexpr double kForget = 0.9;

  struct Sample {
    TimePoint at;
    std::uint64_t delivered_bytes = 0;  // acknowledged so far, answers to faults included
    std::uint64_t queued_bytes = 0;     // on their way and not acknowledged
    std::uint64_t unsent_bytes = 0;     // handed over, and still held back by TCP's own window or pacing
    std::chrono::microseconds min_rtt{0};
    // Of the queued ones these may have been handed over just now: the chunks in hand.
    std::uint64_t fresh_bytes = 0;
  };
  // Takes a sample every kInterval, also while not in use: the first rate is the one measured last.
  void sample(const Sample& sample);
  // Starts to limit: just below what was delivered last. No effect while limiting.
  void start(TimePoint now);
  // Whether more was handed over than the link took: only then what it delivered says what it can.
  [[nodiscard]] bool saturated() const;
  void stop() { rate_ = 0; }
  [[nodiscard]] bool limiting() const { return rate_ > 0; }
  [[nodiscard]] double rate() const { return rate_; }
  // Until then nothing is pushed: what was handed over drains.
  [[nodiscard]] TimePoint drained_at() const { return drained_at_; }

 private:
  // How long `bytes` take, beyond those that fill the round trip of an idle link.
  [[nodiscard]] static Duration beyond_round_trip(std::uint64_t bytes, const Sample& sample, double rate);

  std::optional<Sample> last_;
  double delivered_rate_ = 0;  // smoothed over some intervals
  double newest_rate_ = 0;     // of the last interval
  double steady_rate_ = 0;  // of all intervals, smoothed for longer: what catches up after a stall is no rate
  double known_rate_ = 0;   // the most that was delivered while limiting, less with every queue
  int full_intervals_ = 0;  // before limiting
  bool probing_ = false;
  double rate_ = 0;
  double lowest_ = 0;
  int without_queue_ = 0;                 // intervals
  std::optional<TimePoint> queue_since_;  // and it has not been empty since
  TimePoint drained_at_{};
  bool skip_next_ = false;  // the interval after a fall was partly a pause
};

class Pacer {
 public:
  static constexpr std::chrono::milliseconds kFaultsAreRecent{100};
  static constexpr std::uint64_t kChunkOnLink = 16 * 1024;

  // `chunk_on_link`: the largest piece that may go at once over a link while faults are being answered.
  explicit Pacer(std::uint64_t chunk_on_link = kChunkOnLink) : chunk_on_link_(chunk_on_link) {}

  // `same_host`: no link between the two ends. `data_fds` are sampled; they must stay open until the next call. So must
  // `other_fds`: what they deliver goes over the same link, and what waits on them may wait farther away.
  void attach(std::vector<int> data_fds, bool same_host, std::vector<int> other_fds = {});
  void detach() { attach({}, false); }
  void set_bandwidth(std::uint64_t bytes_per_second);

  // On one host the push and the faults compete for CPUs: whether a push thread should stand back now.
  [[nodiscard]] bool should_stand_back() const;
  // The largest chunk that may go in one piece now.
  [[nodiscard]] std::uint64_t chunk_bytes(std::uint64_t largest) const;
  // The same by the limit alone: a slow one goes in small steps, so that nobody waits long behind one chunk.
  [[nodiscard]] std::uint64_t limited_chunk_bytes(std::uint64_t largest) const;
  // Blocks until the next chunk may go. False once cancelled.
  bool wait_turn();
  void debit(std::uint64_t bytes);
  // For connections that another pacer steers: only the user's limit, which is over all of them. Ends early, with
  // false, when `over` says so, which is asked every few milliseconds; cancel() does not end it.
  bool wait_limit(const std::function<bool()>& over);
  void debit_limit(std::uint64_t bytes);
  // Ends every wait, also future ones, until reset().
  void cancel();
  void reset();

  // For the demand server: around the answer to a fault. Never blocks.
  void fault_begin();
  void fault_end(std::uint64_t answered_bytes);

 private:
  [[nodiscard]] bool faults_recent(TimePoint now) const;
  void take_sample(TimePoint now);
  void steer(TimePoint now);

  const std::uint64_t chunk_on_link_;
  mutable std::mutex mutex_;  // guards everything that is not atomic
  std::condition_variable changed_;
  std::vector<int> data_fds_;
  std::vector<int> other_fds_;
  bool cancelled_ = false;
  TokenBucket limit_;
  TokenBucket link_;
  RateController controller_;
  TimePoint sampled_at_{};

  std::atomic<bool> same_host_{false};
  std::atomic<std::uint64_t> bandwidth_{0};
  std::atomic<std::int64_t> last_fault_ns_{0};
  std::atomic<std::uint64_t> fault_bytes_{0};      // since the start
  std::atomic<std::uint64_t> undebited_bytes_{0};  // answers that the buckets have not seen yet
};

}  // namespace memferry::wire
