// A source that is connected and says nothing, and one that only seems to: where nobody waits for a page, the receiver
// asks for one itself.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>

#include <cstring>
#include <thread>

#include "fake_source.h"
#include "os/userfaultfd.h"
#include "transfer/sender.h"
#include "wire/socket.h"

namespace memferry::test {
namespace {

constexpr std::uint64_t kPages = 128;
constexpr std::uint64_t kHalf = kPages / 2;

class ReceiverSilence : public testing::Test {
 protected:
  void SetUp() override {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.kernel_faults) GTEST_SKIP() << "no full userfaultfd here: " << std::strerror(offer.error);
    bench.config.silence_timeout = 200ms;
    bench.config.answer_timeout = 1s;
    bench.config.paging_from_start = true;
  }
  // The guest runs here, the first half of its pages has come.
  void begin() {
    bench.start();
    bench.connect();
    ASSERT_TRUE(
        bench.data(0).pages(0, 0, std::span(content).first(kHalf * bench.page_size), bench.page_size));
    ASSERT_TRUE(bench.data(0).barrier(1).answered);
    // Last: from here on silence is noticed.
    ASSERT_TRUE(bench.data(0).switch_over());
  }
  std::span<const std::byte> of(std::uint64_t first, std::uint64_t count) const {
    return std::span(content).subspan(first * bench.page_size, count * bench.page_size);
  }
  void expect_whole() {
    bench.log.wait(EngineEventKind::kComplete);
    EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size()), 0);
  }
  static bool readable(const Wire& wire, std::chrono::milliseconds within) {
    pollfd polled{wire.fd(), POLLIN, 0};
    return ::poll(&polled, 1, static_cast<int>(within.count())) > 0;
  }

  Bench bench{kPages};
  const std::vector<std::byte> content = random_bytes(kPages * bench.page_size, 1);
};

TEST_F(ReceiverSilence, ASourceThatHangsIsNoticedThoughNobodyWaits) {
  bench.config.recover_timeout = 300ms;
  const auto began = std::chrono::steady_clock::now();
  begin();
  const auto request = bench.demand().request();
  ASSERT_TRUE(request);
  EXPECT_EQ(request->first_page, kHalf);
  EXPECT_EQ(request->page_count, 1U);
  const EngineEvent paused = bench.log.wait(EngineEventKind::kPaused);
  EXPECT_GT(std::chrono::steady_clock::now() - began, bench.config.answer_timeout);  // it was given time
  EXPECT_EQ(paused.message, "the source says nothing, though pages are missing");
  for (const auto& wire : bench.wires) EXPECT_TRUE(wire->ended());
  const EngineEvent lost = bench.log.wait(EngineEventKind::kLost);
  ASSERT_EQ(lost.lost.size(), 1U);
  EXPECT_EQ(lost.lost[0].run, (PageRun{PageNumber{kHalf}, kPages - kHalf}));
  bench.receiver->acknowledge_loss();
  EXPECT_EQ(try_read(bench.page(kHalf)), std::nullopt);
  EXPECT_EQ(std::memcmp(bench.page(0), content.data(), kHalf * bench.page_size), 0);
}

// It is asked once in each silence, and what it answers is not what a guest has waited for.
TEST_F(ReceiverSilence, ASourceThatAnswersStays) {
  bench.config.answer_timeout = 20s;
  begin();
  const auto began = std::chrono::steady_clock::now();
  for (std::uint64_t page = kHalf; page < kHalf + 5; ++page) {
    const auto request = bench.demand().request();
    ASSERT_TRUE(request);
    EXPECT_EQ(request->first_page, page);
    EXPECT_TRUE(bench.demand().pages(0, page, of(page, 1), bench.page_size));
  }
  EXPECT_GE(std::chrono::steady_clock::now() - began, 4 * bench.config.silence_timeout);
  EXPECT_EQ(bench.receiver->stats().faults.count, 0U);
  EXPECT_TRUE(bench.data(1).pages(0, kHalf, of(kHalf, kPages - kHalf), bench.page_size));
  expect_whole();
  EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 0U);
}

TEST_F(ReceiverSilence, AnUnansweredProbeIsNotRepeated) {
  bench.config.answer_timeout = 20s;
  begin();
  ASSERT_TRUE(bench.demand().request());
  EXPECT_FALSE(readable(bench.demand(), 5 * bench.config.silence_timeout));
}

// Behind a link of a few KB/s: a frame takes longer than both times together, and each byte of it is a sign.
TEST_F(ReceiverSilence, ATrickleIsNoSilence) {
  bench.config.answer_timeout = 2s;
  begin();
  const auto part = of(kHalf, kPages - kHalf);
  const wire::FrameHeader header = Wire::pages_header(0, kHalf, part, bench.page_size);
  EXPECT_TRUE(bench.data(1).raw(&header, sizeof header));
  const auto until =
      std::chrono::steady_clock::now() + (bench.config.silence_timeout + bench.config.answer_timeout) * 5 / 4;
  std::size_t sent = 0;
  for (; std::chrono::steady_clock::now() < until; ++sent) {
    ASSERT_TRUE(bench.data(1).raw(part.data() + sent, 1));
    std::this_thread::sleep_for(bench.config.silence_timeout / 20);
  }
  EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 0U);
  EXPECT_TRUE(bench.data(1).raw(part.data() + sent, part.size() - sent));
  expect_whole();
}

