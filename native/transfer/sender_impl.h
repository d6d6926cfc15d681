// The inside of Sender, shared by the files that implement it:
//   sender_setup.cc  what it is made of
//   sender.cc        the owner's calls, and what a round, a discard and a switchover consist of
//   supervisor.cc    the one thread that decides: events in order, cuts, deadlines, the end
//   reconnect.cc     dialling a set of connections, and the bitmap that follows a redial
//   data_channel.cc  the loops of the data channels: sending, and reading what the destination answers
//   demand_server.cc the loop that answers faults
//   compare_base.cc  what comes before the first round where the destination has a base
//
// Threads: the supervisor lives as long as the sender. Each set of connections (an epoch) has two threads a
// data channel and one for the demand channel; the supervisor starts them and joins them, nobody else.
// `mutex` guards what is marked so; the demand server never takes it while it answers a fault.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "os/unique_fd.h"
#include "os/worker_thread.h"
#include "transfer/chunk_gatherer.h"
#include "transfer/delta_cache.h"
#include "transfer/page_encoder.h"
#include "transfer/page_referrer.h"
#include "transfer/scatter.h"
#include "transfer/send_pages.h"
#include "transfer/send_queue.h"
#include "transfer/sender.h"
#include "transfer/touch_gate.h"
#include "wire/pacer.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry {

struct Sender::Impl {
  using Clock = std::chrono::steady_clock;

  explicit Impl(SenderConfig config);
  ~Impl();

  // What the data channels do between two barriers.
  enum class TaskKind {
    kNone,
    kRound,    // every channel: what is pending, then a barrier
    kDiscard,  // channel 0: the list of discards (or other frames), then a barrier
    kCompare,  // channel 0: hashes are compared with the destination's base, then a barrier
    kSwitch,   // channel 0: the list of discards and kSwitch
    kPush,     // every channel and the demand channel: what is pending, then a barrier
  };
  struct Task {
    TaskKind kind = TaskKind::kNone;
    std::uint64_t generation = 0;
    std::uint64_t tag = 0;
    std::shared_ptr<const std::vector<std::byte>> frames;  // kDiscard, kSwitch: sent as they are
    std::uint64_t most_nodes = 0;                          // kCompare
    CompareDepth depth = CompareDepth::kAll;               // likewise
    bool references = true;                                // kRound, kPush
  };

  enum class Phase {
    kIdle,
    kConnecting,
    kRounds,     // connected, the guest runs here
    kSwitching,  // switch_over() called, not acknowledged
    kPostcopy,   // acknowledged
    kEnded,      // failed or closed
  };

  struct DataChannel {
    explicit DataChannel(unsigned i) : index(i) {}
    const unsigned index;
    std::shared_ptr<wire::Stream> stream;
    WorkerThread sender;
    WorkerThread reader;
    std::shared_ptr<Scatter::Way> way;  // of a scatter
    bool barrier_sent = false;          // guarded by mutex, as the next
    bool acknowledged = false;
    std::uint64_t suspects_named = 0;  // in this round
    std::uint64_t taken = 0;           // bytes, by the destination as it says
  };
  // One set of connections. Made and destroyed by the supervisor; others reach it under `mutex`, or from its
  // own threads.
  struct Epoch {
    std::uint32_t number = 0;
    std::vector<std::unique_ptr<DataChannel>> data;
    std::unique_ptr<wire::Stream> demand;
    WorkerThread demand_server;
    std::shared_ptr<Scatter::Way> demand_way;        // of a scatter
    std::optional<Clock::time_point> answers_since;  // the demand thread's own: a batch of answers is open
    // Guards writing to `demand` AND the time from taking a page out of the queue to its being written: a
    // barrier on the demand channel must not overtake a page that was taken before it.
    std::mutex demand_write;
    bool demand_barrier_sent = false;  // guarded by mutex, as the next
    bool demand_acknowledged = false;
    std::atomic<bool> cut{false};      // every thread ends
    std::atomic<bool> leaving{false};  // data senders finish their chunk, say goodbye and end
    unsigned still_sending = 0;        // guarded by mutex: data senders that have not ended

