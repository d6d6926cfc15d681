// Two copies of every page at servers, while servers are cut, full or fail.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <thread>
#include <vector>

#include "scatter_fixture.h"

namespace memferry::sender_test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;
using wire::Holders;

class ReplicasTest : public ScatterTest {
 protected:
  void push(std::uint64_t pages, unsigned servers, std::chrono::milliseconds stall_timeout = 60s) {
    make({pages}, servers);
    acquaint();
    block_direct();
    SenderConfig with = config();
    with.replicas = 2;
    with.stall_timeout = stall_timeout;
    into_postcopy(std::move(with));
  }
  void park(std::uint64_t pages, unsigned servers, unsigned replicas) {
    make({pages}, servers);
    acquaint();
    SenderConfig with = config();
    with.direct = false;
    with.replicas = replicas;
    sender = std::make_unique<Sender>(std::move(with));
    sender->connect();
    events.expect(kConnected);
    sender->queue_populated();
  }
  void acquaint() {
    std::vector<FakeStage*> all;
    for (const auto& each : stages) all.push_back(each.get());
    for (const auto& each : stages) each->others = all;
  }
  // And at the second holder.
  void expect_two_copies(const std::set<unsigned>& dead = {}) {
    expect_evicted(dead, 2);
    if (HasFailure()) return;
    for (const auto& [key, record] : records(first_live(dead))) {
      if (record.holders.first == Holders::kDestination) continue;
      ASSERT_EQ(dead.count(record.holders.second), 0u);
      FakeStage& second = *stages.at(record.holders.second);
      const std::lock_guard lock(second.mutex);
      const auto found = second.pages.find(key);
      ASSERT_NE(found, second.pages.end()) << "page " << key.second;
      if (record.zero) continue;
      const auto* want = oracle[key.first].data() + key.second * page_size();
      ASSERT_EQ(std::memcmp(found->second.content.data(), want, page_size()), 0) << "page " << key.second;
    }
  }
  std::map<FakeStage::Key, FakeStage::Record> records(unsigned server) {
    const std::lock_guard lock(stages[server]->mutex);
    return stages[server]->records;
  }
};

TEST_F(ReplicasTest, APageWaitsForASecondServerThatIsDialledAgain) {
  push(6000, 2);
  stages[1]->cut_at = 200;
  stages[1]->away_when_cut = true;
  start_push_with(1, [&] { return has(1, 200); });
  std::this_thread::sleep_for(1s);
  EXPECT_TRUE(events.empty());
  stages[1]->refuse = false;
  events.expect(kEvicted);
  expect_two_copies();
  const std::lock_guard lock(stages[1]->mutex);
  EXPECT_GE(stages[1]->hellos, 2u);
}

TEST_F(ReplicasTest, APageWaitsNoLongerThanUntilThatServerFails) {
  push(6000, 2, 1s);
  stages[1]->cut_at = 200;
  stages[1]->away_when_cut = true;
  start_push_with(1, [&] { return has(1, 200); });
  events.expect(kEvicted);
  EXPECT_NE(sender->stats().servers[1].failed, "");
  expect_evicted({1});
}

TEST_F(ReplicasTest, WhatAFailedServerHeldGoesToAnotherOne) {
  push(6000, 3);
  stages[1]->cut_at = 400;
  stages[1]->lost_when_cut = true;
  start_push_with(1, [&] { return has(1, 400); });
  events.expect(kEvicted);
  expect_two_copies({1});
}

// Everything is held twice, and nobody has been told that it will be kept.
TEST_F(ReplicasTest, AServerThatIsGivenUpInTheEndIsReplaced) {
  push(2000, 3);
  sender->hold_eviction(true);
  sender->start_push();
  for (int i = 0; i < 20'000 && pages_at_servers() + sender->stats().pages_direct < all_pages(); ++i)
    std::this_thread::sleep_for(1ms);
  ASSERT_EQ(pages_at_servers() + sender->stats().pages_direct, all_pages());
  sender->give_up_server(2, "it keeps nothing");
  sender->hold_eviction(false);
  events.expect(kEvicted);
  expect_two_copies({2});
}

TEST_F(ReplicasTest, WithTwoServersOneCopyIsEnoughWhenOneFails) {
  push(6000, 2);
  stages[1]->cut_at = 400;
  stages[1]->lost_when_cut = true;
  start_push_with(1, [&] { return has(1, 400); });
  events.expect(kEvicted);
  expect_evicted({1});
}

TEST_F(ReplicasTest, InRoundsWhatAFailedServerHeldGoesInTheNextOne) {
  park(6000, 3, 2);
  sender->start_round(1);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 0u);
  sender->give_up_server(1, "a test");
  sender->start_round(2);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 0u);
  expect_two_copies({1});
}

TEST_F(ReplicasTest, WhereNobodyTakesASecondCopyTheFirstOneCounts) {
  park(6000, 3, 2);
  sender->start_round(1);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 0u);
  sender->give_up_server(1, "a test");
  stages[2]->room = 0;
  sender->start_round(2);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 0u);
  expect_evicted({1});
}

}  // namespace
}  // namespace memferry::sender_test
