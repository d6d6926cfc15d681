// Two copies of every page at servers, and who knows where they are, while servers are cut, full or fail.
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <set>
#include <thread>
#include <vector>

#include "scatter_fixture.h"

namespace memferry::sender_test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;
using wire::FrameType;
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
  void await_failed(unsigned server) {
    const auto failed = [&] { return !sender->stats().servers[server].failed.empty(); };
    for (int i = 0; i < 20'000 && !failed(); ++i) std::this_thread::sleep_for(1ms);
    ASSERT_TRUE(failed());
  }
  // Where the destination was told last that a page is.
  std::map<std::uint64_t, Holders> told() {
    std::map<std::uint64_t, Holders> all;
    const std::lock_guard lock(peer->mutex);
    for (const SeenFrame& frame : peer->seen) {
      if (frame.type() != FrameType::kMap) continue;
      for (std::uint64_t i = 0; i < frame.header.page_count; ++i)
        all[frame.header.first_page + i] = Holders::of(frame.header.tag);
    }
    return all;
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

// The servers' room ends; the destination takes nothing for a while, which is shorter than it may be silent.
TEST_F(ReplicasTest, WithoutRoomForTwoCopiesTheDestinationTakesTheRest) {
  push(6000, 3);
  stages[1]->room = 700;
  stages[2]->room = 900;
  sender->start_push();
  for (int i = 0; i < 20'000 && !has(1, 600); ++i) std::this_thread::sleep_for(1ms);
  std::this_thread::sleep_for(500ms);
  EXPECT_TRUE(events.empty());
  open_direct();
  events.expect(kEvicted);
  expect_two_copies();
  EXPECT_GT(sender->stats().pages_direct, 3000u);
  EXPECT_EQ(sender->stats().pages_single, 0u);
}

// Nor does it come to take any: then one copy is better than none, and it is said.
TEST_F(ReplicasTest, WithoutRoomForTwoCopiesAndWithoutADestinationOneCopyDoes) {
  push(6000, 3, 1s);
  stages[1]->room = 700;
  stages[2]->room = 900;
  sender->start_push();
  events.expect(kEvicted);
  expect_evicted();
  EXPECT_GT(sender->stats().pages_single, 0u);
}

// One that is there again and again, and takes nothing, is no place for what is left either.
TEST_F(ReplicasTest, ADestinationThatOnlyComesBackHoldsUpNothing) {
  make({6000}, 3);
  acquaint();
  std::atomic<bool> takes{true};
  peer->on_frame = [&](const SeenFrame& frame) {
    return takes || frame.type() == FrameType::kSwitch || frame.channel == kChannels;
  };
  SenderConfig with = config();
  with.replicas = 2;
  into_postcopy(std::move(with));
  takes = false;
  stages[1]->room = 700;
  stages[2]->room = 900;
  sender->start_push();
  for (int i = 0; i < 20'000 && !has(1, 600); ++i) std::this_thread::sleep_for(1ms);
  for (std::uint32_t epoch = 1; epoch <= 2; ++epoch) {
    std::this_thread::sleep_for(100ms);
    EXPECT_TRUE(events.empty()) << epoch;
    peer->cut();
    events.expect(kPaused);
    peer->stop();
    peer->accept_epoch(epoch);
    events.expect(kRecovered);
  }
  std::this_thread::sleep_for(100ms);
  EXPECT_TRUE(events.empty());
  // The third: nobody needs it any more.
  peer->cut();
  EngineEvent event = events.next();
  while (event.kind == kPaused) event = events.next();
  EXPECT_EQ(static_cast<int>(event.kind), static_cast<int>(kEvicted)) << event.code << event.message;
  expect_evicted();
  EXPECT_GT(sender->stats().pages_single, 0u);
}

TEST_F(ReplicasTest, AParkWithoutRoomForTwoCopiesFails) {
  park(6000, 3, 2);
  stages[1]->room = 700;
  stages[2]->room = 900;
  sender->start_round(1);
  EXPECT_EQ(events.expect(kFailed).code, "VMD_CAPACITY");
}

// One of two has failed: that is what the second copy is for.
TEST_F(ReplicasTest, AParkWithOneServerLeftGoesOn) {
  park(6000, 2, 2);
  sender->give_up_server(1, "a test");
  sender->start_round(1);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 0u);
  expect_evicted({1});
  EXPECT_EQ(sender->stats().pages_single, all_pages());
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

class IndexTest : public ReplicasTest {
 protected:
  static constexpr unsigned kServers = 6;
  static constexpr unsigned kIndex = 4;

  void push_and_lose_the_index() {
    make({12000}, kServers);
    block_direct();
    for (unsigned i = 0; i < kIndex; ++i) {
      stages[i]->cut_at = 200;
      stages[i]->lost_when_cut = true;
    }
    into_postcopy(config());
    sender->start_push();
    for (unsigned i = 0; i < kIndex; ++i) await_failed(i);
  }
};

TEST_F(IndexTest, WithoutItAPushIsDrainedWhenTheDestinationKnows) {
  push_and_lose_the_index();
  const auto safe = [&] { return pages_at_servers() + sender->stats().pages_direct == all_pages(); };
  for (int i = 0; i < 20'000 && !safe(); ++i) std::this_thread::sleep_for(1ms);
  ASSERT_TRUE(safe());
  std::this_thread::sleep_for(200ms);
  EXPECT_TRUE(events.empty()) << "the destination knows nothing yet";
  open_direct();
  events.expect(kEvicted);
  const auto where = told();
  const std::lock_guard lock(peer->mutex);
  std::uint64_t elsewhere = 0;
  for (std::uint64_t page = 0; page < all_pages(); ++page) {
    const auto* want = oracle[0].data() + page * page_size();
    if (peer->have[0][page]) {
      ASSERT_EQ(std::memcmp(peer->memory[0].data() + page * page_size(), want, page_size()), 0) << page;
      continue;
    }
    ++elsewhere;
    const auto found = where.find(page);
    ASSERT_NE(found, where.end()) << page;
    ASSERT_GE(found->second.first, kIndex) << page;
    ASSERT_LT(found->second.first, kServers) << page;
    FakeStage& holder = *stages[found->second.first];
    const std::lock_guard looking(holder.mutex);
    const auto held = holder.pages.find({0, page});
    ASSERT_NE(held, holder.pages.end()) << page;
    if (held->second.content.empty()) continue;  // zeros
    ASSERT_EQ(std::memcmp(held->second.content.data(), want, page_size()), 0) << page;
  }
  EXPECT_GT(elsewhere, 0u);
}

TEST_F(IndexTest, WithoutItADestinationThatDoesNotComeBackEndsTheMigration) {
  make({12000}, kServers);
  block_direct();
  for (unsigned i = 0; i < kIndex; ++i) {
    stages[i]->cut_at = 200;
    stages[i]->lost_when_cut = true;
  }
  SenderConfig with = config();
  with.recover_timeout = 1s;
  into_postcopy(std::move(with));
  sender->start_push();
  for (unsigned i = 0; i < kIndex; ++i) await_failed(i);
  open_direct();
  peer->cut();
  events.expect(kPaused);
  EXPECT_EQ(events.expect(kFailed).code, "RECOVERY_TIMEOUT");
}

TEST_F(IndexTest, WithoutItAParkFails) {
  park(12000, kServers, 1);
  for (unsigned i = 0; i < kIndex; ++i) {
    stages[i]->cut_at = 100;
    stages[i]->lost_when_cut = true;
  }
  sender->start_round(1);
  const EngineEvent failed = events.expect(kFailed);
  EXPECT_EQ(failed.code, "VMD_LOST");
  EXPECT_NE(failed.message.find("lost the image"), std::string::npos) << failed.message;
}

}  // namespace
}  // namespace memferry::sender_test
