// The source of a scatter against scripted servers and a scripted destination over real loopback sockets: what the
// tests of it share. After every eviction each page is looked for where the source says that it is, byte by byte.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "fake_destination.h"
#include "fake_stage.h"
#include "transfer/sender.h"

namespace memferry::sender_test {

inline PageRun run_of(std::uint64_t first, std::uint64_t count) { return PageRun{PageNumber{first}, count}; }

class ScatterTest : public testing::Test {
 protected:
  using enum EngineEventKind;
  using FrameType = wire::FrameType;
  using Holders = wire::Holders;
  using ms = std::chrono::milliseconds;
  static constexpr unsigned kChannels = 2;
  static std::uint64_t page_size() { return static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)); }

  void make(std::vector<std::uint64_t> pages, unsigned servers) {
    std::mt19937_64 random(11);
    for (const std::uint64_t count : pages) {
      regions.push_back(Region::allocate(count * page_size()));
      const auto bytes = regions.back()->contiguous(run_of(0, count));
      oracle.emplace_back(bytes.size());
      for (std::size_t i = 0; i < bytes.size(); i += 8) {
        const std::uint64_t word = i / page_size() % 16 == 3 ? 0 : random();
        std::memcpy(bytes.data() + i, &word, 8);
      }
      std::memcpy(oracle.back().data(), bytes.data(), bytes.size());
    }
    peer = std::make_unique<FakeDestination>(
        FakeDestination::Options{.channels = kChannels, .pages = pages, .page_size = page_size()});
    for (unsigned i = 0; i < servers; ++i) stages.push_back(std::make_unique<FakeStage>(i, page_size()));
  }
  SenderConfig config() {
    SenderConfig config;
    config.regions = regions;
    config.host = "127.0.0.1";
    config.port = peer->port();
    config.channels = kChannels;
    config.tokens = FakeDestination::tokens(kChannels);
    config.recover_timeout = ms(20'000);
    config.stall_timeout = ms(60'000);
    config.connect_timeout = ms(20'000);
    for (const auto& stage : stages) config.servers.push_back(stage->address());
    config.on_event = events.callback();
    return config;
  }
  void into_postcopy(SenderConfig with) {
    sender = std::make_unique<Sender>(std::move(with));
    sender->connect();
    peer->accept_epoch();
    events.expect(kConnected);
    sender->queue_populated();
    sender->switch_over();
    events.expect(kSwitched);
  }
  // The direct connection takes nothing: its threads wait here with a frame in hand.
  void block_direct() {
    peer->on_frame = [this](const SeenFrame& frame) {
      if (frame.channel == kChannels || frame.type() == FrameType::kBarrier ||
          frame.type() == FrameType::kSwitch) {
        return true;
      }
      std::unique_lock lock(gate_mutex);
      gate_changed.wait(lock, [this] { return direct_open; });
      return true;
    };
  }
  void open_direct() {
    const std::lock_guard lock(gate_mutex);
    direct_open = true;
    gate_changed.notify_all();
  }
  // The others take no more than their windows until this has had what it is to have: it is not for the scheduler.
  template <typename Had>
  void start_push_with(unsigned server, Had had) {
    start_with(server, had, [this] { sender->start_push(); });
  }
  template <typename Had, typename Start>
  void start_with(unsigned server, Had had, Start start) {
    for (unsigned other = 0; other < stages.size(); ++other) stages[other]->stall(other != server);
    start();
    for (int i = 0; i < 20'000 && !had(); ++i) std::this_thread::sleep_for(ms(1));
    EXPECT_TRUE(had());
    for (unsigned other = 0; other < stages.size(); ++other) {
      if (other != server) stages[other]->stall(false);
    }
  }
  bool has(unsigned server, std::size_t least) {
    const std::lock_guard lock(stages[server]->mutex);
    return stages[server]->pages.size() >= least;
  }
  void TearDown() override {
    open_direct();
    sender.reset();
    if (peer) {
      peer->cut();
      peer->stop();
    }
  }

  // Every page is where a live index server says, with the oracle's content; `dead` servers hold nothing.
  void expect_evicted(const std::set<unsigned>& dead = {}, unsigned copies = 1) {
    const auto stats = sender->stats();
    for (std::uint32_t region = 0; region < regions.size(); ++region) {
      for (std::uint64_t page = 0; page < regions[region]->pages(); ++page) {
        SCOPED_TRACE("region " + std::to_string(region) + " page " + std::to_string(page));
        const auto* want = oracle[region].data() + page * page_size();
        unsigned told = 0;
        for (unsigned index = 0; index < stages.size(); ++index) {
          if (dead.count(index) > 0) continue;
          const std::lock_guard lock(stages[index]->mutex);
          const auto found = stages[index]->records.find({region, page});
          ASSERT_NE(found, stages[index]->records.end()) << "server " << index << " was not told";
          const FakeStage::Record record = found->second;
          ++told;
          if (index != first_live(dead)) continue;
          check_holder(record, region, page, want, dead, copies);
          if (HasFatalFailure()) return;
        }
        ASSERT_EQ(told, stages.size() - dead.size());
      }
    }
    ASSERT_EQ(stats.servers.size(), stages.size());
  }
  unsigned first_live(const std::set<unsigned>& dead) const {
    for (unsigned i = 0; i < stages.size(); ++i) {
      if (dead.count(i) == 0) return i;
    }
    return 0;
  }
  // With the first live server's mutex held.
  void check_holder(const FakeStage::Record& record, std::uint32_t region, std::uint64_t page,
                    const std::byte* want, const std::set<unsigned>& dead, unsigned copies) {
    if (record.holders.first == Holders::kDestination) {
      const std::lock_guard lock(peer->mutex);
      ASSERT_TRUE(peer->have[region][page]);
      ASSERT_EQ(std::memcmp(peer->memory[region].data() + page * page_size(), want, page_size()), 0);
      return;
    }
    ASSERT_LT(record.holders.first, stages.size());
    ASSERT_EQ(dead.count(record.holders.first), 0u) << "said to be at a dead server";
    if (copies == 2) {
      ASSERT_LT(record.holders.second, stages.size());
      ASSERT_NE(record.holders.second, record.holders.first);
    }
    FakeStage& holder = *stages[record.holders.first];
    std::unique_lock<std::mutex> lock;
    if (record.holders.first != first_live(dead)) lock = std::unique_lock(holder.mutex);
    const auto found = holder.pages.find({region, page});
    ASSERT_NE(found, holder.pages.end());
    const bool zero =
        std::all_of(want, want + page_size(), [](std::byte byte) { return byte == std::byte{0}; });
    ASSERT_EQ(record.zero, zero);
    if (zero) return;
    ASSERT_EQ(found->second.content.size(), page_size());
    ASSERT_EQ(std::memcmp(found->second.content.data(), want, page_size()), 0);
    ASSERT_EQ(record.hash, found->second.hash);
  }
  std::uint64_t pages_at_servers() {
    std::uint64_t pages = 0;
    for (const auto& server : sender->stats().servers) pages += server.pages;
    return pages;
  }
  std::uint64_t all_pages() const {
    std::uint64_t pages = 0;
    for (const auto& region : regions) pages += region->pages();
    return pages;
  }

  std::vector<std::shared_ptr<Region>> regions;
  std::vector<std::vector<std::byte>> oracle;
  std::unique_ptr<FakeDestination> peer;
  std::vector<std::unique_ptr<FakeStage>> stages;
  EventLog events;  // outlives the sender
  std::unique_ptr<Sender> sender;
  std::mutex gate_mutex;
  std::condition_variable gate_changed;
  bool direct_open = false;
};

}  // namespace memferry::sender_test
