// TCP sockets: numeric addresses, dialling that can be cancelled and never takes longer than told, listening.
// No name is ever resolved here: a resolver blocks, and who may be dialled is decided in TypeScript.
//
// Threads: any; a dial blocks its caller.
#pragma once

#include <sys/socket.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "os/unique_fd.h"
#include "wire/stream.h"

namespace memferry::wire {

class SocketAddress {
 public:
  // A numeric IPv4 or IPv6 address ("::1", "fe80::1%eth0"). Throws std::invalid_argument.
  static SocketAddress parse(const std::string& host, std::uint16_t port);
  // The two ends of a connected socket. Throw SystemError.
  static SocketAddress local(int fd);
  static SocketAddress peer(int fd);

  [[nodiscard]] const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage_); }
  [[nodiscard]] socklen_t bytes() const { return bytes_; }
  [[nodiscard]] int family() const { return storage_.ss_family; }
  [[nodiscard]] std::uint16_t port() const;
  [[nodiscard]] bool loopback() const;
  [[nodiscard]] bool same_host(const SocketAddress& other) const;  // the port aside
  [[nodiscard]] std::string host() const;
  [[nodiscard]] std::string describe() const;  // "127.0.0.1:4000", "[::1]:4000"

 private:
  sockaddr_storage storage_{};
  socklen_t bytes_ = 0;
};

// Both ends on this machine: what limits the connection is CPU, not a link.
[[nodiscard]] bool is_same_host(int connected_fd);

// Settings of every data and demand connection: no delay for small frames, and a silent peer is noticed
// (kSilenceLimit without an acknowledged byte, whether data is in flight or not). The congestion control stays the
// system's, but within this machine: there the one that is common on servers, BBR, arms a timer for every few packets
// to pace what nothing limits but the CPU (a third of what bare sockets reach without). `fd` is connected; throws
// SystemError.
inline constexpr std::chrono::milliseconds kSilenceLimit{15000};
void configure_connection(int fd);
// A peer may take nothing for long although it is there. That one is gone is noticed as ever while nothing is on its way;
// else by who calls this.
void bear_with_full_window(int fd);

struct DialResult {
  enum class Kind { kConnected, kFailed, kTimedOut, kCancelled };
  Kind kind = Kind::kFailed;
  int error = 0;  // kFailed
  UniqueFd fd;    // kConnected: blocking, configured
};
// `cancel_fd` readable means stop (-1: cannot be cancelled); it is not drained. Throws SystemError when no
// socket can be made.
[[nodiscard]] DialResult dial(const SocketAddress& address, std::chrono::milliseconds timeout, int cancel_fd);

// A connection that has nothing to say yet: waits until it is readable. kConnected means readable (or ended).
[[nodiscard]] DialResult::Kind wait_readable(int fd, std::chrono::steady_clock::time_point deadline,
                                             int cancel_fd);

// For how long nothing has come, not even a part of a frame; zero while something is here that was not read yet.
// nullopt: it has ended.
[[nodiscard]] std::optional<std::chrono::milliseconds> silent_for(int fd);

// A listening socket, non-blocking, close-on-exec. Throws SystemError (socket, bind, listen).
[[nodiscard]] UniqueFd listen_on(const SocketAddress& address, int backlog = 512);

}  // namespace memferry::wire
