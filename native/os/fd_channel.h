// A unix stream socket that carries bytes and descriptors (SCM_RIGHTS) between processes of one machine, and says who
// the peer is. Everything is bounded: bytes, descriptors, connections, time. Descriptors that come and are not handed
// on are closed, whatever fails.
//
// Threads: a connection's receive() on one thread and send() on another at once; shut_down() from any. A listener's
// accept() on one thread.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "os/unique_fd.h"

namespace memferry {

// The most descriptors that the kernel puts into one message (SCM_MAX_FD).
inline constexpr std::size_t kMostDescriptors = 253;

// Who was at the other end when it connected (SO_PEERCRED).
struct SocketPeer {
  pid_t pid = 0;  // 0: in a pid namespace that this process does not see
  uid_t uid = 0;
  gid_t gid = 0;
  // Invalid when there is none to be had: the pid is not visible, or the process has ended (and `pid` may be another's
  // by now).
  UniqueFd pidfd;
};

// Of a connection that is somebody else's: the process that listens, or that connected. Throws SystemError.
[[nodiscard]] pid_t peer_pid(int fd);

enum class FdOutcome {
  kOk,
  kTimedOut,
  kCancelled,           // shut_down(), or `cancel_fd` became readable
  kTooManyDescriptors,  // all of them are closed; the bytes are lost
  kTruncated,           // control data that the kernel cut off: this process is out of descriptors
  kPeerGone,            // send(): the other end is closed
};
[[nodiscard]] const char* fd_outcome_name(FdOutcome outcome);

class FdConnection {
 public:
  explicit FdConnection(UniqueFd connected);
  // Throws SystemError: ENOENT, ECONNREFUSED, EACCES, ETIMEDOUT when the listener's queue stays full;
  // std::invalid_argument for a path that no socket can have.
  static FdConnection connect(const std::string& path, std::chrono::milliseconds timeout);

  struct Received {
    FdOutcome outcome = FdOutcome::kOk;
    std::vector<std::byte> bytes;  // empty: the peer has closed its end (with kOk)
    std::vector<UniqueFd> descriptors;
  };
  // What one recvmsg() gives: of a message that was sent in one piece all of it, unless it is larger than the socket's
  // buffer or than `most_bytes`. Descriptors come with the first byte of what they were sent with. Throws SystemError.
  Received receive(std::size_t most_bytes, std::size_t most_descriptors, std::chrono::milliseconds timeout);
  // The descriptors go with the first byte, so there must be one. Throws SystemError, std::invalid_argument.
  FdOutcome send(std::span<const std::byte> bytes, std::span<const int> descriptors,
                 std::chrono::milliseconds timeout);
  // Whoever is inside receive() or send() comes back with kCancelled. The peer sees the end.
  void shut_down();

  [[nodiscard]] const SocketPeer& peer() const { return peer_; }
  [[nodiscard]] int fd() const { return fd_.get(); }

 private:
  enum class Ready { kYes, kTimedOut, kCancelled };
  Ready wait(short events, std::chrono::steady_clock::time_point deadline) const;

  UniqueFd fd_;
  UniqueFd cancel_;  // an eventfd: readable for good once shut down
  SocketPeer peer_;
};

class FdListener {
 public:
  // Makes the socket's file, with at most the permissions `mode`. A file that a dead listener left is replaced; anything
  // else there is EADDRINUSE. Throws SystemError, std::invalid_argument (a path that is empty, too long, or has a NUL).
  FdListener(const std::string& path, mode_t mode);
  ~FdListener() { close(); }
  FdListener(const FdListener&) = delete;
  FdListener& operator=(const FdListener&) = delete;

  // One connection; invalid when `cancel_fd` became readable. Throws SystemError, for what concerns the listener
  // itself; a client that has gone before it was accepted is passed over.
  UniqueFd accept(int cancel_fd);
  // Lets the path go, if the file there is still ours. Twice is fine. Not while somebody is inside accept().
  void close();

 private:
  std::string path_;
  UniqueFd fd_;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

}  // namespace memferry
