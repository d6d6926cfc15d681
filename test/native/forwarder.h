// A network between two ends on loopback that has bad days: forwards every connection made to its port to one behind
// it, and on request goes silent, cuts everything, refuses everybody, or flips a bit.
//
// Threads: one that forwards; requests from any.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <list>
#include <mutex>
#include <thread>
#include <vector>

#include "os/unique_fd.h"
#include "wire/socket.h"

namespace memferry::test {

class Forwarder {
 public:
  enum Direction : std::size_t { kUp = 0, kDown = 1 };  // to the port behind, and back

  explicit Forwarder(std::uint16_t behind)
      : behind_(behind),
        wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        listening_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))),
        port_(wire::SocketAddress::local(listening_.get()).port()),
        thread_([this] { run(); }) {}
  ~Forwarder() {
    stopping_ = true;
    wake();
    thread_.join();
  }
  Forwarder(const Forwarder&) = delete;
  Forwarder& operator=(const Forwarder&) = delete;

  [[nodiscard]] std::uint16_t port() const { return port_; }
  // As when a cable is pulled: nothing gets through, nothing ends.
  void silence(bool now) {
    silent_ = now;
    wake();
  }
  // Once so many bytes have got through this way on one connection, and not one byte more.
  void silence_after(Direction direction, std::uint64_t bytes) { silent_after_[direction] = bytes; }
  [[nodiscard]] bool silent() const { return silent_; }
  // Every connection there is; new ones are welcome.
  void cut() {
    cut_ = true;
    wake();
    while (cut_ && !stopping_) std::this_thread::yield();
  }
  // Cuts everything, and nobody listens any more.
  void refuse() {
    {
      const std::lock_guard lock(mutex_);
      refusing_ = true;
    }
    cut();
  }
  // Listens again, for another port behind. False when its own port is taken by now.
  bool welcome(std::uint16_t behind) {
    const std::lock_guard lock(mutex_);
    try {
      next_listening_ = wire::listen_on(wire::SocketAddress::parse("127.0.0.1", port_));
    } catch (const std::exception&) {
      return false;
    }
    behind_ = behind;
    refusing_ = false;
    wake();
    return true;
  }
  // One bit of what comes next, once the hellos are through.
  void flip(Direction direction) { flips_[direction] = true; }
  // Whether it has happened.
  [[nodiscard]] bool flipped(Direction direction) const { return flipped_[direction]; }

 private:
  static constexpr std::size_t kPieceBytes = 128 * 1024;
  static constexpr std::uint64_t kHelloBytes = 256;

  struct Pipe {
    int from = -1;
    int to = -1;
    std::vector<std::byte> piece;
    std::size_t begin = 0;
    bool ended = false;   // nothing more is read
    bool passed = false;  // and the other end has been told so
    std::uint64_t bytes = 0;
  };
  struct Link {
    UniqueFd client;
    UniqueFd server;
    std::array<Pipe, 2> pipes;
  };

  void wake() const {
    const std::uint64_t one = 1;
    (void)!::write(wake_.get(), &one, sizeof one);
  }
  void run() {
    while (!stopping_) {
      obey();
      std::vector<pollfd> polled{{wake_.get(), POLLIN, 0}};
      const bool silent = silent_;
      if (!silent && listening_) polled.push_back({listening_.get(), POLLIN, 0});
      if (!silent) {
        for (const Link& link : links_) {
          for (const Pipe& pipe : link.pipes) {
            if (pipe.begin < pipe.piece.size()) {
              polled.push_back({pipe.to, POLLOUT, 0});
            } else if (!pipe.ended) {
              polled.push_back({pipe.from, POLLIN, 0});
            }
          }
        }
      }
      ::poll(polled.data(), polled.size(), -1);
      std::uint64_t count = 0;
      (void)!::read(wake_.get(), &count, sizeof count);
      if (silent_ || stopping_ || cut_) continue;
      accept();
      links_.remove_if([this](Link& link) { return !forward(link); });
    }
    links_.clear();
  }
  void obey() {
    const std::lock_guard lock(mutex_);
    if (cut_.exchange(false)) {
      // With a reset, as from a host that is gone; what was on its way is lost.
      const linger hard{1, 0};
      for (const Link& link : links_) {
        ::setsockopt(link.client.get(), SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
        ::setsockopt(link.server.get(), SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
      }
      links_.clear();
    }
    if (refusing_) listening_.reset();
    if (next_listening_) listening_ = std::move(next_listening_);
  }
  void accept() {
    while (listening_) {
      UniqueFd client(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!client) return;
      auto dialled =
          wire::dial(wire::SocketAddress::parse("127.0.0.1", behind_), std::chrono::milliseconds(1000), -1);
      if (dialled.kind != wire::DialResult::Kind::kConnected) continue;
      Link& link = links_.emplace_back();
      link.client = std::move(client);
      link.server = std::move(dialled.fd);
      link.pipes[kUp].from = link.pipes[kDown].to = link.client.get();
      link.pipes[kUp].to = link.pipes[kDown].from = link.server.get();
    }
  }
  // False when the connection is over.
  bool forward(Link& link) {
    for (std::size_t direction = 0; direction < link.pipes.size(); ++direction) {
      if (!forward(link.pipes[direction], direction)) return false;
    }
    return !(link.pipes[kUp].passed && link.pipes[kDown].passed);
  }
  bool forward(Pipe& pipe, std::size_t direction) {
    if (pipe.begin == pipe.piece.size() && !pipe.ended) {
      pipe.piece.resize(kPieceBytes);
      pipe.begin = 0;
      const ssize_t got = ::recv(pipe.from, pipe.piece.data(), pipe.piece.size(), MSG_DONTWAIT);
      pipe.piece.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
      if (got == 0) pipe.ended = true;
      if (got < 0 && errno != EAGAIN && errno != EINTR) return false;
      if (got > 0 && pipe.bytes >= kHelloBytes && flips_[direction].exchange(false)) {
        pipe.piece[static_cast<std::size_t>(got) / 2] ^= std::byte{0x10};
        flipped_[direction] = true;
      }
      if (got > 0) pipe.bytes += static_cast<std::uint64_t>(got);
      if (pipe.bytes > silent_after_[direction]) {
        const std::uint64_t kept = pipe.piece.size() - (pipe.bytes - silent_after_[direction]);
        (void)!::send(pipe.to, pipe.piece.data(), static_cast<std::size_t>(kept),
                      MSG_NOSIGNAL | MSG_DONTWAIT);
        pipe.begin = pipe.piece.size();
        silent_ = true;
      }
    }
    if (pipe.begin < pipe.piece.size()) {
      const ssize_t sent = ::send(pipe.to, pipe.piece.data() + pipe.begin, pipe.piece.size() - pipe.begin,
                                  MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent < 0 && errno != EAGAIN && errno != EINTR) return false;
      if (sent > 0) pipe.begin += static_cast<std::size_t>(sent);
    }
    if (pipe.ended && !pipe.passed && pipe.begin == pipe.piece.size()) {
      ::shutdown(pipe.to, SHUT_WR);
      pipe.passed = true;
    }
    return true;
  }

  std::atomic<std::uint16_t> behind_;
  const UniqueFd wake_;
  UniqueFd listening_;  // the thread's own
  const std::uint16_t port_;
  std::list<Link> links_;  // the thread's own
  std::atomic<bool> stopping_{false};
  std::atomic<bool> silent_{false};
  std::atomic<bool> cut_{false};
  std::array<std::atomic<bool>, 2> flips_{};
  std::array<std::atomic<bool>, 2> flipped_{};
  std::array<std::atomic<std::uint64_t>, 2> silent_after_{~0ULL, ~0ULL};
  std::mutex mutex_;  // guards the rest
  bool refusing_ = false;
  UniqueFd next_listening_;
  std::thread thread_;
};

}  // namespace memferry::test
