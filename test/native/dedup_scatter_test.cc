// Whole scatters with deduplication over real sockets: guests that share pages with each other, with themselves and
// with what the servers hold, servers that end meanwhile. Every byte is compared.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>

#include "scatter_rig.h"
#include "slow_directory.h"
#include "transfer/receiver.h"
#include "transfer/sender.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;

constexpr unsigned kChannels = 1;
// A link that is slower than any hash here.
constexpr std::uint64_t kLink = 24ULL << 20;

DomainKey key(std::uint8_t number) {
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

class DedupScatter : public testing::Test {
 protected:
  static std::size_t page_size() { return system_page_size(); }

  void servers(unsigned count, std::uint64_t memory = 128ULL << 20) {
    for (unsigned i = 0; i < count; ++i) vmd.push_back(Vmd::start(memory));
  }
  // Page p has the content numbered content_of(p); 0 is zeros.
  std::unique_ptr<Move> guest(std::uint64_t pages,
                              const std::function<std::uint64_t(std::uint64_t)>& content_of,
                              std::uint8_t domain = 1, unsigned replicas = 1) {
    auto move = std::make_unique<Move>();
    move->pages = pages;
    move->image.fill(0x42);
    move->image[1] = static_cast<std::uint8_t>(++guests_);
    move->source = Region::allocate(pages * page_size());
    move->target = Region::allocate(pages * page_size());
    for (std::uint64_t page = 0; page < pages; ++page) {
      const std::uint64_t content = content_of(page);
      if (content == 0) continue;
      std::mt19937_64 random(content);
      for (std::size_t at = 0; at < page_size(); at += 8) {
        const std::uint64_t word = random();
        std::memcpy(move->source->address(PageNumber{page}).pointer() + at, &word, 8);
      }
    }
    std::vector<std::uint16_t> ports;
    std::vector<std::uint64_t> identities;
    for (const Vmd& each : vmd) {
      ports.push_back(network && ports.empty() ? network->port() : each.listener->port());
      identities.push_back(each.stage->identity());
    }
    for (unsigned i = 0; i < vmd.size(); ++i) {
      EXPECT_TRUE(give_image(*vmd[i].stage, move->image, {pages}, static_cast<std::uint8_t>(i), ports, 16,
                             key(domain)));
    }
    ReceiverConfig receiving;
    receiving.regions = {move->target};
    receiving.migration = move->image;
    receiving.channels = kChannels;
    receiving.tokens = direct_tokens(kChannels);
    receiving.may_page = true;
    receiving.keep_page_hashes = true;
    receiving.recover_timeout = 5s;
    receiving.loss_grace = 50ms;
    receiving.servers = server_addresses(move->image, kDestinationSession, ports);
    receiving.bandwidth = 1 << 20;  // so that the servers have most of it
    receiving.on_event = move->arrivals.callback();
    move->receiver = Receiver::create(std::move(receiving));
    move->listener = std::make_unique<Listener>(Listener::Config{"127.0.0.1", 0, {}});
    move->listener->add(move->receiver);
    SenderConfig sending;
    sending.regions = {move->source};
    sending.trackers = {nullptr};
    sending.host = "127.0.0.1";
    sending.port = move->listener->port();
    sending.migration = move->image;
    sending.channels = kChannels;
    sending.tokens = direct_tokens(kChannels);
    sending.servers = server_addresses(move->image, kSourceSession, ports, 16, identities);
    sending.replicas = replicas;
    sending.bandwidth = kLink;
    sending.stall_timeout = 2500ms;
    sending.dedup = key(domain);
    sending.on_event = move->departures.callback();
    move->sender = std::make_unique<Sender>(std::move(sending));
    move->sender->connect();
    move->departures.await(kConnected);
    move->sender->queue_populated();
    move->sender->switch_over();
    move->departures.await(kSwitched);
    move->arrivals.await(kSwitched);
    return move;
  }
  static void evict(Move& move) {
    move.sender->start_push();
    move.departures.await(kEvicted);
    // The source's memory is gone from here on.
    move.sender->close(true);
    move.receiver->set_bandwidth(0);
  }
  static void expect_arrived(Move& move) {
    move.arrivals.await(kComplete);
    for (std::uint64_t page = 0; page < move.pages; ++page) {
      ASSERT_EQ(std::memcmp(move.source->address(PageNumber{page}).pointer(),
                            move.target->address(PageNumber{page}).pointer(), page_size()),
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
  unsigned guests_ = 0;
};

TEST_F(DedupScatter, ASecondGuestSendsWhatIsThereAlreadyAsReferences) {
  servers(2);
  const auto content = [](std::uint64_t page) { return page % 16 == 3 ? 0 : page + 1; };
  auto first = guest(4096, content);
  evict(*first);
  EXPECT_EQ(dedup(*first).pages, 0u);
  auto second = guest(4096, content);
  evict(*second);
  const auto stats = dedup(*second);
  // How many of them is a matter of speed, and none of what is right.
  EXPECT_GT(stats.pages, 0u);
  std::uint64_t shared = 0;
  for (const Vmd& each : vmd) shared += each.stage->stats().shared_pages;
  // Not as many: one that is late goes plainly as well, and either copy may stay.
  EXPECT_GT(shared, 0u);
  // The first one's image goes before the second one is gathered.
  expect_arrived(*first);
  for (const Vmd& each : vmd) each.stage->drop(first->image);
  expect_arrived(*second);
}

TEST_F(DedupScatter, GuestsThatLeaveAtOnceSendEachPageOnce) {
  servers(2);
  std::vector<std::unique_ptr<Move>> moves;
  for (std::uint64_t i = 0; i < 3; ++i) {
    moves.push_back(
        guest(3072, [i](std::uint64_t page) { return page % 5 == 0 ? 100000 * (i + 1) + page : page + 1; }));
  }
  std::vector<std::thread> leaving;
  for (auto& each : moves) leaving.emplace_back([&each] { evict(*each); });
  for (auto& each : leaving) each.join();
  std::uint64_t deduplicated = 0;
  for (auto& each : moves) deduplicated += dedup(*each).pages;
  // Of 3 times 2457 pages alike, at best two thirds are references.
  EXPECT_GT(deduplicated, 0u);
  EXPECT_LE(deduplicated, 2u * 2457);
  for (auto& each : moves) expect_arrived(*each);
}

TEST_F(DedupScatter, EqualPagesOfOneGuest) {
  servers(1);
  auto move = guest(4096, [](std::uint64_t page) { return 1 + page % 64; });
  evict(*move);
  EXPECT_GT(dedup(*move).pages, 0u);
  expect_arrived(*move);
}

TEST_F(DedupScatter, AnotherDomainSharesNothing) {
  servers(1);
  const auto content = [](std::uint64_t page) { return page + 1; };
  auto first = guest(1024, content, 1);
  evict(*first);
  auto second = guest(1024, content, 2);
  evict(*second);
  EXPECT_EQ(dedup(*second).pages, 0u);
  EXPECT_EQ(dedup(*second).refused, 0u);
  expect_arrived(*first);
  expect_arrived(*second);
}

TEST_F(DedupScatter, WithReplicasBothHoldersShare) {
  servers(3);
  const auto content = [](std::uint64_t page) { return page + 1; };
  auto first = guest(2048, content, 1, 2);
  evict(*first);
  auto second = guest(2048, content, 1, 2);
  evict(*second);
  EXPECT_GT(dedup(*second).pages, 0u);
  // One server goes with all that it has: each page is with another one too.
  vmd[1].end();
  expect_arrived(*first);
  expect_arrived(*second);
}

TEST_F(DedupScatter, AServerThatEndsTakesItsReferencesAlongAndTheyGoAgain) {
  // Two copies: whenever it ends, what it held and what was on its way to it is there or goes again.
  servers(3);
  const auto content = [](std::uint64_t page) { return page + 1; };
  auto first = guest(4096, content, 1, 2);
  evict(*first);
  expect_arrived(*first);
  auto second = guest(4096, content, 1, 2);
  std::atomic<bool> evicted = false;
  std::thread killer([&] {
    while (dedup(*second).pages == 0 && !evicted) std::this_thread::sleep_for(1ms);
    vmd[1].end();
  });
  evict(*second);
  evicted = true;
  killer.join();
  EXPECT_GT(dedup(*second).pages, 0u);
  expect_arrived(*second);
}

TEST_F(DedupScatter, WhatTheDirectorySaysWronglyGoesPlainly) {
  servers(1);
  auto first = guest(1024, [](std::uint64_t page) { return page + 1; });
  evict(*first);
  expect_arrived(*first);
  // All that the directory knows is out of date now: what it names is gone, and its slots are somebody else's.
  auto keeper = guest(16, [](std::uint64_t) { return 0; });
  vmd[0].stage->drop(first->image);
  auto second = guest(1024, [](std::uint64_t page) { return page + 1; });
  evict(*second);
  EXPECT_GT(dedup(*second).refused, 0u);
  expect_arrived(*second);
  // And is put right by it.
  auto third = guest(1024, [](std::uint64_t page) { return page + 1; });
  evict(*third);
  EXPECT_GT(dedup(*third).pages, 0u);
  expect_arrived(*third);
  evict(*keeper);
}

// Its every byte comes in time for a wait of its own, and its answer never.
TEST_F(DedupScatter, ADirectoryWhoseAnswerTricklesInHoldsNobodyUp) {
  servers(1);
  network = std::make_unique<SlowDirectory>(vmd[0].listener->port());
  // Among the first that are looked at there are equal ones, which wait for each other.
  auto move = guest(2048, [](std::uint64_t page) { return 1 + page % 4; });
  evict(*move);
  EXPECT_GT(network->asked(), 0u);
  EXPECT_EQ(dedup(*move).refused, 0u);
  expect_arrived(*move);
}

}  // namespace
}  // namespace memferry::test