    void shutdown();  // all streams
    void join();      // all threads; after shutdown
  };

  // sender_setup.cc
  std::unique_ptr<Scatter> make_scatter();
  // sender.cc
  void scatter_drained();
  std::uint64_t collect_dirty();
  // The eviction's barrier: outside the numbers that rounds use.
  static constexpr std::uint64_t kPushTag = 1ULL << 63;
  using Frames = std::shared_ptr<const std::vector<std::byte>>;
  Frames discard_frames(bool then_switch);
  static Frames switch_frame();
  void start_task_locked(TaskKind kind, std::uint64_t tag, Frames frames, bool with_references = true);
  void require_between_rounds(const char* operation) const;  // takes mutex; throws std::logic_error
  void say_goodbye();
  // compare_base.cc
  void start_before_rounds(TaskKind kind, std::uint64_t tag, Frames frames, const char* operation,
                           std::uint64_t most_nodes = 0, CompareDepth depth = CompareDepth::kAll);
  bool compare_on(Epoch& of, const Task& mine, const std::function<bool(std::span<const std::byte>)>& say);
  void note_memory(std::uint64_t bytes);

  // supervisor.cc
  void supervise();
  void supervise_until_closing(std::unique_lock<std::mutex>& lock);
  void connect_first(std::unique_lock<std::mutex>& lock);
  void recover(std::unique_lock<std::mutex>& lock);
  void end_epoch(std::unique_lock<std::mutex>& lock);
  void fail_locked(std::string code, std::string message);
  void post_locked(EngineEvent event);
  void finish_if_acknowledged_locked(Epoch& of);
  bool try_barrier_on_demand(std::unique_lock<std::mutex>& lock);
  void deliver_events(std::unique_lock<std::mutex>& lock);
  // For an epoch's threads: their connection is no more, or the peer broke the rules. The first one counts.
  void report_cut(Epoch& of, std::string why);
  void report_violation(Epoch& of, std::string why);
  void report_broken(Epoch& of, std::string why);  // this side cannot go on: kFailed SYSTEM
  void cut_locked(Epoch& of, std::string why);
  void violation_locked(Epoch& of, std::string why);
  void region_gone();  // from Region::retire()

  // reconnect.cc
  struct DialOutcome {
    enum class Kind { kUp, kRefused, kUnreachable, kCancelled };
    Kind kind = Kind::kUnreachable;
    bool token_used = false;  // the epoch's tokens cannot be used again
    std::string why;
  };
  DialOutcome dial_all(Epoch& of, Clock::time_point deadline);
  // The peer's bitmaps into the queue. Gives what the peer did wrong, if anything; `cut` why it did not end.
  std::string exchange_bitmap(Epoch& of, Clock::time_point deadline, std::string& cut);
  void start_threads(const std::shared_ptr<Epoch>& started);  // with the mutex held

  // data_channel.cc
  class Push;  // what one sending thread needs to send chunks
  void send_loop(Epoch& of, DataChannel& channel);
  void scatter_on(Epoch& of, DataChannel& channel);
  bool send_barrier(Epoch& of, DataChannel& channel, const Task& mine);
  void read_loop(Epoch& of, DataChannel& channel);
  // Reads one frame of the destination's; false when the connection ended or was broken off.
  bool receive_frame(Epoch& of, wire::Stream& stream, wire::FrameHeader& header,
                     std::vector<std::byte>& payload);
  // Empty, or what the destination did wrong.
  std::string handle_answer(Epoch& of, DataChannel& channel, const wire::FrameHeader& header,
                            std::span<const std::byte> payload);
  [[nodiscard]] bool scattering_locked() const {
    return scatter && task.kind != TaskKind::kDiscard && task.kind != TaskKind::kCompare &&
           task.kind != TaskKind::kSwitch;
  }
  std::string note_suspects_locked(DataChannel& channel, const wire::FrameHeader& header,
                                   std::span<const std::byte> payload);
  void await_answer_locked();
  std::string note_taken_locked(DataChannel& channel, std::uint64_t bytes);
  std::string note_unresolved_locked(DataChannel& channel, const wire::FrameHeader& header,
                                     std::span<const std::byte> names);
  void count_sent(const PageFrames::Sent& sent);
  [[nodiscard]] std::vector<PageFrames::OnHash> tracker_sinks() const;

