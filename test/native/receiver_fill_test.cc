// Filling: the rounds before switchover.
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "fake_source.h"

namespace memferry::test {
namespace {

TEST(ReceiverFill, TwoChannelsFillEveryByte) {
  Bench bench(1024);
  bench.config.keep_page_hashes = true;
  bench.start();
  bench.connect();
  const auto content = random_bytes(1024 * bench.page_size, 1);
  const std::span<const std::byte> all(content);
  std::thread other(
      [&] { EXPECT_TRUE(bench.data(1).pages(0, 512, all.subspan(content.size() / 2), bench.page_size)); });
  EXPECT_TRUE(bench.data(0).pages(0, 0, all.first(content.size() / 2), bench.page_size));
  other.join();
  EXPECT_TRUE(bench.data(0).barrier(7).answered);
  EXPECT_TRUE(bench.data(1).barrier(7).answered);
  EXPECT_TRUE(bench.receiver->ready());
  EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);

  std::vector<std::uint64_t> hashes(1024);
  hash_pages(content, bench.page_size, hashes.data());
  EXPECT_EQ(bench.receiver->digest(0), xxh3_128(std::as_bytes(std::span(hashes))));
  const ReceiverStats stats = bench.receiver->stats();
  EXPECT_EQ(stats.pages_received, 1024U);
  EXPECT_EQ(stats.pages_missing, 0U);
  EXPECT_GE(stats.bytes_received, content.size());
  for (unsigned i = 0; i <= bench.config.channels; ++i)
    EXPECT_TRUE(bench.wires[i]->frame(wire::FrameType::kGoodbye));
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(bench.log.count(EngineEventKind::kFailed), 0U);
}

// The answer to a barrier is far behind what a slow receiver has before it.
TEST(ReceiverFill, SaysOnceASecondHowFarItIs) {
  Bench bench(64);
  bench.start();
  const auto begun = std::chrono::steady_clock::now();
  bench.connect();
  const auto content = random_bytes(bench.page_size, 5);
  std::uint64_t sent = 0;
  std::vector<std::uint64_t> told;
  while (told.size() < 2) {
    EXPECT_TRUE(bench.data(0).pages(0, sent % 64, content, bench.page_size));
    ++sent;
    EXPECT_TRUE(bench.data(0).frame(wire::FrameType::kBarrier, 0, {}, sent));
    for (;;) {
      const auto answer = bench.data(0).receive_any();
      ASSERT_TRUE(answer);
      if (answer->header.type != static_cast<std::uint16_t>(wire::FrameType::kTaken)) break;
      // Before the answer just now: everything up to the frame before that.
      EXPECT_LE(answer->header.tag, sent * (2 * sizeof(wire::FrameHeader) + bench.page_size));
      EXPECT_GT(answer->header.tag, told.empty() ? 0 : told.back());
      told.push_back(answer->header.tag);
    }
    std::this_thread::sleep_for(20ms);
  }
  EXPECT_GE(std::chrono::steady_clock::now() - begun, 2s);
  EXPECT_GE(told.back(), (sent - 1) * (2 * sizeof(wire::FrameHeader) + bench.page_size));
}

// Long enough for memory to be touched ahead of what arrives, and ending before the region does.
TEST(ReceiverFill, TouchingAheadLeavesZerosBehindTheLastArrival) {
  const std::uint64_t pages = 64 * 256;
  Bench bench(pages);
  bench.start();
  bench.connect();
  const auto content = random_bytes(pages / 2 * bench.page_size, 9);
  EXPECT_TRUE(bench.data(0).pages(0, 0, content, bench.page_size));
  EXPECT_TRUE(bench.data(0).zeros(0, pages / 2, pages / 2));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  EXPECT_TRUE(bench.receiver->ready());
  EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
  const auto rest = bench.memory().subspan(content.size());
  EXPECT_TRUE(std::all_of(rest.begin(), rest.end(), [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST(ReceiverFill, LaterRoundsOverwriteAndZeroRunsEmpty) {
  for (const bool may_page : {false, true}) {
    Bench bench(256);
    bench.config.may_page = may_page;
    bench.start();
    bench.connect();
    auto content = random_bytes(256 * bench.page_size, 2);
    EXPECT_TRUE(bench.data(0).pages(0, 0, content, bench.page_size));
    EXPECT_TRUE(bench.data(0).barrier(1).answered);
    const auto newer = random_bytes(8 * bench.page_size, 3);
    std::memcpy(content.data() + 40 * bench.page_size, newer.data(), newer.size());
    EXPECT_TRUE(bench.data(1).pages(0, 40, newer, bench.page_size));
    for (const auto& [first, count] : {std::pair<std::uint64_t, std::uint64_t>{3, 2}, {100, 90}}) {
      std::memset(content.data() + first * bench.page_size, 0, count * bench.page_size);
      EXPECT_TRUE(bench.data(1).zeros(0, first, count));
    }
    EXPECT_TRUE(bench.data(1).barrier(2).answered);
    EXPECT_TRUE(bench.receiver->ready());
    EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
  }
}

TEST(ReceiverFill, KeptMemoryIsEmptiedByZeroRuns) {
  Bench bench(128);
  bench.config.discard_first = false;
  std::memset(bench.page(0), 0x5a, 128 * bench.page_size);
  bench.start();
  bench.connect();
  EXPECT_TRUE(bench.data(0).zeros(0, 0, 128));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  for (const std::byte byte : bench.memory()) ASSERT_EQ(byte, std::byte{0});
}

TEST(ReceiverFill, DiscardFirstForgetsWhatWasThere) {
  Bench bench(16);
  std::memset(bench.page(0), 0x5a, 16 * bench.page_size);
  bench.start();
  for (const std::byte byte : bench.memory()) ASSERT_EQ(byte, std::byte{0});
  EXPECT_FALSE(bench.receiver->ready());
  EXPECT_EQ(bench.receiver->stats().pages_missing, 16U);
}

TEST(ReceiverFill, TornPagesAreSuspectUntilTheyComeAgain) {
  Bench bench(64);
  bench.config.keep_page_hashes = true;
  bench.start();
  bench.connect();
  const auto content = random_bytes(64 * bench.page_size, 4);
  const std::span<const std::byte> all(content);
  // Channel 1 sends pages 8..15 torn: the header was sealed over other bytes.
  const wire::FrameHeader header =
      Wire::pages_header(0, 8, all.subspan(8 * bench.page_size, 8 * bench.page_size), bench.page_size);
  const auto torn = random_bytes(8 * bench.page_size, 5);
  EXPECT_TRUE(bench.data(1).raw(&header, sizeof header) && bench.data(1).raw(torn.data(), torn.size()));
  EXPECT_TRUE(bench.data(0).pages(0, 0, all.first(8 * bench.page_size), bench.page_size));
  EXPECT_TRUE(bench.data(0).pages(0, 16, all.subspan(16 * bench.page_size), bench.page_size));
  const auto second = bench.data(1).barrier(1);
  EXPECT_EQ(second.suspect_pages, 8U);
  ASSERT_EQ(second.suspects.size(), 1U);
  EXPECT_EQ(second.suspects[0].first_page, 8U);
  EXPECT_EQ(second.suspects[0].page_count, 8U);
  const auto first = bench.data(0).barrier(1);
  EXPECT_EQ(first.suspect_pages, 0U);  // named once
  EXPECT_EQ(first.suspects.size(), 0U);
  EXPECT_FALSE(bench.receiver->ready());
  EXPECT_EQ(bench.receiver->stats().pages_suspect, 8U);
  EXPECT_TRUE(
      bench.data(0).pages(0, 8, all.subspan(8 * bench.page_size, 8 * bench.page_size), bench.page_size));
  EXPECT_EQ(bench.data(0).barrier(2).suspect_pages, 0U);
  EXPECT_TRUE(bench.receiver->ready());
  EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
}

TEST(ReceiverFill, GrowsWhileItIsFilled) {
  const std::uint64_t page_size = Bench::page_size_of();
  auto owner = Region::allocate(64 * page_size);
  Bench bench(1);
  auto grown = Region::adopt({Extent{owner->address(PageNumber{0}), 32 * page_size}}, 64 * page_size);
  bench.regions = {grown};
  bench.config.regions = {grown};
  bench.start();
  bench.connect();
  const auto content = random_bytes(64 * page_size, 6);
  EXPECT_TRUE(bench.data(0).pages(0, 0, std::span(content).first(32 * page_size), page_size));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  EXPECT_TRUE(bench.receiver->ready());
  bench.receiver->grow(0, 64);
  EXPECT_FALSE(bench.receiver->ready());
  EXPECT_TRUE(bench.data(0).pages(0, 32, std::span(content).subspan(32 * page_size), page_size));
  EXPECT_TRUE(bench.data(0).barrier(2).answered);
  EXPECT_TRUE(bench.receiver->ready());
  EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
  bench.receiver->close();
}

TEST(ReceiverFill, ACutEndsIt) {
  Bench bench(64);
  bench.start();
  bench.connect();
  bench.wires[1]->close();
  EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "CHANNEL_LOST");
  EXPECT_TRUE(bench.data(0).ended());
  EXPECT_TRUE(bench.demand().ended());
  // Nobody may come back: the source has its guest.
  EXPECT_EQ(bench.say(bench.hello(0, 1)), wire::HelloStatus::kRefused);
}

TEST(ReceiverFill, ACutInTheMiddleOfAFrameEndsIt) {
  Bench bench(64);
  bench.start();
  bench.connect();
  const auto content = random_bytes(16 * bench.page_size, 7);
  const wire::FrameHeader header = Wire::pages_header(0, 0, content, bench.page_size);
  EXPECT_TRUE(bench.data(0).raw(&header, sizeof header) &&
              bench.data(0).raw(content.data(), content.size() / 2));
  bench.data(0).close();
  EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "CHANNEL_LOST");
  EXPECT_EQ(bench.receiver->stats().pages_missing, 64U);
}

TEST(ReceiverFill, LeavingTooEarlyIsALoss) {
  Bench bench(64);
  bench.start();
  bench.connect();
  for (unsigned i = 0; i < bench.config.channels; ++i)
    EXPECT_TRUE(bench.data(i).frame(wire::FrameType::kGoodbye));
  EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "CHANNEL_LOST");
}

TEST(ReceiverFill, ClosingARegionStopsIt) {
  Bench bench(64);
  bench.start();
  bench.connect();
  bench.regions[0]->retire();
  EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "REGION_GONE");
  EXPECT_TRUE(bench.data(0).ended());
  bench.receiver->close();
}

}  // namespace
}  // namespace memferry::test
