// A parked guest that is gathered by a destination that has something like it in a file: what is the same does not come,
// whatever else the file has changes nothing. Every byte is compared.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <thread>

#include "gather_base_rig.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;

class GatherBaseTest : public GatherBaseRig {};

TEST_F(GatherBaseTest, OnlyWhatDiffersComes) {
  make(2048, 2);
  auto base = guest;
  const std::uint64_t changed = change(base, 5);
  gather(file_of(base));
  arrivals.await(EngineEventKind::kComplete);
  expect_right();
  const auto stats = receiver->stats();
  EXPECT_EQ(stats.pages_gathered, changed);
  EXPECT_EQ(stats.pages_from_base, content_pages() - changed);
  EXPECT_EQ(stats.base_problem, "");
  std::uint64_t bytes = 0;
  for (const auto& server : stats.servers) bytes += server.bytes;
  EXPECT_LT(bytes, (changed + content_pages() / 64) * page_size());
}

TEST_F(GatherBaseTest, AllOfIt) {
  make(512, 1);
  gather(file_of(guest));
  arrivals.await(EngineEventKind::kComplete);
  expect_right();
  EXPECT_EQ(receiver->stats().pages_gathered, 0u);
  EXPECT_EQ(receiver->stats().pages_from_base, content_pages());
}

TEST_F(GatherBaseTest, OfAnotherGuestNothing) {
  make(1024, 2);
  gather(file_of(random_pages(1024, 77)));
  arrivals.await(EngineEventKind::kComplete);
  expect_right();
  EXPECT_EQ(receiver->stats().pages_from_base, 0u);
  EXPECT_EQ(receiver->stats().pages_gathered, content_pages());
}

TEST_F(GatherBaseTest, AFileThatIsShorter) {
  make(1024, 1);
  // And ends in the middle of a page.
  const std::size_t cut = 300 * page_size() + 100;
  gather(file_of(std::span(guest).first(cut)));
  arrivals.await(EngineEventKind::kComplete);
  expect_right();
  EXPECT_EQ(receiver->stats().pages_from_base, content_pages(300));
  EXPECT_EQ(receiver->stats().base_problem, "");
}

TEST_F(GatherBaseTest, AFileThatBeginsLater) {
  make(256, 1);
  std::vector<std::byte> base(12345);
  base.insert(base.end(), guest.begin(), guest.end());
  gather({.path = file_of(base).path, .offset_bytes = 12345});
  arrivals.await(EngineEventKind::kComplete);
  expect_right();
  EXPECT_EQ(receiver->stats().pages_from_base, content_pages());
}

TEST_F(GatherBaseTest, WhatCannotBeReadCostsTheBase) {
  for (const bool directory : {false, true}) {
    make(256, 1);
    gather({.path = directory ? std::string("/tmp") : std::string("/nowhere/at/all"), .offset_bytes = 0});
    arrivals.await(EngineEventKind::kComplete);
    expect_right();
    EXPECT_EQ(receiver->stats().pages_from_base, 0u);
    EXPECT_NE(receiver->stats().base_problem, "");
    end();
  }
}

// Written and cut off by somebody else all the while.
TEST_F(GatherBaseTest, AFileThatChangesMeanwhile) {
  make(2048, 2);
  const BaseImage base = file_of(guest);
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    std::mt19937_64 random(4);
    const auto other = random_pages(1, 99);
    while (!stop) {
      const std::uint64_t page = random() % 2048;
      std::FILE* file = std::fopen(base.path.c_str(), "r+b");
      if (file == nullptr) continue;
      std::fseek(file, static_cast<long>(page * page_size()), SEEK_SET);
      const auto* bytes = page % 2 == 0 ? other.data() : guest.data() + page * page_size();
      std::fwrite(bytes, 1, page_size(), file);
      std::fclose(file);
      if (random() % 64 == 0) (void)::truncate(base.path.c_str(), static_cast<off_t>(page * page_size()));
    }
  });
  gather(base);
  arrivals.await(EngineEventKind::kComplete);
  stop = true;
  writer.join();
  expect_right();
}

