// Replicas: what a scatter connection passes on to other servers, and when its source may be told that everything is
// held twice.
//
// A scatter connection has one connection of its own to each server that holds replicas of its pages, dialled when
// the first such page comes. Frames and barriers go down it in order. Answers (ScatterAnswers) go up to the source
// whole and in order: a barrier's when all the connections that were there at the time have answered it. A connection's
// first words say whose pages it brings, so that what is still on its way when its source has gone another way can be
// told from what is newer (Image::end_chain).
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "os/worker_thread.h"
#include "stage/image.h"
#include "stage/stage.h"
#include "wire/frame.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry {

// Where the other servers of an image are. Threads: any.
class ChainTargets {
 public:
  struct Target {
    wire::SocketAddress address;
    std::uint32_t attempt = 0;
    wire::Token token{};
  };
  // Throws std::invalid_argument (address). Attempts count on when a server is set anew: they only ever go up.
  void set(std::uint8_t ordinal, const std::string& host, std::uint16_t port,
           std::vector<wire::Token> tokens);
  // For one dial. nullopt when nobody has said where it is, or when its tokens are used up.
  std::optional<Target> next(std::uint8_t ordinal);

 private:
  struct Known {
    wire::SocketAddress address;
    std::vector<wire::Token> tokens;
    std::uint32_t next_attempt = 0;
  };
  std::mutex mutex_;  // guards known_
  std::map<std::uint8_t, Known> known_;
};

// What goes up to whoever writes pages. Threads: any; a frame is written with the mutex held, so that frames stay
// whole and barriers are answered in their order.
class ScatterAnswers {
 public:
  // A source waits for a few barriers at a time.
  static constexpr std::size_t kMostBarriers = 256;
  using Send = std::function<bool(const wire::FrameHeader&)>;
  explicit ScatterAnswers(Send send) : send_(std::move(send)) {}

  // All give false when the connection is over.
  // `ordinal`: of the server that has not stored them.
  // `why`: 0 (no room), kFlagTorn or kFlagReference.
  bool refused(std::uint32_t region, PageRun run, std::uint8_t ordinal, std::uint16_t why);
  // Everything before it is here; `waiting` are the servers that have yet to say so.
  bool barrier(std::uint64_t tag, std::vector<std::uint8_t> waiting);
  // False as well when that server was not asked this.
  bool chain_acknowledged(std::uint8_t ordinal, std::uint64_t tag);
  // Whether that server owes an answer to a barrier of before `since`.
  [[nodiscard]] bool owed_since(std::uint8_t ordinal, std::chrono::steady_clock::time_point since);
  // So much more has come in here, or has at a server that replicas are passed on to; 0: it waits for its turn. Told
  // every wire::kTellWork, so that nobody takes what is slow for dead.
  bool worked(std::uint64_t bytes);
  // Nothing goes up after it.
  void chain_broken(std::uint8_t ordinal);

 private:
  struct Barrier {
    std::uint64_t tag;
    std::vector<std::uint8_t> waiting;
    std::chrono::steady_clock::time_point asked;
  };
  bool send_locked(wire::FrameHeader header);
  bool answer_barriers_locked();

  const Send send_;
  std::mutex mutex_;  // guards the rest, and keeps frames whole
  std::deque<Barrier> barriers_;
  bool over_ = false;
  std::uint64_t worked_ = 0;
  std::chrono::steady_clock::time_point told_ = std::chrono::steady_clock::now();
};

// StageConfig's.
struct ChainTimeouts {
  std::chrono::milliseconds dial{StageConfig{}.chain_dial_timeout_ms};
  std::chrono::milliseconds answer{StageConfig{}.chain_timeout_ms};
};

// The connections to other servers of one scatter connection. Threads: interrupt() any; the rest the one that serves
// the scatter connection.
class ReplicaChains {
 public:
  static constexpr std::size_t kMostChains = 32;

  // `epoch`: of the scatter connection. `self`: the serving thread, whose stop cancels a dial. `on_broken` ends the
  // scatter connection, from any thread.
  ReplicaChains(std::shared_ptr<Image> image, std::uint32_t epoch, std::shared_ptr<ChainTargets> targets,
                ScatterAnswers& answers, WorkerThread& self, std::function<void()> on_broken,
                ChainTimeouts timeouts = {});
  ~ReplicaChains() { close(); }
  ReplicaChains(const ReplicaChains&) = delete;
  ReplicaChains& operator=(const ReplicaChains&) = delete;

  // False when the chain is broken: the source has been told. Dials when there is no connection yet.
  bool forward(std::uint8_t ordinal, std::span<iovec> buffers);
  // To every server that has been sent anything, before whatever comes after it; those that are dialled later hear
  // of it first of all. False when one of them is broken.
  bool over(Image::Chain chain);
  // Asks every server that has been sent anything, and answers once they all have.
  bool barrier(const wire::FrameHeader& header);
  void goodbye();
  void interrupt();
  // Joins the threads that read answers.
  void close();

 private:
  using Clock = std::chrono::steady_clock;
  struct Link {
    explicit Link(std::unique_ptr<wire::Stream> stream_in) : stream(std::move(stream_in)) {}
    std::unique_ptr<wire::Stream> stream;
    std::atomic<Clock::rep> sending_since{0};  // 0: not in the socket
    std::atomic<std::uint64_t> forwarded{0};   // bytes, ever
    // The answers' thread's own:
    std::uint64_t worked = 0;
    Clock::time_point grew_at = Clock::now();
    Clock::time_point heard_at = Clock::now();
    WorkerThread answers;
  };
  bool send(Link& link, std::span<iovec> buffers);
  bool send(Link& link, const wire::FrameHeader& header);
  Link* link(std::uint8_t ordinal);
  bool introduce(wire::Stream& stream);
  std::unique_ptr<wire::Stream> dial(std::uint8_t ordinal);
  void read_answers(std::uint8_t ordinal, Link& link);
  bool answered(std::uint8_t ordinal, Link& link, const wire::FrameHeader& header);
  // As of `now`: it owes something, or takes nothing, and has not said for so long that it is at it; or only said so for
  // far longer.
  [[nodiscard]] bool silent(std::uint8_t ordinal, const Link& link, Clock::time_point now) const;
  bool broken(std::uint8_t ordinal);

  const std::shared_ptr<Image> image_;
  const std::uint32_t epoch_;
  const std::shared_ptr<ChainTargets> targets_;
  ScatterAnswers& answers_;
  WorkerThread& self_;
  const std::function<void()> on_broken_;
  const ChainTimeouts timeouts_;
  std::atomic<bool> closing_{false};
  std::mutex mutex_;  // guards links_ against interrupt(); only the serving thread changes it
  std::map<std::uint8_t, std::unique_ptr<Link>> links_;
};

}  // namespace memferry