  // demand_server.cc
  void serve_demand(Epoch& of);
  bool elsewhere(Epoch& of, std::uint32_t region, PageNumber page, wire::IoResult& result);
  std::string answer_fault(Epoch& of, const wire::FrameHeader& request, PageFrames& frames);
  wire::IoResult send_answers_barrier(Epoch& of);
  bool settle_answers(Epoch& of);

  [[nodiscard]] std::optional<wire::Token> token(std::uint32_t of_epoch, unsigned channel) const;

  SenderConfig config;  // as given; close() lets go of the trackers, under collect_mutex
  const wire::SocketAddress address;
  SendQueue queue;
  const std::uint64_t page_size;  // of every region
  wire::EncodingCounters compression;
  wire::EncodingCounters deltas;
  const std::unique_ptr<DeltaCache> delta_cache;  // where rounds send deltas
  const Encoding encoding;
  const std::unique_ptr<References> references;  // where they were agreed on
  // Suspects named in the current round; they become pending at its end, when nobody takes any more.
  std::vector<std::unique_ptr<AtomicBitmap>> suspects;
  std::vector<std::unique_ptr<Region::User>> users;  // the supervisor's, and close()'s after it
  TouchGate gate;
  wire::Pacer pacer;
  std::mutex collect_mutex;          // one thread at a time calls the trackers and contents
  std::optional<Contents> contents;  // guarded by collect_mutex

  mutable std::mutex mutex;
  std::condition_variable work_changed;        // for the data channels: a new task, or the end
  std::condition_variable supervisor_changed;  // for the supervisor
  // All of this is guarded by mutex.
  Phase phase = Phase::kIdle;
  Task task;
  std::shared_ptr<Epoch> epoch;
  std::uint32_t next_epoch = 0;
  // How much the destination lacked when it was dialled again, and how often in turn that was the same.
  std::uint64_t lacked_before = 0;
  unsigned barren_epochs = 0;
  bool connect_wanted = false;
  bool push_wanted = false;
  bool rounds_begun = false;
  bool switch_acknowledged = false;
  bool evicted = false;
  bool demand_barrier_due = false;
  bool unresolved = false;  // pages were queued again in this task
  bool closing = false;
  bool goodbye = false;
  bool gone = false;
  std::string cut_reason;  // not empty: the epoch is cut and the supervisor has not dealt with it
  unsigned violations = 0;
  struct Failure {
    std::string code;
    std::string message;
  };
  std::optional<Failure> fatal;
  std::optional<Clock::time_point> answer_deadline;  // a barrier or kSwitch waits for its answer
  Clock::time_point answer_limit{};                  // however much it gets on
  std::deque<EngineEvent> events;

  const UniqueFd cancel;  // readable once everything is to end; never drained
  // kSwitch was acknowledged: faults may be answered. Not earlier, or an answer could arrive before the
  // discard that is meant for the page's former copy. (Test: AFaultBeforeTheSwitchoverWaitsForIt.)
  std::atomic<bool> serving_faults{false};

  std::atomic<std::uint64_t> bytes_on_wire{0};
  std::atomic<std::uint64_t> pages_sent{0};
  std::atomic<std::uint64_t> pages_zero{0};
  std::atomic<std::uint64_t> pages_resent{0};
  std::atomic<std::uint64_t> faults_served{0};
  std::atomic<std::uint64_t> redials{0};
  std::atomic<std::uint64_t> peak_memory{0};

  std::unique_ptr<Scatter> scatter;            // where there are servers
  std::unique_ptr<BaseComparison> comparison;  // where the destination has a base
  std::mutex close_mutex;                      // one close() at a time; the second waits for the first
  WorkerThread supervisor;
};

}  // namespace memferry