// By hand: in two stripes of a block the low half of what a lane is multiplied with is zero, so only the sum of the high
// halves counts.
TEST_F(GatherBaseTest, APageWithTheSameXxh3IsNotTaken) {
  make(64, 1);
  std::vector<std::byte> base = guest;
  const auto [one, other] = same_xxh3();
  ASSERT_NE(one, other);
  ASSERT_EQ(xxh3_64(one), xxh3_64(other));
  ASSERT_EQ(one.size(), page_size());
  std::copy(one.begin(), one.end(), guest.begin() + static_cast<std::ptrdiff_t>(7 * page_size()));
  std::copy(other.begin(), other.end(), base.begin() + static_cast<std::ptrdiff_t>(7 * page_size()));
  gather(file_of(base));
  arrivals.await(EngineEventKind::kComplete);
  expect_right();
  EXPECT_EQ(receiver->stats().pages_from_base, content_pages() - 1);
  EXPECT_EQ(receiver->stats().pages_gathered, 1u);
}

TEST_F(GatherBaseTest, WhoTouchesMeanwhileIsServed) {
  make(4096, 2);
  auto base = guest;
  change(base, 3);
  gather(file_of(base));
  std::atomic<std::uint64_t> wrong{0};
  std::vector<std::thread> touchers;
  for (unsigned seed = 0; seed < 3; ++seed) {
    touchers.emplace_back([&, seed] {
      std::mt19937 random(seed);
      for (unsigned i = 0; i < 2000; ++i) {
        const std::uint64_t page = seed == 0 ? i : random() % 4096;
        if (!right(page)) ++wrong;
      }
    });
  }
  for (std::thread& each : touchers) each.join();
  EXPECT_EQ(wrong, 0u);
  arrivals.await(EngineEventKind::kComplete);
  expect_right();
  const auto stats = receiver->stats();
  EXPECT_GE(stats.pages_from_base + stats.pages_gathered, content_pages());
}

TEST_F(GatherBaseTest, AServerEndsAndTheReplicasHaveTheRest) {
  make(4096, 2, true);
  auto base = guest;
  change(base, 2);
  gather(file_of(base), 8 << 20);
  while (receiver->stats().pages_gathered < 100) std::this_thread::sleep_for(1ms);
  vmd[1].end();
  receiver->set_gather_limit(0);
  arrivals.await(EngineEventKind::kComplete);
  expect_right();
  EXPECT_GT(receiver->stats().pages_from_base, 0u);
}

TEST_F(GatherBaseTest, ClosedInTheMiddle) {
  for (unsigned wait_ms = 0; wait_ms < 12; ++wait_ms) {
    make(2048, 2);
    gather(file_of(guest));
    std::this_thread::sleep_for(std::chrono::milliseconds(wait_ms));
    end();
  }
}

TEST_F(GatherBaseTest, OneThatSaysNothingOfItsPagesIsAskedForThem) {
  for (const auto how : {Answer::kEnds, Answer::kWrong, Answer::kPages, Answer::kAbsent}) {
    make_fake(256, how);
    gather(file_of(guest));
    arrivals.await(EngineEventKind::kComplete);
    expect_right();
    EXPECT_EQ(receiver->stats().pages_from_base, 0u) << static_cast<int>(how);
    EXPECT_EQ(receiver->stats().base_problem.empty(), how == Answer::kWrong || how == Answer::kAbsent);
    end();
  }
}

TEST_F(GatherBaseTest, NotForAGuestThatHasASource) {
  make(64, 1);
  ReceiverConfig config = config_of(file_of(guest));
  config.sourceless = false;
  EXPECT_THROW(Receiver::create(std::move(config)), std::invalid_argument);
}

}  // namespace
}  // namespace memferry::test
