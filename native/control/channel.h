// A control connection from its first byte behind the preface to its last: the handshake, then messages that are checked
// on arrival, some with a binary part. Its own thread does all that the socket needs; the owner's threads send and take.
//
// Bounds: messages received and not yet taken (then reading stops, and TCP holds the peer back), messages waiting to be
// sent, a peer that says nothing, a peer that takes nothing. Both sides say PING once a second without being asked.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#include "control/control_frame.h"
#include "control/failure.h"
#include "control/handshake.h"
#include "control/json.h"
#include "os/unique_fd.h"
#include "os/worker_thread.h"

namespace memferry::control {

class Channel {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::size_t kMaxInbox = 64;
  static constexpr std::size_t kMaxOutbox = 256;

  struct Options {
    Role role = Role::kAcceptor;
    Bytes secret;
    std::uint64_t max_binary_bytes = 64ULL << 20U;
    std::chrono::milliseconds peer_timeout{10000};
    std::chrono::milliseconds stall_timeout{30000};
    // Throws Failure for a message that is not allowed; with its binary part's length, where one was announced.
    std::function<void(const Json&, std::optional<std::uint64_t> binary_bytes)> check;
    // True: the message is not kept for take(). From the channel's thread. May be empty.
    std::function<bool(const Json&)> unheard;
    // Something to take, the handshake is over, or the end. From the channel's thread, with no lock held; must not
    // block.
    std::function<void()> changed;
  };
  struct Received {
    Json message;
    std::optional<Bytes> binary;
  };

  // `fd`: connected. For the dialler nothing was said yet; for the acceptor the preface was read. Throws SystemError.
  Channel(UniqueFd fd, Options options);
  ~Channel();  // destroy(), and waits for the thread
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // The session's key once the peer has proved itself.
  [[nodiscard]] std::optional<Key> session() const;
  [[nodiscard]] std::optional<Received> take();
  // False when it cannot be sent any more, or too much waits already. `binary` comes behind it.
  bool send(const Json& message, std::shared_ptr<const Bytes> binary = nullptr);
  // Says goodbye after what was sent before. Does not wait: over() says when the connection is gone, seconds later at
  // most.
  void close();
  void destroy();
  // Nothing more can be received or sent, and why: an empty code when one side said goodbye and nothing was wrong. What
  // came before can still be taken.
  [[nodiscard]] std::optional<Cause> ended() const;
  // The thread has nothing left to do.
  [[nodiscard]] bool over() const { return over_.load(std::memory_order_acquire); }

 private:
  struct Outgoing {
    FrameKind kind = FrameKind::kJson;
    Bytes first;
    std::shared_ptr<const Bytes> binary;
    std::size_t offset = 0;
    bool begun = false;
  };
  void run(WorkerThread& self);
  void converse(WorkerThread& self);
  [[nodiscard]] bool serve_once(WorkerThread& self);
  void read_some();
  void parse();
  void on_frame(FrameKind kind, ByteSpan payload);
  void on_bye(ByteSpan payload);
  void deliver(Json message, std::optional<Bytes> binary);
  [[nodiscard]] bool full() const;
  void write_some();
  [[nodiscard]] bool next_frame();
  void tick(Clock::time_point now);
  void say_bye(const Cause& cause);
  void end(const Cause& cause);
  void leave();
  [[nodiscard]] bool closing_for_too_long(Clock::time_point now);

  const Options options_;
  UniqueFd fd_;
  std::atomic<bool> over_{false};
  std::atomic<bool> destroyed_{false};

  mutable std::mutex mutex_;  // guards the six below
  std::optional<Key> session_;
  std::deque<Received> inbox_;
  std::uint64_t inbox_bytes_ = 0;
  std::deque<Outgoing> outbox_;
  bool closing_ = false;
  std::optional<Cause> ended_;

  // The thread's own.
  std::optional<FrameAuthenticator> sealer_;
  std::optional<FrameAuthenticator> opener_;
  Bytes in_;
  std::size_t in_start_ = 0;
  Bytes wire_;
  std::size_t wire_start_ = 0;
  struct Assembling {
    Json message;
    Bytes binary;  // what has come of it
    std::size_t total = 0;
  };
  std::optional<Assembling> assembling_;
  bool said_bye_ = false;
  bool leaving_ = false;
  Clock::time_point leave_until_;
  Clock::time_point last_tick_;
  Clock::time_point last_heard_;
  std::optional<Clock::time_point> blocked_since_;
  std::optional<Clock::time_point> close_by_;

  WorkerThread thread_;
};

}  // namespace memferry::control
