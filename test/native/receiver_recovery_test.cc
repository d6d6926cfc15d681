// Cuts after the switch, recovery by bitmap, loss, and closing while somebody waits for a page.
#include <gtest/gtest.h>

#include <csetjmp>
#include <csignal>
#include <cstring>
#include <thread>

#include "fake_source.h"
#include "os/userfaultfd.h"

namespace memferry::test {
namespace {

class ReceiverRecovery : public testing::Test {
 protected:
  void SetUp() override {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.kernel_faults) GTEST_SKIP() << "no full userfaultfd here: " << std::strerror(offer.error);
  }
  static void half_way(Bench& bench, const std::vector<std::byte>& content) {
    bench.config.paging_from_start = true;
    bench.start();
    bench.connect();
    EXPECT_TRUE(bench.data(0).switch_over());
    EXPECT_TRUE(bench.data(0).pages(0, 0, std::span(content).first(content.size() / 2), bench.page_size));
    EXPECT_TRUE(bench.data(0).barrier(1).answered);
  }
};

thread_local sigjmp_buf back_from_sigbus;
void on_sigbus(int) { siglongjmp(back_from_sigbus, 1); }

// Whether touching the page raises SIGBUS.
bool touching_faults(const std::byte* address) {
  struct sigaction action {};
  struct sigaction former {};
  action.sa_handler = on_sigbus;
  ::sigaction(SIGBUS, &action, &former);
  volatile bool faulted = true;
  if (sigsetjmp(back_from_sigbus, 1) == 0) {
    [[maybe_unused]] const volatile std::byte value = *const_cast<const volatile std::byte*>(address);
    faulted = false;
  }
  ::sigaction(SIGBUS, &former, nullptr);
  return faulted;
}

TEST_F(ReceiverRecovery, WaitersSurviveACutOfEachChannel) {
  for (unsigned cut = 0; cut <= 2; ++cut) {
    Bench bench(128);
    const auto content = random_bytes(128 * bench.page_size, 1);
    half_way(bench, content);
    std::optional<std::byte> value;
    std::thread waiter([&] { value = try_read(bench.page(100)); });
    ASSERT_TRUE(bench.demand().request());
    bench.wires[cut]->close();
    bench.log.wait(EngineEventKind::kPaused);
    for (unsigned other = 0; other <= 2; ++other) {
      if (other == cut) continue;
      EXPECT_TRUE(bench.wires[other]->ended());
    }
    bench.connect(1);
    bench.log.wait(EngineEventKind::kRecovered);
    const std::vector<bool> has = bench.bitmap();
    for (std::uint64_t page = 0; page < 128; ++page) EXPECT_EQ(has[page], page < 64) << page;
    const auto request = bench.demand().request();  // again, without a new fault
    ASSERT_TRUE(request);
    EXPECT_EQ(request->first_page, 100U);
    EXPECT_TRUE(bench.demand().pages(
        0, 100, std::span(content).subspan(100 * bench.page_size, bench.page_size), bench.page_size));
    waiter.join();
    EXPECT_EQ(value, content[100 * bench.page_size]);
    EXPECT_TRUE(
        bench.data(1).pages(0, 64, std::span(content).subspan(64 * bench.page_size), bench.page_size));
    bench.log.wait(EngineEventKind::kComplete);
    EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
    EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 1U);
    EXPECT_EQ(bench.log.count(EngineEventKind::kRecovered), 1U);
  }
}

TEST_F(ReceiverRecovery, AFaultWhileTheConnectionIsCutIsAskedForLater) {
  Bench bench(128);
  const auto content = random_bytes(128 * bench.page_size, 2);
  half_way(bench, content);
  bench.demand().close();
  bench.log.wait(EngineEventKind::kPaused);
  std::optional<std::byte> value;
  std::thread waiter([&] { value = try_read(bench.page(99)); });
  bench.connect(1);
  bench.bitmap();
  const auto request = bench.demand().request();
  ASSERT_TRUE(request);
  EXPECT_EQ(request->first_page, 99U);
  EXPECT_TRUE(bench.data(0).pages(0, 64, std::span(content).subspan(64 * bench.page_size), bench.page_size));
  waiter.join();
  EXPECT_EQ(value, content[99 * bench.page_size]);
}

TEST_F(ReceiverRecovery, ACutInTheMiddleOfAFrameLeavesNothingHalf) {
  Bench bench(128);
  const auto content = random_bytes(128 * bench.page_size, 3);
  half_way(bench, content);
  const auto part = std::span(content).subspan(64 * bench.page_size, 32 * bench.page_size);
  const wire::FrameHeader header = Wire::pages_header(0, 64, part, bench.page_size);
  EXPECT_TRUE(bench.data(1).raw(&header, sizeof header) && bench.data(1).raw(part.data(), part.size() / 2));
  bench.data(1).close();
  bench.log.wait(EngineEventKind::kPaused);
  bench.connect(1);
  const std::vector<bool> has = bench.bitmap();
  EXPECT_EQ(std::count(has.begin(), has.end(), true), 64);
}

