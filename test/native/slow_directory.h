// A VMD server's neighbour that passes everything on but for what sources ask of a directory: to that it answers a byte
// at a time, slowly, with what could become an answer; or it passes the answers on, late.
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "wire/frame.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry::test {

class SlowDirectory {
 public:
  static constexpr std::chrono::milliseconds kEveryByte{700};

  // `late`: by so much; 0: a byte at a time.
  explicit SlowDirectory(std::uint16_t behind, std::chrono::milliseconds late = {})
      : behind_(behind),
        late_(late),
        listening_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))),
        port_(wire::SocketAddress::local(listening_.get()).port()),
        acceptor_([this] { accept(); }) {}
  ~SlowDirectory() {
    stopping_ = true;
    acceptor_.join();
    for (auto& each : threads_) each.join();
  }
  SlowDirectory(const SlowDirectory&) = delete;
  SlowDirectory& operator=(const SlowDirectory&) = delete;

  [[nodiscard]] std::uint16_t port() const { return port_; }
  // Connections on which something was asked.
  [[nodiscard]] unsigned asked() const { return asked_; }
  // Late ones, passed on.
  [[nodiscard]] unsigned answered() const { return answered_; }

 private:
  static constexpr int kTickMs = 20;

  static bool readable(int fd) {
    pollfd waiting{fd, POLLIN, 0};
    return ::poll(&waiting, 1, kTickMs) > 0;
  }
  void accept() {
    while (!stopping_) {
      if (!readable(listening_.get())) continue;
      UniqueFd fd(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (fd) threads_.emplace_back([this, client = std::move(fd)]() mutable { serve(std::move(client)); });
    }
  }
  void serve(UniqueFd fd) {
    auto dialled =
        wire::dial(wire::SocketAddress::parse("127.0.0.1", behind_), std::chrono::milliseconds(20'000), -1);
    if (dialled.kind != wire::DialResult::Kind::kConnected) return;
    wire::PlainStream client(std::move(fd));
    wire::PlainStream server(std::move(dialled.fd));
    wire::Hello hello{};
    wire::HelloReply reply{};
    const auto hello_bytes = std::as_writable_bytes(std::span(&hello, 1));
    const auto reply_bytes = std::as_writable_bytes(std::span(&reply, 1));
    if (!client.recv_exact(hello_bytes).done() ||
        !server.send_all(std::span<const std::byte>(hello_bytes)).done())
      return;
    if (hello.channel != static_cast<std::uint16_t>(wire::StageRole::kProbe)) {
      pass_on(client, server, {});
      return;
    }
    if (late_.count() > 0) {
      pass_on(client, server, late_);
      return;
    }
    if (server.recv_exact(reply_bytes).done() &&
        client.send_all(std::span<const std::byte>(reply_bytes)).done())
      trickle(client);
  }
  void pass_on(wire::Stream& client, wire::Stream& server, std::chrono::milliseconds late) {
    bool greeted = false;
    std::vector<std::byte> piece(64 * 1024);
    const auto pass = [&](wire::Stream& from, wire::Stream& to) {
      std::size_t got = 0;
      return from.recv_some(piece, got).done() &&
             to.send_all(std::span<const std::byte>(piece).first(got)).done();
    };
    while (!stopping_) {
      std::array<pollfd, 2> polled{{{client.fd(), POLLIN, 0}, {server.fd(), POLLIN, 0}}};
      ::poll(polled.data(), polled.size(), kTickMs);
      if (polled[0].revents != 0 && !pass(client, server)) return;
      if (polled[1].revents == 0) continue;
      if (greeted && late.count() > 0) std::this_thread::sleep_for(late);
      if (!pass(server, client)) return;
      if (std::exchange(greeted, true) && late.count() > 0) ++answered_;
    }
  }
  void trickle(wire::Stream& client) {
    wire::FrameHeader asked{};
    while (!stopping_ && !readable(client.fd())) {
    }
    if (stopping_ || !client.recv_exact(std::as_writable_bytes(std::span(&asked, 1))).done()) return;
    ++asked_;
    wire::FrameHeader answer = wire::make_header(wire::FrameType::kProbed, 0,
                                                 {PageNumber{asked.first_page}, asked.page_count}, asked.tag);
    answer.payload_bytes = static_cast<std::uint32_t>(asked.page_count * sizeof(wire::KnownHolders));
    auto next = std::chrono::steady_clock::now();
    for (std::span<const std::byte> left = std::as_bytes(std::span(&answer, 1));
         !stopping_ && !left.empty();) {
      std::this_thread::sleep_for(std::chrono::milliseconds(kTickMs));
      if (std::chrono::steady_clock::now() < next) continue;
      next += kEveryByte;
      if (!client.send_all(left.first(1)).done()) return;
      left = left.subspan(1);
    }
  }

  const std::uint16_t behind_;
  const std::chrono::milliseconds late_;
  const UniqueFd listening_;
  const std::uint16_t port_;
  std::atomic<bool> stopping_{false};
  std::atomic<unsigned> asked_{0};
  std::atomic<unsigned> answered_{0};
  std::vector<std::thread> threads_;  // the acceptor's own
  std::thread acceptor_;
};

}  // namespace memferry::test
