// Paging: what is missing is asked for when somebody touches it, and nothing that is here is overwritten.
#include <gtest/gtest.h>

#include <sys/mman.h>
#include <atomic>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "fake_source.h"
#include "fault/sequential_detector.h"
#include "os/userfaultfd.h"

namespace memferry::test {
namespace {

class ReceiverPaging : public testing::Test {
 protected:
  void SetUp() override {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.kernel_faults) GTEST_SKIP() << "no full userfaultfd here: " << std::strerror(offer.error);
  }
  // Answers requests from `content` until the demand connection ends.
  static std::thread serve(Bench& bench, const std::vector<std::byte>& content,
                           std::atomic<unsigned>* requests = nullptr) {
    return std::thread([&bench, &content, requests] {
      for (;;) {
        wire::FrameHeader header{};
        if (!bench.demand().read(&header, sizeof header)) return;
        if (header.type != static_cast<std::uint16_t>(wire::FrameType::kFaultRequest)) continue;
        if (requests != nullptr) requests->fetch_add(1);
        const auto bytes = std::span(content).subspan(header.first_page * bench.page_size,
                                                      header.page_count * bench.page_size);
        // The faulted page first, then its neighbours.
        if (!bench.demand().pages(0, header.first_page, bytes.first(bench.page_size), bench.page_size))
          return;
        if (header.page_count > 1 && !bench.demand().pages(0, header.first_page + 1,
                                                           bytes.subspan(bench.page_size), bench.page_size)) {
          return;
        }
      }
    });
  }
};

TEST_F(ReceiverPaging, PurePostCopyServesFaultsFromTheStart) {
  Bench bench(256);
  bench.config.paging_from_start = true;
  bench.config.keep_page_hashes = true;
  std::memset(bench.page(0), 0x11, 256 * bench.page_size);  // none of the guest's
  bench.start();
  bench.connect();
  EXPECT_FALSE(bench.receiver->ready());
  EXPECT_TRUE(bench.data(0).switch_over());
  EXPECT_TRUE(bench.receiver->ready());
  EXPECT_TRUE(bench.receiver->paging());
  const auto content = random_bytes(256 * bench.page_size, 1);
  std::thread server = serve(bench, content);
  std::vector<std::thread> readers;
  for (unsigned seed = 0; seed < 4; ++seed) {
    readers.emplace_back([&, seed] {
      std::mt19937_64 random(seed);
      for (int i = 0; i < 60; ++i) {
        const std::uint64_t page = random() % 256;
        ASSERT_EQ(std::memcmp(bench.page(page), content.data() + page * bench.page_size, bench.page_size), 0);
      }
    });
  }
  for (std::thread& reader : readers) reader.join();
  const ReceiverStats stats = bench.receiver->stats();
  EXPECT_GT(stats.faults.count, 0U);
  EXPECT_LE(stats.faults.p50_us, stats.faults.p99_us);
  EXPECT_LE(stats.faults.p99_us, stats.faults.max_us);
  EXPECT_EQ(bench.log.count(EngineEventKind::kComplete), 0U);
  EXPECT_TRUE(bench.data(1).pages(0, 0, content, bench.page_size));
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
  // The last barriers are still answered.
  EXPECT_TRUE(bench.data(0).barrier(3).answered);
  EXPECT_TRUE(bench.data(1).barrier(3).answered);
  std::vector<std::uint64_t> hashes(256);
  hash_pages(content, bench.page_size, hashes.data());
  EXPECT_EQ(bench.receiver->digest(0), xxh3_128(std::as_bytes(std::span(hashes))));
  ::shutdown(bench.demand().fd(), SHUT_RDWR);
  server.join();
  EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 0U);
}