// A probe was sent, and then bytes come again, but not its answer: that is a slow way, no silence.
TEST_F(ReceiverSilence, WhoeverSendsAgainIsGivenTimeForTheProbesAnswer) {
  bench.config.answer_timeout = 2s;
  begin();
  ASSERT_TRUE(bench.demand().request());
  const auto part = of(kHalf + 1, kPages - kHalf - 1);
  const wire::FrameHeader header = Wire::pages_header(0, kHalf + 1, part, bench.page_size);
  EXPECT_TRUE(bench.data(1).raw(&header, sizeof header));
  const auto until = std::chrono::steady_clock::now() + bench.config.answer_timeout * 5 / 4;
  std::size_t sent = 0;
  for (; std::chrono::steady_clock::now() < until; ++sent) {
    ASSERT_TRUE(bench.data(1).raw(part.data() + sent, 1));
    std::this_thread::sleep_for(bench.config.silence_timeout / 20);
  }
  EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 0U);
  EXPECT_TRUE(bench.data(1).raw(part.data() + sent, part.size() - sent));
  EXPECT_TRUE(bench.demand().pages(0, kHalf, of(kHalf, 1), bench.page_size));
  expect_whole();
}

// What lies here unread is this side's doing.
TEST_F(ReceiverSilence, ADestinationThatTakesLittleInDoesNotBlameTheSource) {
  bench.config.bandwidth = 64 * bench.page_size / 4;  // each half of it: four seconds
  bench.config.silence_timeout = 600ms;
  begin();
  const auto began = std::chrono::steady_clock::now();
  // Sockets may hold less than that.
  std::thread sending(
      [&] { EXPECT_TRUE(bench.data(1).pages(0, kHalf, of(kHalf, kPages - kHalf), bench.page_size)); });
  const auto silent = (bench.config.silence_timeout + bench.config.answer_timeout) * 3 / 2;
  EXPECT_FALSE(readable(bench.demand(), silent));
  sending.join();
  expect_whole();
  EXPECT_GT(std::chrono::steady_clock::now() - began, silent) << "the limit did not hold";
  EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 0U);
}

TEST_F(ReceiverSilence, AGuestThatWaitsForTheProbesPageIsServedByItsAnswer) {
  bench.config.answer_timeout = 20s;
  begin();
  ASSERT_TRUE(bench.demand().request());
  std::optional<std::byte> value;
  std::thread waiter([&] { value = try_read(bench.page(kHalf)); });
  EXPECT_FALSE(readable(bench.demand(), 300ms));  // asked for already
  EXPECT_TRUE(bench.demand().pages(0, kHalf, of(kHalf, 1), bench.page_size));
  waiter.join();
  EXPECT_EQ(value, content[kHalf * bench.page_size]);
  EXPECT_TRUE(bench.data(1).zeros(0, kHalf + 1, kPages - kHalf - 1));
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(bench.receiver->stats().faults.count, 1U);  // counted once its page is in
}

TEST_F(ReceiverSilence, ASourceThatGoesOnAfterItsStopComesBack) {
  begin();
  ASSERT_TRUE(bench.demand().request());
  bench.log.wait(EngineEventKind::kPaused);
  bench.connect(1);
  bench.log.wait(EngineEventKind::kRecovered);
  bench.bitmap();
  const auto again = bench.demand().request();  // as for any fault
  ASSERT_TRUE(again);
  EXPECT_EQ(again->first_page, kHalf);
  EXPECT_TRUE(bench.demand().pages(0, kHalf, of(kHalf, 1), bench.page_size));
  EXPECT_TRUE(bench.data(0).pages(0, kHalf + 1, of(kHalf + 1, kPages - kHalf - 1), bench.page_size));
  expect_whole();
}

