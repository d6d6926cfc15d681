// Guests that leave through VMD servers with deduplication, and what every test of that wants of them.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "sanitized.h"
#include "scatter_rig.h"
#include "slow_directory.h"
#include "track/dirty_tracker.h"
#include "transfer/receiver.h"
#include "transfer/sender.h"

namespace memferry::test {

inline DomainKey dedup_key(std::uint8_t number) {
  DomainKey made{};
  made.fill(number);
  return made;
}

struct Move {
  EventBox departures;
  EventBox arrivals;
  ImageId image{};
  std::uint64_t pages = 0;
  std::shared_ptr<Region> source;
  std::shared_ptr<Region> target;
  std::unique_ptr<Sender> sender;
  std::shared_ptr<Receiver> receiver;
  std::unique_ptr<Listener> listener;
  ~Move() {
    if (sender) sender->close(false);
    if (receiver) receiver->close();
    if (listener) listener->close();
  }
};

class DedupRig : public testing::Test {
 protected:
  using Contents = std::function<std::uint64_t(std::uint64_t)>;
  static constexpr unsigned kChannels = 1;
  // A link that is slower than any hash here.
  static constexpr std::uint64_t kLink = kSanitized ? 4ULL << 20 : 24ULL << 20;

  struct Plan {
    std::uint8_t domain = 1;
    unsigned replicas = 1;
    std::optional<TrackerKind> tracker{};
    bool direct = true;                 // false: it is parked
    std::uint64_t intake = 1ULL << 20;  // so that the servers have most of it
    std::uint64_t delta_cache = 0;
    std::chrono::milliseconds stall_timeout{60'000};
    std::chrono::milliseconds directory_patience{30'000};
    std::vector<std::size_t> order{};  // of the servers in its list; as they are
  };

  static std::size_t page_size() { return system_page_size(); }

  void servers(unsigned count, std::uint64_t memory = 128ULL << 20) {
    for (unsigned i = 0; i < count; ++i) {
      vmd.push_back(Vmd::start(
          StageConfig{.memory_bytes = memory, .chain_dial_timeout_ms = 20'000, .chain_timeout_ms = 20'000}));
    }
  }
  // 0 is zeros.
  static void fill(std::byte* page, std::uint64_t content) {
    if (content == 0) {
      std::memset(page, 0, page_size());
      return;
    }
    std::mt19937_64 random(content);
    for (std::size_t at = 0; at < page_size(); at += 8) {
      const std::uint64_t word = random();
      std::memcpy(page + at, &word, 8);
    }
  }
  static std::byte* source_page(const Move& move, std::uint64_t page) {
    return move.source->address(PageNumber{page}).pointer();
  }
  // Page p has the content numbered content_of(p). Nothing is connected yet.
  std::unique_ptr<Move> prepare(std::uint64_t pages, const Contents& content_of, const Plan& plan) {
    auto move = std::make_unique<Move>();
    move->pages = pages;
    move->image = own_image_id(static_cast<std::uint8_t>(++guests_));
    move->source = Region::allocate(pages * page_size());
    move->target = Region::allocate(pages * page_size());
    for (std::uint64_t page = 0; page < pages; ++page) {
      if (const std::uint64_t content = content_of(page); content != 0)
        fill(source_page(*move, page), content);
    }
    std::vector<std::uint64_t> identities;
    const std::vector<std::size_t> order = order_of(plan);
    for (std::size_t ordinal = 0; ordinal < order.size(); ++ordinal) {
      const auto& stage = vmd[order[ordinal]].stage;
      identities.push_back(stage->identity());
      EXPECT_TRUE(give_image(*stage, move->image, {pages}, static_cast<std::uint8_t>(ordinal), ports(plan),
                             16, dedup_key(plan.domain)));
    }
    if (plan.direct) make_receiver(*move, plan);
    SenderConfig sending;
    sending.regions = {move->source};
    sending.trackers = {nullptr};
    if (plan.tracker) {
      sending.trackers = {make_tracker(*plan.tracker, move->source)};
      sending.trackers[0]->arm();
    }
    sending.host = "127.0.0.1";
    sending.port = plan.direct ? move->listener->port() : std::uint16_t{0};
    sending.direct = plan.direct;
    sending.migration = move->image;
    sending.channels = kChannels;
    sending.tokens = direct_tokens(kChannels);
    sending.servers = server_addresses(move->image, kSourceSession, ports(plan), 16, identities);
    sending.replicas = plan.replicas;
    sending.bandwidth = kLink;
    sending.stall_timeout = plan.stall_timeout;
    sending.dedup = dedup_key(plan.domain);
    sending.directory_dial_timeout = std::chrono::seconds(30);
    sending.directory_patience = plan.directory_patience;
    sending.delta_cache_bytes = plan.delta_cache;
    sending.destination_encodings = plan.delta_cache > 0 ? wire::kFlagDelta : std::uint16_t{0};
    sending.on_event = move->departures.callback();
    move->sender = std::make_unique<Sender>(std::move(sending));
    move->sender->connect();
    move->departures.await(EngineEventKind::kConnected);
    return move;
  }
  // A destination; of a parked guest it comes when the source has gone.
  void make_receiver(Move& move, const Plan& plan) {
    ReceiverConfig receiving;
    receiving.regions = {move.target};
    receiving.migration = move.image;
    receiving.channels = kChannels;
    receiving.tokens = direct_tokens(kChannels);
    receiving.may_page = true;
    receiving.keep_page_hashes = true;
    receiving.recover_timeout = std::chrono::seconds(5);
    receiving.loss_grace = std::chrono::milliseconds(50);
    receiving.servers = server_addresses(move.image, kDestinationSession, ports(plan));
    receiving.bandwidth = plan.intake;
    receiving.sourceless = !plan.direct;
    receiving.encodings = plan.delta_cache > 0 ? wire::kFlagDelta : std::uint16_t{0};
    receiving.on_event = move.arrivals.callback();
    move.receiver = Receiver::create(std::move(receiving));
    if (!plan.direct) return;
    move.listener = std::make_unique<Listener>(Listener::Config{"127.0.0.1", 0, {}});
    move.listener->add(move.receiver);
  }
  // One that is about to push.
  std::unique_ptr<Move> guest(std::uint64_t pages, const Contents& content_of, std::uint8_t domain = 1,
                              unsigned replicas = 1) {
    return guest(pages, content_of, {.domain = domain, .replicas = replicas});
  }
  std::unique_ptr<Move> guest(std::uint64_t pages, const Contents& content_of, const Plan& plan) {
    auto move = prepare(pages, content_of, plan);
    move->sender->queue_populated();
    switch_over(*move);
    return move;
  }
  static void switch_over(Move& move) {
    move.sender->switch_over();
    move.departures.await(EngineEventKind::kSwitched);
    move.arrivals.await(EngineEventKind::kSwitched);
  }
  static std::string told_of(const Move& move) {
    const SenderStats all = move.sender->stats();
    const DedupStats stats = *all.dedup;
    return std::to_string(stats.examined) + " pages looked at, " + std::to_string(stats.probes) +
           " asked for, " + std::to_string(stats.told) + " told of, " + std::to_string(stats.pages) +
           " referred to, " + std::to_string(stats.refused) + " refused, " + std::to_string(all.pages_sent) +
           " sent, " + std::to_string(all.pages_pending) + " pending";
  }
  // With a link that leaves time to look, until something has been found.
  template <typename Found, typename Start>
  static void slowly_until(Move& move, Found found, Start start) {
    move.sender->set_bandwidth(1 << 20);
    start();
    for (int i = 0; i < 20'000 && !found(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_TRUE(found()) << told_of(move);
    move.sender->set_bandwidth(kLink);
  }
  static void evict(Move& move) {
    move.sender->start_push();
    await_evicted(move);
  }
  template <typename Found>
  static void evict_slowly_until(Move& move, Found found) {
    slowly_until(move, found, [&] { move.sender->start_push(); });
    await_evicted(move);
  }
  // So that others find there what it had: what it has not told by the time that it goes nobody learns.
  static void evict_known(Move& move) {
    move.sender->hold_eviction(true);
    slowly_until(
        move, [&] { return dedup(move).told > 0; }, [&] { move.sender->start_push(); });
    // Fewer than it looks at in one go before it has told any.
    const auto enough = [&] { return dedup(move).told >= 256; };
    for (int i = 0; i < 20'000 && !enough(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    EXPECT_TRUE(enough()) << told_of(move);
    move.sender->hold_eviction(false);
    await_evicted(move);
  }
  static void await_evicted(Move& move) {
    move.departures.await(EngineEventKind::kEvicted);
    // The source's memory is gone from here on.
    move.sender->close(true);
    move.receiver->set_bandwidth(0);
  }
  static void expect_arrived(Move& move) {
    move.arrivals.await(EngineEventKind::kComplete);
    expect_same(move);
  }
  static void expect_same(Move& move) {
    for (std::uint64_t page = 0; page < move.pages; ++page) {
      ASSERT_EQ(
          std::memcmp(source_page(move, page), move.target->address(PageNumber{page}).pointer(), page_size()),
          0)
          << "page " << page;
    }
    EXPECT_EQ(move.receiver->digest(0), move.sender->digest(0));
  }
  static DedupStats dedup(const Move& move) { return *move.sender->stats().dedup; }
  void TearDown() override {
    for (auto& each : vmd) each.end();
  }

  std::vector<Vmd> vmd;
  std::unique_ptr<SlowDirectory> network;  // before the first server, if any

 private:
  [[nodiscard]] std::vector<std::size_t> order_of(const Plan& plan) const {
    std::vector<std::size_t> order = plan.order;
    for (std::size_t i = order.size(); i < vmd.size(); ++i) order.push_back(i);
    return order;
  }
  [[nodiscard]] std::vector<std::uint16_t> ports(const Plan& plan) const {
    std::vector<std::uint16_t> all;
    for (const std::size_t each : order_of(plan))
      all.push_back(network && each == 0 ? network->port() : vmd[each].listener->port());
    return all;
  }
  unsigned guests_ = 0;
};

}  // namespace memferry::test