TEST_F(ReceiverRecovery, CutAgainBeforeItHadRecovered) {
  Bench bench(128);
  const auto content = random_bytes(128 * bench.page_size, 4);
  half_way(bench, content);
  bench.data(0).close();
  bench.log.wait(EngineEventKind::kPaused);
  std::unique_ptr<Wire> half;
  EXPECT_EQ(bench.say(bench.hello(2, 1), &half), wire::HelloStatus::kAccepted);
  half->close();
  bench.connect(2);
  bench.log.wait(EngineEventKind::kRecovered);
  EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 1U);
  bench.bitmap();
  EXPECT_TRUE(bench.data(1).pages(0, 64, std::span(content).subspan(64 * bench.page_size), bench.page_size));
  bench.log.wait(EngineEventKind::kComplete);
}

TEST_F(ReceiverRecovery, TheSourceMayNoticeTheCutFirst) {
  Bench bench(128);
  const auto content = random_bytes(128 * bench.page_size, 5);
  half_way(bench, content);
  auto former = std::move(bench.wires);
  bench.connect(1);
  bench.log.wait(EngineEventKind::kPaused);
  bench.log.wait(EngineEventKind::kRecovered);
  for (auto& wire : former) EXPECT_TRUE(wire->ended());
  bench.bitmap();
  EXPECT_TRUE(bench.data(1).pages(0, 64, std::span(content).subspan(64 * bench.page_size), bench.page_size));
  bench.log.wait(EngineEventKind::kComplete);
}

TEST_F(ReceiverRecovery, ARedialAfterCompletionGetsAFullBitmap) {
  Bench bench(128);
  const auto content = random_bytes(128 * bench.page_size, 6);
  half_way(bench, content);
  EXPECT_TRUE(bench.data(1).pages(0, 64, std::span(content).subspan(64 * bench.page_size), bench.page_size));
  bench.log.wait(EngineEventKind::kComplete);
  bench.data(1).close();
  EXPECT_TRUE(bench.data(0).ended());
  bench.connect(1);
  const std::vector<bool> has = bench.bitmap();
  EXPECT_EQ(std::count(has.begin(), has.end(), true), 128);
  EXPECT_TRUE(bench.data(0).barrier(9).answered);
  EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 0U);
}

TEST_F(ReceiverRecovery, LostPagesAreReportedThenFailAndAreNeverZero) {
  Bench bench(128);
  bench.config.recover_timeout = 50ms;
  bench.config.loss_grace = 60s;
  const auto content = random_bytes(128 * bench.page_size, 7);
  half_way(bench, content);
  EXPECT_TRUE(bench.data(0).zeros(0, 126, 2));
  EXPECT_TRUE(bench.data(0).barrier(2).answered);
  std::optional<std::byte> value{std::byte{1}};
  std::atomic<bool> returned{false};
  std::thread waiter([&] {
    value = try_read(bench.page(100));
    returned = true;
  });
  ASSERT_TRUE(bench.demand().request());
  bench.data(0).close();
  const EngineEvent lost = bench.log.wait(EngineEventKind::kLost);
  ASSERT_EQ(lost.lost.size(), 1U);
  EXPECT_EQ(lost.lost[0].run, (PageRun{PageNumber{64}, 62}));
  EXPECT_FALSE(returned);  // reported first
  bench.receiver->acknowledge_loss();
  waiter.join();
  EXPECT_EQ(value, std::nullopt);
  EXPECT_TRUE(touching_faults(bench.page(64)));
  EXPECT_TRUE(touching_faults(bench.page(125)));
  EXPECT_EQ(std::memcmp(bench.page(0), content.data(), content.size() / 2), 0);
  EXPECT_EQ(try_read(bench.page(127)), std::byte{0});  // known to be zeros
  EXPECT_EQ(bench.say(bench.hello(0, 1)), wire::HelloStatus::kRefused);
  bench.receiver->close();
  EXPECT_TRUE(touching_faults(bench.page(70)));
  EXPECT_EQ(try_read(bench.page(127)), std::byte{0});
}

TEST_F(ReceiverRecovery, TheGracePeriodEndsByItself) {
  Bench bench(64);
  bench.config.recover_timeout = 20ms;
  const auto content = random_bytes(64 * bench.page_size, 8);
  half_way(bench, content);
  bench.data(0).close();
  EXPECT_EQ(try_read(bench.page(50)), std::nullopt);
  EXPECT_EQ(bench.log.count(EngineEventKind::kLost), 1U);
}

