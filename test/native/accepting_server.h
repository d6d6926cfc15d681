// A VMD server by hand: takes every connection, and serves each on a thread of its own until it goes.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "fake_source.h"
#include "os/unique_fd.h"
#include "wire/socket.h"

namespace memferry::test {

class AcceptingServer {
 public:
  // `serve`: once the hello is accepted; must return when the connection has ended.
  explicit AcceptingServer(std::function<void(Wire&)> serve)
      : serve_(std::move(serve)),
        listening_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))),
        acceptor_([this] { accept(); }) {}
  ~AcceptingServer() {
    stopping_ = true;
    acceptor_.join();
    for (std::thread& thread : threads_) thread.join();
  }
  AcceptingServer(const AcceptingServer&) = delete;
  AcceptingServer& operator=(const AcceptingServer&) = delete;
  [[nodiscard]] std::uint16_t port() const { return wire::SocketAddress::local(listening_.get()).port(); }

 private:
  void accept() {
    while (!stopping_) {
      UniqueFd fd(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (fd) {
        threads_.emplace_back([this, wire = std::make_shared<Wire>(std::move(fd))] { greet(*wire); });
      } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    }
  }

  void greet(Wire& wire) const {
    wire::Hello hello{};
    const wire::HelloReply reply{wire::kFrameMagic, static_cast<std::uint32_t>(wire::HelloStatus::kAccepted)};
    if (wire.read(&hello, sizeof hello) && wire.raw(&reply, sizeof reply)) serve_(wire);
  }

  const std::function<void(Wire&)> serve_;
  const UniqueFd listening_;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
  std::thread acceptor_;
};

}  // namespace memferry::test
