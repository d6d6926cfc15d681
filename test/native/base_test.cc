// Both engines, and a destination that starts from a base: what is equal stays, what differs comes, and every byte is
// what the source has, whatever the guest wrote meanwhile.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "fake_source.h"
#include "track/dirty_tracker.h"
#include "transfer/sender.h"

namespace memferry::test {
namespace {

using enum EngineEventKind;

constexpr std::uint64_t kPages = 5 * wire::kTreeNodePages + 40;
constexpr std::uint64_t kAllNodes = ~std::uint64_t{0};

struct Case {
  TrackerKind tracker;
  bool may_page;
};

class BaseTest : public testing::TestWithParam<Case> {
 protected:
  BaseTest() : bench(kPages, 2) {}
  ~BaseTest() override {
    if (sender) sender->close(false);
  }

  // The source's regions hold random bytes in most pages; the base is the same but for every n-th page.
  void fill(std::uint64_t differs) {
    std::mt19937_64 random(3);
    for (std::size_t r = 0; r < 2; ++r) {
      source.push_back(Region::allocate(kPages * bench.page_size));
      for (std::uint64_t page = 0; page < kPages; ++page) {
        if (page % 7 == 6) continue;  // never touched
        auto* words = reinterpret_cast<std::uint64_t*>(at(page, r));
        for (std::uint64_t i = 0; i < bench.page_size / 8; ++i) words[i] = random();
      }
    }
    bases = differs;
  }
  void copy_base() {
    for (std::size_t r = 0; r < 2; ++r) {
      for (std::uint64_t page = 0; page < kPages; ++page) {
        std::memcpy(bench.page(page, r), at(page, r), bench.page_size);
        if (bases > 0 && page % bases == 0) bench.page(page, r)[page % bench.page_size] ^= std::byte{1};
      }
    }
  }
  void connect() {
    for (std::size_t i = 0; i < bench.config.base_key.size(); ++i)
      bench.config.base_key[i] = static_cast<std::uint8_t>(i * 7);
    bench.config.may_page = GetParam().may_page;
    bench.config.keep_page_hashes = true;
    bench.config.bases = {ReceiverConfig::Base::kGiven, ReceiverConfig::Base::kGiven};
    bench.start();
    copy_base();
    if (ready_at_once) bench.receiver->base_ready();
    SenderConfig config;
    config.regions = source;
    for (const auto& region : source) {
      trackers.push_back(make_tracker(GetParam().tracker, region));
      trackers.back()->arm();
      config.trackers.push_back(trackers.back());
    }
    config.host = "127.0.0.1";
    config.port = bench.listener->port();
    config.migration = bench.config.migration;
    config.channels = bench.config.channels;
    config.tokens = bench.config.tokens;
    config.base_pages = {kPages, kPages};
    config.base_key = bench.config.base_key;
    config.on_event = left.callback();
    sender = std::make_unique<Sender>(std::move(config));
    sender->connect();
    left.wait(kConnected);
  }
  void done(std::uint64_t tag) { EXPECT_EQ(left.wait(kRoundDone, rounds++).tag, tag); }
  void compare() {
    sender->compare_base(100, 2, CompareDepth::kSample);
    done(100);
    sender->compare_base(101, kAllNodes, CompareDepth::kAll);
    done(101);
  }
  std::byte* at(std::uint64_t page, std::size_t region = 0) {
    return source[region]->address(PageNumber{page}).pointer();
  }
  void expect_equal() {
    for (std::size_t r = 0; r < 2; ++r) {
      for (std::uint64_t page = 0; page < kPages; ++page) {
        ASSERT_EQ(std::memcmp(at(page, r), bench.page(page, r), bench.page_size), 0) << r << " " << page;
      }
      const auto index = static_cast<std::uint32_t>(r);
      EXPECT_EQ(sender->digest(index), bench.receiver->digest(index));
    }
  }
  void finish() {
    if (GetParam().may_page) {
      sender->switch_over();
      left.wait(kSwitched);
      sender->start_push();
      left.wait(kEvicted);
    } else {
      sender->queue_dirty();
      sender->start_round(200);
      done(200);
      EXPECT_TRUE(bench.receiver->ready());
    }
  }

