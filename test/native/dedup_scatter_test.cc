// Whole scatters with deduplication over real sockets: guests that share pages with each other, with themselves and
// with what the servers hold, servers that end meanwhile. Every byte is compared.
#include <gtest/gtest.h>

#include <thread>

#include "dedup_rig.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;

class DedupScatter : public DedupRig {};

TEST_F(DedupScatter, ASecondGuestSendsWhatIsThereAlreadyAsReferences) {
  servers(2);
  const auto content = [](std::uint64_t page) { return page % 16 == 3 ? 0 : page + 1; };
  auto first = guest(4096, content);
  evict_known(*first);
  EXPECT_EQ(dedup(*first).pages, 0u);
  auto second = guest(4096, content);
  // How many of them is a matter of speed, and none of what is right.
  evict_slowly_until(*second, [&] { return dedup(*second).pages > 0; });
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
  const auto deduplicated = [&] {
    std::uint64_t pages = 0;
    for (auto& each : moves) pages += dedup(*each).pages;
    return pages;
  };
  std::vector<std::thread> leaving;
  for (auto& each : moves)
    leaving.emplace_back([&] { evict_slowly_until(*each, [&] { return deduplicated() > 0; }); });
  for (auto& each : leaving) each.join();
  // Of 3 times 2457 pages alike, at best two thirds are references.
  EXPECT_LE(deduplicated(), 2u * 2457);
  for (auto& each : moves) expect_arrived(*each);
}

TEST_F(DedupScatter, EqualPagesOfOneGuest) {
  servers(1);
  auto move = guest(4096, [](std::uint64_t page) { return 1 + page % 64; });
  evict(*move);
  EXPECT_GT(dedup(*move).pages, 0u) << told_of(*move);
  expect_arrived(*move);
}

TEST_F(DedupScatter, AnotherDomainSharesNothing) {
  servers(1);
  const auto content = [](std::uint64_t page) { return page + 1; };
  auto first = guest(1024, content, 1);
  evict_known(*first);
  auto second = guest(1024, content, 2);
  evict_slowly_until(*second, [&] { return dedup(*second).probes > 0; });
  EXPECT_EQ(dedup(*second).pages, 0u);
  EXPECT_EQ(dedup(*second).refused, 0u);
  expect_arrived(*first);
  expect_arrived(*second);
}

TEST_F(DedupScatter, WithReplicasBothHoldersShare) {
  servers(3);
  const auto content = [](std::uint64_t page) { return page + 1; };
  auto first = guest(2048, content, 1, 2);
  evict_known(*first);
  auto second = guest(2048, content, 1, 2);
  evict_slowly_until(*second, [&] { return dedup(*second).pages > 0; });
  // One server goes with all that it has: each page is with another one too.
  vmd[1].end();
  expect_arrived(*first);
  expect_arrived(*second);
}

// A server has but so many connections for an image, so a chain is not made for a reference's sake.
TEST_F(DedupScatter, APairOfHoldersThatIsNoChainIsNotReferredTo) {
  servers(5);
  const auto content = [](std::uint64_t page) { return page + 1; };
  auto first = guest(2048, content, 1, 2);
  evict_known(*first);
  const auto with = [&](std::vector<std::size_t> order) {
    return guest(2048, content, {.replicas = 2, .order = std::move(order)});
  };
  // The other way round they are chains as well.
  auto reversed = with({4, 3, 2, 1, 0});
  evict_slowly_until(*reversed, [&] { return dedup(*reversed).pages > 0; });
  // Whoever is next to each other in those lists is not in this one.
  auto apart = with({0, 2, 4, 1, 3});
  evict_slowly_until(*apart, [&] { return dedup(*apart).probes > 0; });
  EXPECT_EQ(dedup(*apart).pages, 0u) << told_of(*apart);
  EXPECT_EQ(dedup(*apart).refused, 0u);
  expect_arrived(*first);
  expect_arrived(*apart);
  expect_arrived(*reversed);
}

TEST_F(DedupScatter, AServerThatEndsTakesItsReferencesAlongAndTheyGoAgain) {
  // Two copies: whenever it ends, what it held and what was on its way to it is there or goes again.
  servers(3);
  const auto content = [](std::uint64_t page) { return page + 1; };
  auto first = guest(4096, content, 1, 2);
  evict_known(*first);
  expect_arrived(*first);
  auto second = guest(4096, content, {.replicas = 2, .stall_timeout = 2500ms});
  std::atomic<bool> evicted = false;
  std::thread killer([&] {
    while (dedup(*second).pages == 0 && !evicted) std::this_thread::sleep_for(1ms);
    vmd[1].end();
  });
  evict_slowly_until(*second, [&] { return dedup(*second).pages > 0; });
  evicted = true;
  killer.join();
  expect_arrived(*second);
}

TEST_F(DedupScatter, WhatTheDirectorySaysWronglyGoesPlainly) {
  servers(1);
  auto first = guest(1024, [](std::uint64_t page) { return page + 1; });
  evict_known(*first);
  expect_arrived(*first);
  // All that the directory knows is out of date now: what it names is gone, and its slots are somebody else's.
  auto keeper = guest(16, [](std::uint64_t) { return 0; });
  vmd[0].stage->drop(first->image);
  auto second = guest(1024, [](std::uint64_t page) { return page + 1; });
  evict_known(*second);
  EXPECT_GT(dedup(*second).refused, 0u) << told_of(*second);
  expect_arrived(*second);
  // And is put right by it.
  auto third = guest(1024, [](std::uint64_t page) { return page + 1; });
  evict_slowly_until(*third, [&] { return dedup(*third).pages > 0; });
  expect_arrived(*third);
  evict(*keeper);
}

// Its every byte comes in time for a wait of its own, and its answer never.
TEST_F(DedupScatter, ADirectoryWhoseAnswerTricklesInHoldsNobodyUp) {
  servers(1);
  network = std::make_unique<SlowDirectory>(vmd[0].listener->port());
  // Among the first that are looked at there are equal ones, which wait for each other.
  auto move = guest(2048, [](std::uint64_t page) { return 1 + page % 4; }, {.directory_patience = 1s});
  evict_slowly_until(*move, [&] { return network->asked() > 0; });
  EXPECT_EQ(dedup(*move).refused, 0u);
  expect_arrived(*move);
}

}  // namespace
}  // namespace memferry::test