TEST_F(ReceiverPaging, AllDiscardedOneByOneThenPushed) {
  const std::uint64_t pages = 4096;
  Bench bench(pages);
  bench.config.may_page = true;
  bench.start();
  bench.connect();
  auto content = random_bytes(pages * bench.page_size, 2);
  EXPECT_TRUE(bench.data(0).pages(0, 0, content, bench.page_size));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  std::vector<wire::WireRun> runs;
  for (std::uint64_t page = 1; page < pages; page += 2) runs.push_back({page, 1});
  const auto started = std::chrono::steady_clock::now();
  EXPECT_TRUE(bench.data(0).discard(0, runs));
  EXPECT_TRUE(bench.data(0).switch_over());
  const auto took = std::chrono::steady_clock::now() - started;
  RecordProperty("discard_us", static_cast<int>(took / 1us));
  EXPECT_EQ(bench.receiver->stats().pages_missing, runs.size());
  EXPECT_EQ(bench.receiver->missing(3).size(), 3U);
  for (const wire::WireRun& run : runs) content[run.first_page * bench.page_size + 5] ^= std::byte{0xff};
  std::thread toucher([&] {
    for (std::uint64_t page = 0; page < 64; ++page) {
      ASSERT_EQ(std::memcmp(bench.page(page), content.data() + page * bench.page_size, bench.page_size), 0);
    }
  });
  std::thread server = serve(bench, content);
  toucher.join();
  EXPECT_TRUE(bench.data(1).pages(0, 0, content, bench.page_size));
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
  ::shutdown(bench.demand().fd(), SHUT_RDWR);
  server.join();
}

TEST_F(ReceiverPaging, WhatTheGuestWroteIsNeverOverwritten) {
  Bench bench(64);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  EXPECT_TRUE(bench.data(0).switch_over());
  const auto content = random_bytes(64 * bench.page_size, 3);
  EXPECT_TRUE(bench.data(0).pages(0, 0, std::span(content).first(32 * bench.page_size), bench.page_size));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  std::memset(bench.page(4), 0x77, bench.page_size);
  EXPECT_TRUE(bench.data(1).pages(0, 0, content, bench.page_size));  // all of it again
  EXPECT_TRUE(bench.data(1).zeros(0, 0, 64));
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(*bench.page(4), std::byte{0x77});
  EXPECT_EQ(std::memcmp(bench.page(5), content.data() + 5 * bench.page_size, 59 * bench.page_size), 0);
}

TEST_F(ReceiverPaging, ZerosAreServedToWhoWaitsAndToWhoComesLater) {
  Bench bench(64);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  EXPECT_TRUE(bench.data(0).switch_over());
  std::optional<std::byte> waited;
  std::thread waiter([&] { waited = try_read(bench.page(7)); });
  const auto request = bench.demand().request();
  ASSERT_TRUE(request);
  EXPECT_EQ(request->first_page, 7U);
  EXPECT_EQ(request->page_count, 1U);
  EXPECT_TRUE(bench.data(1).zeros(0, 0, 63));
  waiter.join();
  EXPECT_EQ(waited, std::byte{0});
  EXPECT_TRUE(bench.data(1).barrier(1).answered);
  EXPECT_EQ(try_read(bench.page(20)), std::byte{0});  // known by now: nobody is asked
  EXPECT_EQ(bench.receiver->stats().faults.count, 1U);
  EXPECT_TRUE(bench.demand().zeros(0, 63, 1));
  bench.log.wait(EngineEventKind::kComplete);
  for (const std::byte byte : bench.memory()) ASSERT_EQ(byte, std::byte{0});
}

TEST_F(ReceiverPaging, ManyThreadsOnOnePageAskOnce) {
  Bench bench(16);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  EXPECT_TRUE(bench.data(0).switch_over());
  const auto content = random_bytes(16 * bench.page_size, 4);
  std::vector<std::thread> readers;
  std::atomic<unsigned> right{0};
  for (int i = 0; i < 8; ++i) {
    readers.emplace_back([&] { right += try_read(bench.page(3)) == content[3 * bench.page_size] ? 1U : 0U; });
  }
  ASSERT_TRUE(bench.demand().request());
  // Were there a second request, it would be before the answer to this barrier.
  EXPECT_TRUE(bench.demand().barrier(1).answered);
  EXPECT_TRUE(bench.data(0).pages(0, 3, std::span(content).subspan(3 * bench.page_size, bench.page_size),
                                  bench.page_size));
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(right, 8U);
}

TEST_F(ReceiverPaging, ASequentialReaderAsksForWindows) {
  Bench bench(1024);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  EXPECT_TRUE(bench.data(0).switch_over());
  const auto content = random_bytes(1024 * bench.page_size, 5);
  std::atomic<unsigned> requests{0};
  std::thread server = serve(bench, content, &requests);
  for (std::uint64_t page = 0; page < 1024; ++page) {
    ASSERT_EQ(*bench.page(page), content[page * bench.page_size]);
  }
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_LT(requests, 300U);
  ::shutdown(bench.demand().fd(), SHUT_RDWR);
  server.join();
}

