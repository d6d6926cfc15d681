// Both engines together, over loopback: what the source has is what the destination gets, by every direct way.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "fake_source.h"
#include "os/userfaultfd.h"
#include "track/dirty_tracker.h"
#include "transfer/sender.h"

namespace memferry::test {
namespace {

constexpr std::uint64_t kPages = 2048;

struct Pair {
  explicit Pair(bool track) : bench(kPages), source(Region::allocate(kPages * bench.page_size)) {
    const auto content = random_bytes(kPages / 2 * bench.page_size, 77);
    std::memcpy(page(0), content.data(), content.size());  // the other half is never touched
    bench.config.keep_page_hashes = true;
    config.regions = {source};
    config.trackers.push_back(nullptr);
    if (track) {
      config.trackers[0] = make_tracker(TrackerKind::kUffdWpAsync, source);
      config.trackers[0]->arm();
    }
    config.host = "127.0.0.1";
    config.migration = bench.config.migration;
    config.channels = bench.config.channels;
    config.tokens = bench.config.tokens;
    config.on_event = log.callback();
  }
  void connect() {
    bench.start();
    config.port = bench.listener->port();
    config.goodbye_timeout = 5s;
    sender = std::make_unique<Sender>(config);
    sender->connect();
    if (log.wait(EngineEventKind::kConnected).kind != EngineEventKind::kConnected) FAIL();
  }
  std::byte* page(std::uint64_t number) const { return source->address(PageNumber{number}).pointer(); }
  void write(std::uint64_t seed, int pages) {
    std::mt19937_64 random(seed);
    for (int i = 0; i < pages; ++i) {
      const std::uint64_t value = random();
      std::memcpy(page(random() % kPages) + 64, &value, sizeof value);
    }
  }
  void expect_equal() {
    EXPECT_EQ(std::memcmp(page(0), bench.memory().data(), bench.memory().size()), 0);
    EXPECT_EQ(sender->digest(0), bench.receiver->digest(0));
    EXPECT_EQ(bench.receiver->stats().pages_missing, 0U);
  }

  EventLog log;  // of the source
  Bench bench;   // the destination's side; its script is not used
  std::shared_ptr<Region> source;
  SenderConfig config;
  std::unique_ptr<Sender> sender;
};

TEST(Engine, StopAndCopy) {
  Pair pair(false);
  pair.connect();
  pair.sender->queue_populated();
  pair.sender->start_round(1);
  EXPECT_EQ(pair.log.wait(EngineEventKind::kRoundDone).suspects, 0U);
  EXPECT_TRUE(pair.bench.receiver->ready());
  pair.expect_equal();
  pair.sender->close(true);
  pair.bench.log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(pair.bench.log.count(EngineEventKind::kFailed), 0U);
}

class EngineTracked : public testing::Test {
 protected:
  void SetUp() override {
    for (const TrackerProbe& probe : probe_trackers()) {
      if (probe.name == "uffd-wp-async" && !probe.available) GTEST_SKIP() << probe.reason;
    }
    if (!Userfaultfd::probe().kernel_faults) GTEST_SKIP() << "no full userfaultfd here";
  }
};

// The guest writes while its pages go: whatever was torn must come again.
TEST_F(EngineTracked, PreCopyUnderAWriter) {
  Pair pair(true);
  pair.connect();
  std::atomic<bool> paused{false};
  std::thread guest([&] {
    for (std::uint64_t seed = 0; !paused; ++seed) pair.write(seed, 200);
  });
  pair.sender->queue_populated();
  for (std::uint64_t round = 1; round <= 4; ++round) {
    pair.sender->start_round(round);
    pair.log.wait(EngineEventKind::kRoundDone, round - 1);
    if (round == 4) {
      paused = true;
      guest.join();
    }
    pair.sender->queue_dirty();
  }
  for (std::uint64_t round = 5; round <= 6; ++round) {
    pair.sender->start_round(round);
    EXPECT_EQ(pair.log.wait(EngineEventKind::kRoundDone, round - 1).suspects, 0U);
  }
  EXPECT_TRUE(pair.bench.receiver->ready());
  pair.expect_equal();
  pair.sender->close(true);
}

TEST_F(EngineTracked, HybridWithAReaderAtTheDestination) {
  Pair pair(true);
  pair.bench.config.may_page = true;
  pair.connect();
  pair.sender->queue_populated();
  pair.sender->start_round(1);
  pair.log.wait(EngineEventKind::kRoundDone);
  pair.write(1, 500);
  pair.sender->discard_dirty(2);
  pair.log.wait(EngineEventKind::kRoundDone, 1);
  pair.write(2, 300);
  EXPECT_GT(pair.sender->switch_over(), 0U);
  pair.log.wait(EngineEventKind::kSwitched);
  EXPECT_TRUE(pair.bench.receiver->ready());
  std::thread reader([&] {
    std::mt19937_64 random(5);
    for (int i = 0; i < 400; ++i) {
      const std::uint64_t page = random() % kPages;
      ASSERT_EQ(std::memcmp(pair.bench.page(page), pair.page(page), pair.bench.page_size), 0);
    }
  });
  reader.join();
  EXPECT_GT(pair.bench.receiver->stats().faults.count, 0U);
  pair.sender->start_push();
  pair.log.wait(EngineEventKind::kEvicted);
  pair.bench.log.wait(EngineEventKind::kComplete);
  pair.expect_equal();
  pair.sender->close(true);
}

TEST_F(EngineTracked, PostCopyWithPushAndReaders) {
  Pair pair(false);
  pair.bench.config.paging_from_start = true;
  pair.connect();
  pair.sender->queue_populated();
  pair.sender->switch_over();
  pair.log.wait(EngineEventKind::kSwitched);
  pair.sender->start_push();
  std::vector<std::thread> readers;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    readers.emplace_back([&, seed] {
      std::mt19937_64 random(seed);
      for (int i = 0; i < 400; ++i) {
        const std::uint64_t page = seed == 0 ? static_cast<std::uint64_t>(i) * 3 : random() % kPages;
        ASSERT_EQ(std::memcmp(pair.bench.page(page), pair.page(page), pair.bench.page_size), 0);
      }
    });
  }
  for (std::thread& reader : readers) reader.join();
  pair.log.wait(EngineEventKind::kEvicted);
  pair.bench.log.wait(EngineEventKind::kComplete);
  pair.expect_equal();
  pair.sender->close(true);
}

}  // namespace
}  // namespace memferry::test