TEST_F(ReceiverRecovery, MoreCutsThanItsTableHasRowsAreNoLoss) {
  Bench bench(64);
  bench.config.recover_timeout = 60s;
  const auto content = random_bytes(64 * bench.page_size, 9);
  half_way(bench, content);
  for (std::uint32_t epoch = 1; epoch < 3 * Bench::kEpochs; ++epoch) {
    bench.wires[epoch % 3]->close();
    bench.connect(epoch);
    bench.log.wait(EngineEventKind::kRecovered, epoch - 1);
  }
  EXPECT_TRUE(bench.data(1).pages(0, 32, std::span(content).subspan(32 * bench.page_size), bench.page_size));
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
  EXPECT_EQ(bench.log.count(EngineEventKind::kLost), 0U);
}

// Connecting is no progress.
TEST_F(ReceiverRecovery, ManyCutsWithoutAPageBetweenThemAreALoss) {
  Bench bench(64);
  bench.config.recover_timeout = 60s;
  const auto content = random_bytes(64 * bench.page_size, 9);
  half_way(bench, content);
  std::uint32_t epoch = 0;
  const auto cut = [&] {
    bench.data(0).close();
    bench.connect(++epoch);
    bench.log.wait(EngineEventKind::kRecovered, epoch - 1);
  };
  // What came before them counts as progress once.
  for (unsigned i = 0; i < wire::kMostBarrenEpochs; ++i) cut();
  EXPECT_TRUE(bench.data(1).pages(0, 32, std::span(content).subspan(32 * bench.page_size, bench.page_size),
                                  bench.page_size));
  EXPECT_TRUE(bench.data(1).barrier(7).answered);
  for (unsigned i = 0; i <= wire::kMostBarrenEpochs; ++i) cut();
  EXPECT_EQ(bench.log.count(EngineEventKind::kLost), 0U);
  bench.data(0).close();
  bench.log.wait(EngineEventKind::kLost);
}

TEST_F(ReceiverRecovery, TheLastRowOfItsTableIsAKeyAndNoToken) {
  Bench bench(64);
  bench.config.recover_timeout = 60s;
  const auto content = random_bytes(64 * bench.page_size, 9);
  half_way(bench, content);
  const std::size_t columns = bench.config.channels + 1;
  const std::uint32_t last = Bench::kEpochs - 1;
  for (std::uint32_t column = 0; column < columns; ++column) {
    wire::Hello hello = bench.hello(column, last);
    const auto refused = [&] { return bench.say(hello) == wire::HelloStatus::kRefused; };
    hello.token = bench.config.tokens[last * columns + column];
    EXPECT_TRUE(refused()) << column;
    hello = bench.hello(column, last);
    hello.epoch += 1;
    EXPECT_TRUE(refused()) << "another epoch's";
    hello = bench.hello(column, last);
    hello.channel = bench.hello((column + 1) % static_cast<std::uint32_t>(columns), last).channel;
    EXPECT_TRUE(refused()) << "another channel's";
  }
}

TEST_F(ReceiverRecovery, ClosingFailsWhoWaits) {
  Bench bench(64);
  const auto content = random_bytes(64 * bench.page_size, 10);
  half_way(bench, content);
  std::vector<std::thread> waiters;
  std::atomic<int> failed{0};
  for (std::uint64_t page = 40; page < 44; ++page) {
    waiters.emplace_back([&bench, &failed, page] {
      if (!try_read(bench.page(page))) ++failed;
    });
  }
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(bench.demand().request());
  std::thread second([&] { bench.receiver->close(); });
  bench.receiver->close();
  second.join();
  for (std::thread& waiter : waiters) waiter.join();
  EXPECT_EQ(failed, 4);
  EXPECT_TRUE(touching_faults(bench.page(63)));
  EXPECT_EQ(std::memcmp(bench.page(0), content.data(), content.size() / 2), 0);
}

TEST_F(ReceiverRecovery, RetiringARegionFailsWhoWaits) {
  Bench bench(64);
  const auto content = random_bytes(64 * bench.page_size, 11);
  half_way(bench, content);
  std::optional<std::byte> value{std::byte{1}};
  std::thread waiter([&] { value = try_read(bench.page(60)); });
  ASSERT_TRUE(bench.demand().request());
  bench.regions[0]->retire();
  waiter.join();
  EXPECT_EQ(value, std::nullopt);
  EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "REGION_GONE");
}

TEST_F(ReceiverRecovery, ACutBeforeTheSwitchEndsIt) {
  Bench bench(64);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  bench.data(1).close();
  EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "CHANNEL_LOST");
  EXPECT_EQ(bench.say(bench.hello(0, 1)), wire::HelloStatus::kRefused);
}

TEST_F(ReceiverRecovery, TheSwitchIsAnsweredAgainAfterACut) {
  Bench bench(64);
  const auto content = random_bytes(64 * bench.page_size, 12);
  half_way(bench, content);
  bench.data(0).close();
  bench.connect(1);
  EXPECT_TRUE(bench.data(0).switch_over());
  // Events come by a thread of their own, in order: the answer may be here before them.
  bench.log.wait(EngineEventKind::kRecovered);
  EXPECT_EQ(bench.log.count(EngineEventKind::kSwitched), 1U);
}

}  // namespace
}  // namespace memferry::test