// Both engines: a source that is held to a few KB/s sends a page now and then, and answers in between.
TEST_F(ReceiverSilence, ASourceUnderALimitIsNotHurt) {
  bench.config.silence_timeout = 150ms;
  bench.config.answer_timeout = 4s;
  bench.start();
  const auto memory = Region::allocate(content.size());
  std::memcpy(memory->address(PageNumber{0}).pointer(), content.data(), content.size());
  EventLog events;
  SenderConfig config;
  config.regions = {memory};
  config.trackers = {nullptr};
  config.host = "127.0.0.1";
  config.port = bench.listener->port();
  config.migration = bench.config.migration;
  config.channels = bench.config.channels;
  config.tokens = bench.config.tokens;
  config.bandwidth = 4 * bench.page_size;  // four pages a second
  config.on_event = events.callback();
  Sender sender(std::move(config));
  sender.connect();
  events.wait(EngineEventKind::kConnected);
  sender.queue_populated();
  sender.switch_over();
  events.wait(EngineEventKind::kSwitched);
  const auto began = std::chrono::steady_clock::now();
  sender.start_push();
  while (std::chrono::steady_clock::now() - began < 2 * bench.config.answer_timeout)
    std::this_thread::sleep_for(50ms);
  EXPECT_EQ(bench.log.count(EngineEventKind::kComplete), 0U) << "the limit did not hold";
  const std::uint64_t asked = sender.stats().faults_served;
  EXPECT_GT(asked, 0U);
  EXPECT_LE(asked, 1 + (std::chrono::steady_clock::now() - began) / bench.config.silence_timeout);
  sender.set_bandwidth(0);
  events.wait(EngineEventKind::kEvicted);
  expect_whole();
  EXPECT_EQ(bench.log.count(EngineEventKind::kPaused), 0U);
  EXPECT_EQ(sender.stats().redials, 0U);
  EXPECT_EQ(bench.receiver->stats().faults.count, 0U);
  sender.close(true);
}

// Zeros that nobody waits for take no memory, a probe's no more than others.
TEST_F(ReceiverSilence, AProbeThatIsAnsweredWithZerosTouchesNothing) {
  bench.config.answer_timeout = 20s;
  begin();
  ASSERT_TRUE(bench.demand().request());
  EXPECT_TRUE(bench.demand().zeros(0, kHalf, kPages - kHalf));
  bench.log.wait(EngineEventKind::kComplete);
  unsigned char there = 1;
  ASSERT_EQ(::mincore(bench.page(kHalf), bench.page_size, &there), 0);
  EXPECT_EQ(there & 1, 0);
}

// Some of the connections back are not the source back.
TEST_F(ReceiverSilence, ASourceThatDialsAgainInPartIsNotBack) {
  bench.config.recover_timeout = 3s;
  begin();
  bench.data(0).close();
  bench.log.wait(EngineEventKind::kPaused);
  std::unique_ptr<Wire> demand;
  std::unique_ptr<Wire> data;
  ASSERT_EQ(bench.say(bench.hello(2, 1), &demand), wire::HelloStatus::kAccepted);
  ASSERT_EQ(bench.say(bench.hello(0, 1), &data), wire::HelloStatus::kAccepted);
  const EngineEvent lost = bench.log.wait(EngineEventKind::kLost);
  EXPECT_EQ(bench.log.count(EngineEventKind::kRecovered), 0U);
  ASSERT_EQ(lost.lost.size(), 1U);
  EXPECT_EQ(lost.lost[0].run, (PageRun{PageNumber{kHalf}, kPages - kHalf}));
}

TEST_F(ReceiverSilence, NorWhereThereAreServers) {
  bench.config.recover_timeout = 4s;
  {
    // Nobody listens there any more.
    const UniqueFd port = wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0));
    StageServer server;
    server.name = "gone";
    server.host = "127.0.0.1";
    server.port = wire::SocketAddress::local(port.get()).port();
    server.tokens.resize(64);
    bench.config.servers = {server};
  }
  begin();
  bench.data(0).close();
  EXPECT_TRUE(bench.data(1).ended());
  std::unique_ptr<Wire> demand;
  std::unique_ptr<Wire> data;
  ASSERT_EQ(bench.say(bench.hello(2, 1), &demand), wire::HelloStatus::kAccepted);
  ASSERT_EQ(bench.say(bench.hello(0, 1), &data), wire::HelloStatus::kAccepted);
  bench.log.wait(EngineEventKind::kPaused);
  const EngineEvent lost = bench.log.wait(EngineEventKind::kLost);
  ASSERT_EQ(lost.lost.size(), 1U);
  EXPECT_EQ(lost.lost[0].run, (PageRun{PageNumber{kHalf}, kPages - kHalf}));
}

TEST_F(ReceiverSilence, TheRestOfItsConnectionsMakeItWhole) {
  begin();
  bench.data(0).close();
  bench.log.wait(EngineEventKind::kPaused);
  std::vector<std::unique_ptr<Wire>> wires(3);
  ASSERT_EQ(bench.say(bench.hello(2, 1), &wires[2]), wire::HelloStatus::kAccepted);
  ASSERT_EQ(bench.say(bench.hello(0, 1), &wires[0]), wire::HelloStatus::kAccepted);
  EXPECT_EQ(bench.log.count(EngineEventKind::kRecovered), 0U);
  ASSERT_EQ(bench.say(bench.hello(1, 1), &wires[1]), wire::HelloStatus::kAccepted);
  bench.wires = std::move(wires);
  bench.log.wait(EngineEventKind::kRecovered);
  bench.bitmap();
  EXPECT_TRUE(bench.data(0).pages(0, kHalf, of(kHalf, kPages - kHalf), bench.page_size));
  expect_whole();
}

}  // namespace
}  // namespace memferry::test
