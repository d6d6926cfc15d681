// The inside of Scatter, shared by scatter.cc (its life) and scatter_way.cc, scatter_settle.cc, scatter_watch.cc and
// scatter_server.cc (one part each).
#pragma once

#include <bitset>
#include <map>
#include <optional>

#include "transfer/scatter.h"

namespace memferry {

class Scatter::Way {
 public:
  static constexpr int kNobody = -1;

  std::string name;         // for errors
  int server = kNobody;     // ordinal, or a way to the destination
  int listener = kNobody;   // whom it tells where pages are
  std::uint32_t epoch = 0;  // to a server: of its hello
  bool demand = false;
  std::shared_ptr<wire::Stream> stream;
  std::atomic<Clock::rep> sending_since{0};  // 0: not in the socket
  std::atomic<bool> pacing{false};        // its thread waits for the pacer: it has what it can take for now
  std::unique_ptr<ChunkGatherer> chunks;  // the sending thread's own
  // Guarded by Scatter::mutex_:
  Lane lane;
  std::bitset<256> replicas;  // by ordinal: servers that it was ever to pass something on to
  std::map<std::uint8_t, std::uint32_t> told_over;  // of Scatter::chains_over_, what went out on it
  bool open = true;
  bool stalled = false;  // does not acknowledge: gets nothing until it does
  bool in_hand = false;  // its thread has taken something that is not in the lane yet
  // The watcher's own: since when it was seen to give no sign, and how much of that time this process ran.
  std::optional<Clock::time_point> silent_since;
  Clock::duration silent_for{};
  [[nodiscard]] bool idle() const { return !in_hand && lane.idle(); }
};

struct Scatter::Server {
  explicit Server(const StageServer& a) : address(a) {}
  const StageServer& address;
  std::uint8_t ordinal = 0;
  std::uint32_t attempt = 0;  // the thread's own
  WorkerThread thread;
  // Guarded by Scatter::mutex_:
  std::shared_ptr<Way> way;  // while connected
  bool tried = false;        // the first dial is over, either way
  bool full = false;         // has no room: gets no pages any more
  std::string failed;
  std::uint64_t bytes = 0;
  std::size_t torn = 0;                      // frames, since nothing writes the pages any more
  std::optional<std::uint8_t> broken_chain;  // said on the connection that is ending
};

}  // namespace memferry
