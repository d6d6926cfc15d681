// One guest on its way in, as the destination sees it: the receiver's engine takes its pages, the commit's state machine
// says what READY, GRANT and a lost connection mean, this file carries it out. src/destination/arrival.ts in C++.
//
// Threads: one of its own (mf-arrival) for all of it, another one (mf-prepare) for the guest's prepare(). What is public
// may be called from any; nothing here is needed for a page fault to be served.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "control/arrival_images.h"
#include "control/channel.h"
#include "control/commit_destination.h"
#include "control/guest.h"
#include "control/messages.h"
#include "os/worker_thread.h"
#include "transfer/listener.h"
#include "transfer/receiver.h"

namespace memferry::control {

struct DestinationOptions {
  Bytes secret;
  std::uint64_t max_bytes = 64ULL << 30U;  // of the memory of all guests that are on their way in
  std::uint64_t max_state_bytes = 64ULL << 20U;
  unsigned max_migrations = 16;
  std::uint64_t bandwidth = 0;  // bytes/s taken in by each, 0: no limit
  std::uint64_t gather_limit =
      0;                   // bytes/s that each fetches from VMD servers ahead of the guest, 0: no limit
  bool plaintext = false;  // VMD servers beyond loopback
  std::chrono::milliseconds connect_timeout{5000};  // of each VMD server
  std::chrono::milliseconds prepare_timeout{10000};
  std::chrono::milliseconds grant_timeout{20000};
  std::chrono::milliseconds recover_timeout{60000};
  std::chrono::milliseconds peer_timeout{10000};
};

class Arrival {
 public:
  using Clock = std::chrono::steady_clock;
  struct Config {
    Offer offer;
    Key session{};
    std::shared_ptr<Channel> link;
    Listener* listener = nullptr;  // outlives this
    DestinationOptions options;
    // From the arrival's thread. Throws why not, which is what the source is told.
    std::function<std::unique_ptr<ArrivingGuest>(const Offer&)> accept;
    // From the arrival's thread, before the guest grows by so many bytes. Throws where there is no room for them.
    std::function<void(std::uint64_t more)> grows;
    // The commit has an outcome: remember it. Before anything comes of it.
    std::function<void(const DestinationState&)> decided;
    // Nothing is left; the thread is about to end.
    std::function<void()> ended;
  };

  explicit Arrival(Config config);
  ~Arrival();  // join()
  Arrival(const Arrival&) = delete;
  Arrival& operator=(const Arrival&) = delete;

  [[nodiscard]] const Offer& offer() const { return config_.offer; }
  [[nodiscard]] const Key& session() const { return config_.session; }
  // The link has something to take, or has ended.
  void wake();
  // A new control connection from the same source, which has proved that it is.
  void attach(std::shared_ptr<Channel> link);
  // Before the commit: the migration fails and the guest runs on at the source. After it: missing pages are lost.
  void close();
  // Waits for the thread, which ends after ended(). One caller at a time, none from that thread.
  void join() { thread_.stop(); }
  // For a prepare() that takes long: nobody waits for it any more.
  [[nodiscard]] bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }
  // It has an outcome and takes no connection any more, though VMD servers may still be told to let go.
  [[nodiscard]] bool over() const { return over_.load(std::memory_order_acquire); }
  [[nodiscard]] ReceiverStats stats() const;
  void set_bandwidth(std::uint64_t bytes_per_second);

 private:
  struct Event {
    enum class Kind : std::uint8_t { kEngine, kPrepareEnded, kDigests, kAttach, kClose };
    Kind kind = Kind::kClose;
    EngineEvent engine{};
    std::optional<Cause> cause{};
    std::shared_ptr<Channel> link{};
    ArrivalImages::Digests digests{};
  };
  enum class Preparing : std::uint8_t { kNot, kAwaitsSwitch, kAwaitsPages, kRuns, kEnded };
  [[nodiscard]] static double ms_since(Clock::time_point start) {
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  }

  void run();
  [[nodiscard]] bool accepted();
  [[nodiscard]] std::unique_ptr<ArrivalImages> open_images();
  void make_receiver();
  void post(Event event);
  void handle(Event& event);
  void on_engine(const EngineEvent& event);
  void read_link();
  void on_message(const Json& message, std::optional<Bytes> binary);
  void detached();
  // The source is away and nothing more comes: kept for a while, in case that it comes back.
  void linger();
  void look_at_clock();
  [[nodiscard]] Clock::time_point next_deadline() const;

  void dispatch(DestinationEvent event);
  void carry_out(const DestinationAction& action);
  void begin_prepare();
  void run_prepare();
  void prepare_ended(const std::optional<Cause>& cause);
  void resume();
  void abandon();
  void abandon_guest();
  void every_page();
  void tell_complete();
  void grow(std::uint32_t region, std::uint64_t length_bytes);
  void nothing_more_comes();
  void summarise();
  [[nodiscard]] std::vector<std::uint32_t> mismatched(const std::optional<std::vector<std::string>>& digests);
  void conclude(const std::vector<std::uint32_t>& regions);
  void finish();
  void fail(const Cause& cause);
  void reject(const Cause& cause);
  void lost(const EngineEvent& event);
  void end();
  void tell(const Json& message) noexcept;
  [[nodiscard]] bool has_resumed() const { return commit_.phase == DestinationPhase::kResumed; }

  Config config_;
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> closing_{false};       // close() was called
  std::atomic<bool> running_here_{false};  // written by the thread, as the next
  std::atomic<bool> over_{false};

  mutable std::mutex mutex_;  // guards the four below
  std::condition_variable changed_;
  std::deque<Event> events_;
  bool woken_ = false;
  std::shared_ptr<Receiver> receiver_;  // written once

  // The thread's own.
  std::shared_ptr<Channel> link_;
  std::unique_ptr<ArrivingGuest> guest_;
  DestinationState commit_;
  std::deque<DestinationEvent> turns_;
  bool in_turn_ = false;
  std::optional<Bytes> state_;
  bool awaits_switch_ = false;
  bool switched_ = false;
  Preparing preparing_ = Preparing::kNot;
  Clock::time_point prepare_began_;
  std::optional<Clock::time_point> prepare_until_;
  std::optional<Clock::time_point> grant_until_;
  std::optional<Clock::time_point> linger_until_;
  Clock::time_point resumed_at_;
  double prepare_ms_ = 0;
  double gather_ms_ = 0;
  bool abandoning_ = false;
  bool every_page_ = false;
  bool told_complete_ = false;
  bool at_rest_ = false;  // what is here is all that ever comes
  bool evicted_ = false;
  Json lost_ = Json::array();  // as they were told
  std::optional<std::vector<std::string>> digests_;
  bool verified_ = false;
  bool settled_ = false;  // complete() or failed() was called
  std::optional<Cause> error_;

  std::unique_ptr<ArrivalImages> images_;  // scatter modes
  WorkerThread prepare_;
  WorkerThread thread_;
};

}  // namespace memferry::control
