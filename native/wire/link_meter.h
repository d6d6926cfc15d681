// What a connection takes, as whoever writes to it sees it: over windows of some milliseconds, how much the receiver's
// host has acknowledged, and whether it was the connection that was waited for. What fits into a socket's buffer says
// nothing of a link, so bytes count when they are acknowledged.
//
// Threads: the sending one; shortest_round_trip() any.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

namespace memferry::wire {

// The way there and back of a connected TCP socket as its kernel has measured it, at its shortest: without what stands
// in a queue. None of another kind of socket, or of one that is cut.
[[nodiscard]] std::optional<std::chrono::microseconds> shortest_round_trip(int connected_fd);

class LinkMeter {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kWindow{20};

  struct Window {
    double link_rate = 0;  // bytes/s that were acknowledged
    double raw_rate = 0;   // of pages, before they were encoded, that were handed over
    bool full = false;     // the connection was waited for
  };
  // Bytes have been handed to the socket. Gives a window when one ends here.
  std::optional<Window> sent(int fd, std::uint64_t raw_bytes, Clock::time_point now);
  // The sender was held up by a limit, or by what the receiver had in hand.
  void waited(Clock::duration duration) { waited_ += duration; }
  // There is nothing to send for a while: the window under way is void.
  void rest() { running_ = false; }

 private:
  bool running_ = false;
  Clock::time_point began_{};
  Clock::duration waited_{};
  std::uint64_t acknowledged_ = 0;  // when it began
  std::uint64_t raw_ = 0;
};

}  // namespace memferry::wire
