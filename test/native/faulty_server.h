// A VMD server of a schedule: what can go wrong with it, and what an observer finds there.
#pragma once

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "forwarder.h"
#include "scatter_rig.h"

namespace memferry::test {

class FaultyServer {
 public:
  static constexpr std::uint64_t kMemoryBytes = 40ULL << 20;
  static constexpr std::uint32_t kAttempts = Stage::kMostAttempts;

  FaultyServer(unsigned ordinal, bool needs_network) : ordinal_(ordinal), vmd_(Vmd::start(kMemoryBytes)) {
    port_ = vmd_.listener->port();
    if (!needs_network) return;
    network_ = std::make_unique<Forwarder>(port_);
    port_ = network_->port();
  }
  ~FaultyServer() { end(); }
  FaultyServer(const FaultyServer&) = delete;
  FaultyServer& operator=(const FaultyServer&) = delete;

  [[nodiscard]] std::uint16_t port() const { return port_; }
  [[nodiscard]] Forwarder* network() const { return network_.get(); }
  // Its memory holds what it was given, and it can be asked.
  [[nodiscard]] bool live() const { return live_; }
  std::shared_ptr<Stage> stage() const {
    const std::lock_guard lock(mutex_);
    return vmd_.stage;
  }

  // Leaves no more than so many pages of room.
  void fill_up(std::uint64_t pages_left) {
    const std::uint64_t page = system_page_size();
    const std::uint64_t free = stage()->stats().free_bytes / page;
    if (free <= pages_left) return;
    // An image without content: its index alone takes 16 bytes a page.
    ImageId ballast{};
    ballast.fill(0xba);
    ballast[1] = static_cast<std::uint8_t>(++ballasts_);
    const std::uint64_t pages = (free - pages_left) * (page / 16);
    EXPECT_TRUE(stage()->create_image({.id = ballast, .region_pages = {pages}, .ordinal = 0}));
  }
  void kill() {
    const std::lock_guard lock(mutex_);
    live_ = false;
    if (network_) network_->refuse();
    vmd_.end();
  }
  void restart_empty() {
    kill();
    const std::lock_guard lock(mutex_);
    try {
      vmd_ = Vmd::start(kMemoryBytes, network_ ? 0 : port_);
    } catch (const std::exception&) {
      return;  // its port is somebody else's by now: it stays away
    }
    if (network_) network_->welcome(vmd_.listener->port());
  }
  void go_silent() {
    live_ = false;
    network_->silence(true);
  }
  void end() {
    const std::lock_guard lock(mutex_);
    vmd_.end();
  }

  // A connection of the test's own, past the network; nullptr when there is none to be had.
  std::unique_ptr<StageClient> observe(const ImageId& image, wire::StageRole role) {
    const std::lock_guard lock(mutex_);
    auto client = std::make_unique<StageClient>(dial_loopback(vmd_.listener->port()));
    const wire::Hello hello =
        stage_hello(image, kObserverSession, role, attempts_[{image[1], static_cast<unsigned>(role)}]++);
    wire::HelloReply reply{};
    if (client->fd() < 0 || !client->wire().raw(&hello, sizeof hello) ||
        !client->wire().read(&reply, sizeof reply) ||
        reply.status != static_cast<std::uint32_t>(wire::HelloStatus::kAccepted)) {
      return nullptr;
    }
    return client;
  }
  // Puts these bytes in a page's place, as its source's could be. False when that cannot be done now.
  bool overwrite(const ImageId& image, std::uint32_t region, std::uint64_t page,
                 std::span<const std::byte> bytes) {
    const auto client = observe(image, wire::StageRole::kScatter);
    return client &&
           client->pages(region, page, bytes,
                         {static_cast<std::uint8_t>(ordinal_), wire::Holders::kNobody}) &&
           client->barrier(1).acknowledged;
  }

 private:
  const unsigned ordinal_;
  unsigned ballasts_ = 0;
  std::uint16_t port_ = 0;
  std::unique_ptr<Forwarder> network_;
  std::atomic<bool> live_{true};
  mutable std::mutex mutex_;  // guards the rest
  Vmd vmd_;
  std::map<std::pair<unsigned, unsigned>, std::uint32_t> attempts_;
};

}  // namespace memferry::test