  Bench bench;
  std::vector<std::shared_ptr<Region>> source;
  std::vector<std::shared_ptr<DirtyTracker>> trackers;
  EventLog left;
  std::unique_ptr<Sender> sender;
  std::size_t rounds = 0;
  std::uint64_t bases = 0;
  bool ready_at_once = true;
};

TEST_P(BaseTest, OfAnEqualBaseNothingComes) {
  fill(0);
  connect();
  sender->queue_populated();
  compare();
  sender->end_base(102, GetParam().may_page);
  done(102);
  EXPECT_EQ(sender->stats().base.pages_same, 2 * kPages);
  EXPECT_EQ(sender->stats().pages_pending, 0u);
  finish();
  EXPECT_EQ(sender->stats().pages_sent, 0u);
  EXPECT_EQ(bench.receiver->stats().pages_from_base, 2 * kPages);
  expect_equal();
}

TEST_P(BaseTest, OnlyWhatDiffersComes) {
  fill(5);
  connect();
  sender->queue_populated();
  sender->probe(99, 300 * 1024);
  done(99);
  compare();
  sender->end_base(102, GetParam().may_page);
  done(102);
  const std::uint64_t differ = 2 * ((kPages + 4) / 5);
  EXPECT_EQ(sender->stats().base.pages_same, 2 * kPages - differ);
  EXPECT_EQ(sender->stats().pages_pending, differ);
  finish();
  EXPECT_EQ(sender->stats().pages_sent + sender->stats().pages_zero, differ);
  expect_equal();
}

TEST_P(BaseTest, OfAnotherGuestsMemoryNothingStays) {
  fill(1);
  connect();
  sender->queue_populated();
  compare();
  sender->end_base(102, GetParam().may_page);
  done(102);
  EXPECT_EQ(sender->stats().base.pages_same, 0u);
  finish();
  expect_equal();
}

// What was never confirmed must not be read as what it was: not even where nobody says so.
TEST_P(BaseTest, ABaseThatWasNotComparedIsForgottenByTheSwitch) {
  fill(3);
  connect();
  sender->queue_populated();
  sender->compare_base(100, 1, CompareDepth::kSample);
  done(100);
  const std::uint64_t same = sender->stats().base.pages_same;
  EXPECT_GT(same, 0u);
  finish();
  EXPECT_EQ(sender->stats().pages_sent + sender->stats().pages_zero, 2 * kPages - same);
  expect_equal();
}

TEST_P(BaseTest, AGuestThatWritesHardMeanwhileLosesNothing) {
  fill(6);
  connect();
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> writes{0};
  std::thread guest([&] {
    std::mt19937_64 random(8);
    while (!stop) {
      const std::uint64_t choice = random();
      // It leaves a quarter alone: however slow the comparison is, something is equal.
      const std::uint64_t page = (choice >> 8) % (kPages * 3 / 4);
      auto* word = reinterpret_cast<std::uint64_t*>(at(page, choice % 2)) + (choice >> 40) % 512;
      // Half of the writes take themselves back: the page is then as the base has it again.
      const std::uint64_t former = *word;
      *word = choice;
      if (choice % 4 < 2) *word = former;
      ++writes;
    }
  });
  sender->queue_populated();
  compare();
  sender->end_base(102, GetParam().may_page);
  done(102);
  const std::uint64_t before = writes;
  while (writes < before + 500) std::this_thread::yield();
  stop = true;
  guest.join();
  finish();
  EXPECT_GT(sender->stats().base.pages_same, 0u);
  expect_equal();
}

// Asked about as it is before a log is applied to it, and compared when it has been: what was learnt for the question
// says nothing of the comparison, on either side.
TEST_P(BaseTest, AnEstimateLeavesNothingBehind) {
  fill(4);
  ready_at_once = false;
  connect();
  sender->queue_populated();
  bench.receiver->base_sampled(false);
  sender->compare_base(99, 1, CompareDepth::kEstimate);
  done(99);
  const BaseStats estimated = sender->stats().base;
  EXPECT_GT(estimated.pages_estimated, 0u);
  EXPECT_GT(estimated.pages_alike, 0u);
  EXPECT_LT(estimated.pages_alike, estimated.pages_estimated);
  EXPECT_EQ(estimated.pages_compared, 0u);
  EXPECT_EQ(estimated.pages_same, 0u);
  EXPECT_EQ(bench.receiver->stats().pages_from_base, 0u);
  // What differed is right now; what was alike differs, on one side or on the other.
  for (std::size_t r = 0; r < 2; ++r) {
    for (std::uint64_t page = 0; page < kPages; ++page) {
      std::memcpy(bench.page(page, r), at(page, r), bench.page_size);
      if (page % 4 == 1) bench.page(page, r)[page % bench.page_size] ^= std::byte{1};
      if (page % 4 == 2 && page % 7 != 6) at(page, r)[page % bench.page_size] ^= std::byte{1};
    }
  }
  bench.receiver->base_ready();
  compare();
  EXPECT_EQ(sender->stats().base.pages_alike, estimated.pages_alike);
  std::uint64_t same = 0;
  for (std::uint64_t page = 0; page < kPages; ++page)
    same += page % 4 == 1 || (page % 4 == 2 && page % 7 != 6) ? 0 : 2;
  EXPECT_EQ(sender->stats().base.pages_same, same);
  sender->end_base(102, GetParam().may_page);
  done(102);
  finish();
  expect_equal();
}

// Confirmed as B, then A again as it was when the tracker was armed: only a tracker that was told of B sees it.
TEST_P(BaseTest, APageThatWasConfirmedAndThenTakenBackIsSentAgain) {
  fill(0);
  connect();
  const std::vector<std::byte> before(at(10), at(10) + bench.page_size);
  at(10)[100] ^= std::byte{0xff};
  bench.page(10)[100] ^= std::byte{0xff};
  sender->queue_populated();
  compare();
  EXPECT_EQ(sender->stats().base.pages_same, 2 * kPages);
  std::memcpy(at(10), before.data(), before.size());
  sender->end_base(102, GetParam().may_page);
  done(102);
  finish();
  expect_equal();
}

TEST_P(BaseTest, NothingIsComparedAfterTheFirstRound) {
  fill(2);
  connect();
  sender->queue_populated();
  sender->start_round(1);
  done(1);
  EXPECT_THROW(sender->compare_base(2, kAllNodes, CompareDepth::kAll), std::logic_error);
  finish();
  expect_equal();
}

INSTANTIATE_TEST_SUITE_P(
    All, BaseTest,
    testing::Values(Case{TrackerKind::kHashDiff, false}, Case{TrackerKind::kHashDiff, true},
                    Case{TrackerKind::kUffdWpAsync, false}, Case{TrackerKind::kUffdWpAsync, true}),
    [](const auto& of) {
      return std::string(of.param.tracker == TrackerKind::kHashDiff ? "HashDiff" : "Uffd") +
             (of.param.may_page ? "Paging" : "Filling");
    });

}  // namespace
}  // namespace memferry::test
