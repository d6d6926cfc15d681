// Connections over the loopback interface, since the engines want TCP, with one thread that plays all peers: nothing
// here waits for one peer while another one could be served.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "input.h"
#include "os/unique_fd.h"
#include "wire/socket.h"

namespace memferry::fuzz {

// A listening socket for the life of the process.
class Loopback {
 public:
  Loopback() : fd_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))) {
    address_ = wire::SocketAddress::local(fd_.get());
  }
  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] std::uint16_t port() const { return address_.port(); }
  // Invalid: nobody is there.
  [[nodiscard]] UniqueFd accept() const {
    return UniqueFd(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  }
  // The engine's end, as a listener accepts it, and the fuzzer's.
  [[nodiscard]] std::pair<UniqueFd, UniqueFd> connected() const {
    UniqueFd ours(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    require(ours.valid());
    if (::connect(ours.get(), address_.get(), address_.bytes()) != 0) require(errno == EINPROGRESS);
    pollfd waiting{fd_.get(), POLLIN, 0};
    require(::poll(&waiting, 1, 20'000) == 1);
    UniqueFd theirs = accept();
    require(theirs.valid());
    return {std::move(theirs), std::move(ours)};
  }

 private:
  UniqueFd fd_;
  wire::SocketAddress address_;
};

// The fuzzer's end of a connection: what is to be written, and what has come.
class Peer {
 public:
  explicit Peer(UniqueFd fd) : fd_(std::move(fd)) {}
  [[nodiscard]] int fd() const { return fd_.get(); }
  void write(std::span<const std::byte> bytes) { out_.insert(out_.end(), bytes.begin(), bytes.end()); }
  template <typename T>
  void write_struct(const T& value) {
    write(std::as_bytes(std::span(&value, 1)));
  }
  // Nothing more is to be written.
  void finish() { finishing_ = true; }
  [[nodiscard]] bool written() const { return written_ == out_.size(); }
  [[nodiscard]] bool finishing() const { return finishing_; }
  // The peer has ended it.
  [[nodiscard]] bool ended() const { return ended_; }
  // Takes what has come.
  [[nodiscard]] std::vector<std::byte> received() { return std::exchange(in_, {}); }
  [[nodiscard]] std::size_t waiting_bytes() const { return in_.size(); }
  template <typename T>
  bool read_struct(T& value) {
    if (in_.size() < sizeof value) return false;
    std::memcpy(&value, in_.data(), sizeof value);
    in_.erase(in_.begin(), in_.begin() + sizeof value);
    return true;
  }

  [[nodiscard]] short events() const {
    return static_cast<short>((ended_ ? 0 : POLLIN) | (written() ? 0 : POLLOUT));
  }
  // As far as it goes without waiting. True: something has come.
  bool step() {
    const bool ended_before = ended_;
    const std::size_t had = in_.size();
    while (!written()) {
      const ssize_t put =
          ::send(fd_.get(), out_.data() + written_, out_.size() - written_, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (put > 0) {
        written_ += static_cast<std::size_t>(put);
      } else if (errno == EAGAIN || errno == EINTR) {
        break;
      } else {
        // It has ended: nobody hears the rest.
        written_ = out_.size();
      }
    }
    if (written() && finishing_ && !shut_) {
      shut_ = true;
      ::shutdown(fd_.get(), SHUT_WR);
    }
    std::array<std::byte, 65536> piece;
    while (!ended_) {
      const ssize_t got = ::recv(fd_.get(), piece.data(), piece.size(), MSG_DONTWAIT);
      if (got > 0) {
        in_.insert(in_.end(), piece.begin(), piece.begin() + got);
      } else if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        break;
      } else {
        ended_ = true;
      }
    }
    return in_.size() > had || ended_ != ended_before;
  }

 private:
  UniqueFd fd_;
  std::vector<std::byte> out_;
  std::size_t written_ = 0;
  std::vector<std::byte> in_;
  bool finishing_ = false;
  bool shut_ = false;
  bool ended_ = false;
};

// Serves all of these until `over`. What takes longer than this hangs, which is a finding.
inline constexpr std::chrono::seconds kHang{30};
template <typename Over, typename Before>
void serve(std::vector<Peer*> peers, int listening, const Over& over, const Before& before) {
  const auto until = std::chrono::steady_clock::now() + kHang;
  while (true) {
    before(peers);
    bool news = false;
    for (Peer* const peer : peers) news = peer->step() || news;
    if (over()) return;
    if (news) continue;
    std::vector<pollfd> waiting;
    for (const Peer* const peer : peers) {
      if (peer->events() != 0) waiting.push_back({peer->fd(), peer->events(), 0});
    }
    if (listening >= 0) waiting.push_back({listening, POLLIN, 0});
    ::poll(waiting.data(), waiting.size(), 100);
    require(std::chrono::steady_clock::now() < until);
  }
}

}  // namespace memferry::fuzz