TEST_F(ReceiverPaging, NeighboursThatDoNotComeAreAskedForByThemselves) {
  Bench bench(64);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  EXPECT_TRUE(bench.data(0).switch_over());
  const auto content = random_bytes(64 * bench.page_size, 6);
  const auto answer = [&](std::uint64_t page) {
    EXPECT_TRUE(bench.demand().pages(
        0, page, std::span(content).subspan(page * bench.page_size, bench.page_size), bench.page_size));
  };
  std::thread reader([&] {
    for (std::uint64_t page = 0; page < 3; ++page)
      EXPECT_EQ(*bench.page(page), content[page * bench.page_size]);
  });
  const std::uint64_t windows[] = {1, SequentialDetector::kFirstWindow, 1};
  for (std::uint64_t page = 0; page < 3; ++page) {
    const auto request = bench.demand().request();
    ASSERT_TRUE(request);
    EXPECT_EQ(request->first_page, page);
    EXPECT_EQ(request->page_count, windows[page]);
    answer(page);  // and none of its neighbours
  }
  reader.join();
}

TEST_F(ReceiverPaging, WhatTheGuestDiscardsAfterArrivalReadsAsZeros) {
  Bench bench(16);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  EXPECT_TRUE(bench.data(0).switch_over());
  const auto content = random_bytes(16 * bench.page_size, 7);
  EXPECT_TRUE(bench.data(0).pages(0, 0, std::span(content).first(8 * bench.page_size), bench.page_size));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  ASSERT_EQ(::madvise(bench.page(2), bench.page_size, MADV_DONTNEED), 0);
  EXPECT_EQ(try_read(bench.page(2)), std::byte{0});
  // One that has not come yet still comes from the source.
  ASSERT_EQ(::madvise(bench.page(9), bench.page_size, MADV_DONTNEED), 0);
  std::optional<std::byte> value;
  std::thread reader([&] { value = try_read(bench.page(9)); });
  ASSERT_TRUE(bench.demand().request());
  EXPECT_TRUE(bench.data(1).pages(0, 8, std::span(content).subspan(8 * bench.page_size), bench.page_size));
  reader.join();
  EXPECT_EQ(value, content[9 * bench.page_size]);
  bench.log.wait(EngineEventKind::kComplete);
}

TEST_F(ReceiverPaging, ASuspectPageIsMissingAfterTheSwitch) {
  Bench bench(32);
  bench.config.may_page = true;
  bench.start();
  bench.connect();
  const auto content = random_bytes(32 * bench.page_size, 8);
  EXPECT_TRUE(bench.data(0).pages(0, 0, content, bench.page_size));
  const auto torn = random_bytes(2 * bench.page_size, 9);
  const wire::FrameHeader header = Wire::pages_header(
      0, 10, std::span(content).subspan(10 * bench.page_size, 2 * bench.page_size), bench.page_size);
  EXPECT_TRUE(bench.data(0).raw(&header, sizeof header) && bench.data(0).raw(torn.data(), torn.size()));
  EXPECT_EQ(bench.data(0).barrier(1).suspect_pages, 2U);
  EXPECT_TRUE(bench.data(0).switch_over());
  EXPECT_EQ(bench.receiver->stats().pages_missing, 2U);
  std::thread server = serve(bench, content);
  EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
  bench.log.wait(EngineEventKind::kComplete);
  ::shutdown(bench.demand().fd(), SHUT_RDWR);
  server.join();
}

TEST_F(ReceiverPaging, SeveralRegions) {
  Bench bench(64, 3);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  EXPECT_TRUE(bench.data(0).switch_over());
  std::optional<std::byte> value;
  std::thread reader([&] { value = try_read(bench.page(5, 2)); });
  const auto request = bench.demand().request();
  ASSERT_TRUE(request);
  EXPECT_EQ(request->region, 2U);
  for (std::uint32_t region = 0; region < 3; ++region) {
    const auto content = random_bytes(64 * bench.page_size, 20 + region);
    EXPECT_TRUE(bench.data(region % 2).pages(region, 0, content, bench.page_size));
  }
  reader.join();
  bench.log.wait(EngineEventKind::kComplete);
  for (std::uint32_t region = 0; region < 3; ++region) {
    const auto content = random_bytes(64 * bench.page_size, 20 + region);
    EXPECT_EQ(std::memcmp(bench.memory(region).data(), content.data(), content.size()), 0);
  }
}

}  // namespace
}  // namespace memferry::test
