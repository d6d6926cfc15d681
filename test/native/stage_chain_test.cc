// Replicas: a page that is acknowledged is held twice, and whoever cannot hold it says so.
#include <gtest/gtest.h>

#include <poll.h>

#include <chrono>
#include <thread>

#include "packed.h"
#include "stage/stage_chain.h"
#include "stage_client.h"
#include "wire/socket.h"

namespace memferry::test {
namespace {

using wire::FrameType;
using wire::Holders;
using wire::StageRole;
using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kPages = 128;
constexpr Holders kAlone{0, Holders::kNobody};
constexpr Holders kTwice{0, 1};

// Nothing comes for this long but signs that somebody is at it. For what must not come: where it does, the test fails
// sooner or later.
bool silent(StageClient& client, std::chrono::milliseconds time = 150ms) {
  const auto until = Clock::now() + time;
  for (pollfd waiting{client.fd(), POLLIN, 0};;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now());
    if (left.count() <= 0 || ::poll(&waiting, 1, static_cast<int>(left.count())) == 0) return true;
    const auto frame = client.receive_any();
    if (!frame || !frame->is(FrameType::kTaken)) return false;
  }
}

// Two real servers: ordinal 0 passes on to ordinal 1.
struct Pair {
  explicit Pair(std::uint64_t replica_memory = 32ULL << 20U, std::uint64_t first_pages = kPages,
                std::uint64_t first_memory = 32ULL << 20U)
      : first(first_memory), replica(replica_memory) {
    first.make(id, {first_pages}, 0);
    replica.make(id, {first_pages}, 1);
    const auto session = static_cast<std::uint16_t>(wire::kFirstChainSession + 0);
    EXPECT_TRUE(
        replica.stage->add_session(id, session, role_bit(StageRole::kChain), stage_tokens(id, session)));
    EXPECT_TRUE(first.stage->set_chain(id, 1, "127.0.0.1", replica.listener->port(), chain_tokens(id, 0)));
  }
  const ImageId id = image_id(1);
  StageBench first;
  StageBench replica;
};

// The second server as a bare socket: it answers when the test says so.
class BareReplica {
 public:
  BareReplica()
      : listening_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))),
        port_(wire::SocketAddress::local(listening_.get()).port()) {}
  [[nodiscard]] std::uint16_t port() const { return port_; }
  // Accepts the next connection and reads its hello.
  std::unique_ptr<StageClient> accept(wire::Hello* hello = nullptr) {
    pollfd waiting{listening_.get(), POLLIN, 0};
    if (::poll(&waiting, 1, 20000) != 1) return nullptr;
    UniqueFd fd(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    timeval patience{20, 0};
    ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    auto client = std::make_unique<StageClient>(std::move(fd));
    wire::Hello heard{};
    if (!client->wire().read(&heard, sizeof heard)) return nullptr;
    if (hello != nullptr) *hello = heard;
    return client;
  }
  static bool answer(StageClient& client, wire::HelloStatus status = wire::HelloStatus::kAccepted) {
    const wire::HelloReply reply{wire::kFrameMagic, static_cast<std::uint32_t>(status)};
    return client.wire().raw(&reply, sizeof reply);
  }
  static bool acknowledge(StageClient& client, std::uint64_t tag) {
    return client.frame(wire::make_header(FrameType::kBarrierAck, 0, {}, tag));
  }
  void close() { listening_.reset(); }

 private:
  UniqueFd listening_;
  std::uint16_t port_;
};

// A server that ends while a source still listens does not blame the next one for it.
TEST(ReplicaChainsTest, OfAServerThatEndsBlameNobody) {
  unsigned said = 0;
  ScatterAnswers answers([&](const wire::FrameHeader&) { return ++said > 0; });
  WorkerThread ending;
  ReplicaChains chains(nullptr, 0, std::make_shared<ChainTargets>(), answers, ending, [] {});
  ending.request_stop();
  EXPECT_FALSE(chains.forward(1, {}));
  EXPECT_EQ(said, 0U);
}

// One that goes on does.
TEST(ReplicaChainsTest, OfAServerThatServesSayWhoIsMissing) {
  std::vector<wire::FrameHeader> said;
  ScatterAnswers answers([&](const wire::FrameHeader& header) {
    said.push_back(header);
    return true;
  });
  WorkerThread serving;
  ReplicaChains chains(nullptr, 0, std::make_shared<ChainTargets>(), answers, serving, [] {});
  EXPECT_FALSE(chains.forward(1, {}));
  ASSERT_EQ(said.size(), 1U);
  EXPECT_EQ(said[0].type, static_cast<std::uint8_t>(FrameType::kChainBroken));
}

// One real server with a bare replica, and a source.
class ChainTest : public ::testing::Test {
 protected:
  void SetUp() override {
    bench.make(id, {kPages}, 0);
    ASSERT_TRUE(bench.stage->set_chain(id, 1, "127.0.0.1", bare.port(), chain_tokens(id, 0, 3)));
    source = bench.scatter(id);
  }
  // The source sends a page for both; the replica has it.
  void open() {
    ASSERT_TRUE(source->pages(0, 0, page, kTwice));
    replica = bare.accept();
    ASSERT_TRUE(replica);
    ASSERT_TRUE(BareReplica::answer(*replica));
    const auto whose = replica->receive();
    ASSERT_TRUE(whose && whose->is(FrameType::kChainOf));
    const auto frame = replica->receive();
    ASSERT_TRUE(frame && frame->is(FrameType::kPages));
    ASSERT_EQ(frame->payload, page);
  }
  void expect_broken() {
    const auto end = source->await_barrier(0);
    EXPECT_FALSE(end.acknowledged);
    EXPECT_EQ(end.broken, 1U);
    EXPECT_TRUE(source->ended());
  }
  const ImageId id = image_id(1);
  StageBench bench;
  BareReplica bare;
  const std::vector<std::byte> page = random_pages(1, 1);
  std::unique_ptr<StageClient> source;
  std::unique_ptr<StageClient> replica;
};

TEST(StageChain, BothServersHoldWhatWasAcknowledged) {
  Pair pair;
  const auto source = pair.first.scatter(pair.id);
  ImageOracle first({kPages});
  ImageOracle replica({kPages});
  const auto twice = random_pages(100, 1);
  ASSERT_TRUE(source->pages(0, 0, twice, kTwice));
  first.content(0, 0, twice);
  replica.content(0, 0, twice);
  const auto alone = random_pages(10, 2);
  ASSERT_TRUE(source->pages(0, 50, alone, kAlone));
  first.content(0, 50, alone);
  ASSERT_TRUE(source->zeros(0, 90, 20, kTwice));
  first.zeros(0, 90, 20);
  replica.zeros(0, 90, 20);
  const auto over = random_pages(5, 3);
  ASSERT_TRUE(source->pages(0, 95, over, kTwice));
  first.content(0, 95, over);
  replica.content(0, 95, over);
  const auto barrier = source->barrier(5);
  EXPECT_TRUE(barrier.acknowledged);
  EXPECT_TRUE(barrier.refused.empty());
  first.check(*pair.first.gather(pair.id));
  replica.check(*pair.replica.gather(pair.id));
  EXPECT_EQ(pair.first.stage->image(pair.id)->pages_held, first.held());
  EXPECT_EQ(pair.replica.stage->image(pair.id)->pages_held, replica.held());

  // A source that comes again is followed by a chain that comes again.
  const auto again = pair.first.scatter(pair.id, 1);
  ASSERT_TRUE(again->pages(0, 0, over, kTwice));
  replica.content(0, 0, over);
  EXPECT_TRUE(again->barrier(6).acknowledged);
  replica.check(*pair.replica.gather(pair.id, 1));
  // A goodbye ends both.
  ASSERT_TRUE(again->goodbye());
  EXPECT_TRUE(again->ended());
  while (pair.replica.stage->stats().connections > 0) std::this_thread::yield();
}

constexpr std::uint32_t epoch_of(std::uint32_t attempt) {
  return std::uint32_t{StageBench::kSource} << 16U | attempt;
}
wire::FrameHeader chain_of(std::uint32_t epoch) {
  return wire::make_header(FrameType::kChainOf, 0, {}, epoch);
}
wire::FrameHeader chain_over(std::uint8_t ordinal, std::uint32_t epoch) {
  return wire::make_header(FrameType::kChainOver, ordinal, {}, epoch);
}

// The first server stands still with pages in hand, the source gives it up and sends newer ones another way; then the
// first server goes on.
TEST(StageChain, WhatAServerThatWasGivenUpPassesOnCountsNoMore) {
  StageBench replica;
  const ImageId id = image_id(1);
  replica.make(id, {kPages}, 1);
  const auto session = static_cast<std::uint16_t>(wire::kFirstChainSession + 0);
  ASSERT_TRUE(
      replica.stage->add_session(id, session, role_bit(StageRole::kChain), stage_tokens(id, session)));
  ImageOracle oracle({kPages});
  const auto older = random_pages(4, 1);
  const auto newer = random_pages(4, 2);
  std::uint32_t attempt = 0;
  const auto chain = [&](std::optional<std::uint32_t> epoch) {
    auto made = replica.connect(id, session, StageRole::kChain, attempt++);
    EXPECT_TRUE(!epoch || made->frame(chain_of(*epoch)));
    return made;
  };
  const auto source = replica.scatter(id);
  const auto late = chain(epoch_of(0));
  ASSERT_TRUE(late->pages(0, 0, older, kTwice));
  ASSERT_TRUE(late->zeros(0, 20, 4, kTwice));
  ASSERT_TRUE(late->barrier(1).acknowledged);
  oracle.content(0, 0, older);
  oracle.zeros(0, 20, 4);
  // Not of this server's.
  ASSERT_TRUE(source->frame(chain_over(2, epoch_of(7))));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  ASSERT_TRUE(late->pages(0, 8, older, kTwice));
  ASSERT_TRUE(late->barrier(2).acknowledged);
  oracle.content(0, 8, older);

  ASSERT_TRUE(source->frame(chain_over(0, epoch_of(0))));
  ASSERT_TRUE(source->pages(0, 0, newer, {1, Holders::kNobody}));
  ASSERT_TRUE(source->pages(0, 20, newer, {1, Holders::kNobody}));
  ASSERT_TRUE(source->barrier(2).acknowledged);
  oracle.content(0, 0, newer);
  oracle.content(0, 20, newer);
  ASSERT_TRUE(late->pages(0, 0, older, kTwice));
  EXPECT_FALSE(late->barrier(3).acknowledged);
  EXPECT_TRUE(late->ended());
  // Zeros, pages without room for them, what is torn, a chain that does not say whose: the same.
  for (const std::optional<std::uint32_t> epoch :
       {std::optional(epoch_of(0)), std::optional<std::uint32_t>()}) {
    const auto zeros = chain(epoch);
    ASSERT_TRUE(zeros->zeros(0, 20, 4, kTwice));
    EXPECT_TRUE(zeros->ended());
    const auto torn = chain(epoch);
    wire::FrameHeader header = StageClient::pages_header(0, 0, older, kTwice);
    ++header.checksum;
    ASSERT_TRUE(torn->wire().raw(&header, sizeof header) && torn->wire().raw(older.data(), older.size()));
    EXPECT_TRUE(torn->ended());
  }
  oracle.check(*replica.gather(id));
  // The next one of the same server, behind the source's next connection to it.
  const auto next = chain(epoch_of(1));
  ASSERT_TRUE(next->pages(0, 0, older, kTwice));
  ASSERT_TRUE(next->barrier(4).acknowledged);
  oracle.content(0, 0, older);
  oracle.check(*replica.gather(id, 1));
  // That which is over stays so, whatever is said of it later.
  ASSERT_TRUE(source->frame(chain_over(0, epoch_of(1))));
  ASSERT_TRUE(source->frame(chain_over(0, epoch_of(0))));
  ASSERT_TRUE(source->barrier(5).acknowledged);
  ASSERT_TRUE(next->zeros(0, 0, 1, kTwice));
  EXPECT_TRUE(next->ended());
  oracle.check(*replica.gather(id, 2));
  EXPECT_EQ(replica.stage->image(id)->pages_held, oracle.held());
}

// The same of what its source sends a server itself: the end of that connection may come by another server first.
TEST(StageChain, WhatASourceSentBeforeItCameAgainCountsNoMoreOnceAnotherServerSaysSo) {
  StageBench replica;
  const ImageId id = image_id(1);
  replica.make(id, {kPages}, 1);
  const auto session = static_cast<std::uint16_t>(wire::kFirstChainSession + 0);
  ASSERT_TRUE(
      replica.stage->add_session(id, session, role_bit(StageRole::kChain), stage_tokens(id, session)));
  const auto older = random_pages(4, 1);
  const auto newer = random_pages(4, 2);
  const auto late = replica.scatter(id);
  ASSERT_TRUE(late->pages(0, 0, older, {1, Holders::kNobody}));
  ASSERT_TRUE(late->barrier(1).acknowledged);
  const auto chain = replica.connect(id, session, StageRole::kChain);
  ASSERT_TRUE(chain->frame(chain_of(epoch_of(0))) && chain->frame(chain_over(1, epoch_of(0))));
  ASSERT_TRUE(chain->pages(0, 0, newer, kTwice));
  ASSERT_TRUE(chain->barrier(1).acknowledged);
  (void)late->pages(0, 0, older, {1, Holders::kNobody});
  (void)late->map(0, 0, hashes_of(older), {1, Holders::kNobody});
  EXPECT_FALSE(late->barrier(2).acknowledged);
  ImageOracle oracle({kPages});
  oracle.content(0, 0, newer);
  oracle.check(*replica.gather(id));
}

// A replica's server on which the source has settled some pages, and the chain that still brings copies of them: their
// first server was slow, so they have gone another way.
class LateCopies : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kMemory = 16ULL << 20U;
  static constexpr std::uint64_t kCopies = 8;
  static constexpr std::uint64_t kSlots = kMemory / 4096;
  static constexpr std::uint64_t kFirst = kSlots - kCopies;  // of what comes late: the last to find no room
  void SetUp() override {
    if (system_page_size() != 4096) GTEST_SKIP() << "written for pages of 4 KiB";
    replica.make(id, {kSlots}, 1);
    const auto session = static_cast<std::uint16_t>(wire::kFirstChainSession + 0);
    ASSERT_TRUE(
        replica.stage->add_session(id, session, role_bit(StageRole::kChain), stage_tokens(id, session)));
    source = replica.scatter(id);
    late = replica.connect(id, session, StageRole::kChain);
    ASSERT_TRUE(late->frame(chain_of(epoch_of(0))));
  }
  void fill() {
    ASSERT_TRUE(source->pages(0, 0, random_pages(kFirst, 4), {1, Holders::kNobody}));
    ASSERT_TRUE(source->barrier(1).acknowledged);
    ASSERT_EQ(replica.stage->stats().free_bytes, 0U);
  }
  void settle(Holders holders) {
    ASSERT_TRUE(source->map(0, kFirst, hashes_of(bytes), holders, wire::kFlagFinal));
    ASSERT_TRUE(source->barrier(2).acknowledged);
  }
  void expect_settled(Holders holders, bool zero = false) {
    const auto gather = replica.gather(id, attempt++);
    bool found = false;
    for (const auto& run : gather->read_map().runs) {
      if (run.header.first_page + run.header.page_count <= kFirst) continue;
      found = true;
      EXPECT_EQ(run.header.first_page, kFirst);
      EXPECT_EQ(run.header.page_count, kCopies);
      EXPECT_EQ(run.header.tag, holders.tag());
      EXPECT_EQ(run.header.flags, wire::kFlagFinal | (zero ? wire::kFlagZero : 0));
      const auto hashes =
          std::as_bytes(std::span(expected)).first(zero ? 0 : kCopies * sizeof(std::uint64_t));
      EXPECT_TRUE(std::equal(hashes.begin(), hashes.end(), run.payload.begin(), run.payload.end()));
    }
    EXPECT_TRUE(found) << "nothing is known of them any more";
  }
  const ImageId id = image_id(1);
  StageBench replica{kMemory};
  std::unique_ptr<StageClient> source;
  std::unique_ptr<StageClient> late;
  const std::vector<std::byte> bytes = packable_bytes(kCopies * 4096, 1);
  const std::vector<std::uint64_t> expected = hashes_of(bytes);
  const std::vector<StageClient::Refused> all{{0, kFirst, kCopies}};
  std::uint32_t attempt = 0;
};

// The record says for good that others hold them.
TEST_F(LateCopies, ThatAreRefusedLeaveTheRecord) {
  ASSERT_NO_FATAL_FAILURE(fill());
  ASSERT_NO_FATAL_FAILURE(settle({2, 3}));
  ASSERT_TRUE(late->pages(0, kFirst, bytes, kTwice));
  EXPECT_EQ(late->barrier(1).refused, all);
  expect_settled({2, 3});
  const auto packed_bytes = packed(wire::kFlagLz4, bytes);
  const auto send_packed = [&](std::uint16_t flags, std::span<const std::byte> payload) {
    const wire::FrameHeader header =
        encoded_header(flags, 0, kFirst, bytes, payload.size(), 4096, kTwice.tag());
    return late->wire().raw(&header, sizeof header) && late->wire().raw(payload.data(), payload.size());
  };
  ASSERT_TRUE(send_packed(wire::kFlagLz4, packed_bytes));
  EXPECT_EQ(late->barrier(2).refused, all);
  expect_settled({2, 3});
  wire::FrameHeader torn = StageClient::pages_header(0, kFirst, bytes, kTwice);
  ++torn.checksum;
  ASSERT_TRUE(late->wire().raw(&torn, sizeof torn) && late->wire().raw(bytes.data(), bytes.size()));
  EXPECT_EQ(late->barrier(3).torn, 1U);
  expect_settled({2, 3});
  // Room for what they come as, and for nothing else.
  ASSERT_TRUE(source->zeros(0, 0, (packed_bytes.size() + 4095) / 4096, {1, Holders::kNobody}));
  ASSERT_TRUE(source->barrier(3).acknowledged);
  ASSERT_TRUE(send_packed(wire::kFlagLz4, std::span(packed_bytes).first(packed_bytes.size() - 1)));
  EXPECT_EQ(late->barrier(4).torn, 1U);
  expect_settled({2, 3});
}

// One of the two copies that the source counts on.
TEST_F(LateCopies, ThatAreRefusedLeaveTheCopyThatIsCountedOn) {
  ASSERT_TRUE(source->pages(0, kFirst, bytes, {1, Holders::kNobody}));
  ASSERT_NO_FATAL_FAILURE(settle({1, 2}));
  ASSERT_NO_FATAL_FAILURE(fill());
  ImageOracle oracle({kSlots});
  oracle.content(0, kFirst, bytes);
  ASSERT_TRUE(late->pages(0, kFirst, bytes, kTwice));
  EXPECT_EQ(late->barrier(1).refused, all);
  wire::FrameHeader torn = StageClient::pages_header(0, kFirst, bytes, kTwice);
  ++torn.checksum;
  ASSERT_TRUE(late->wire().raw(&torn, sizeof torn) && late->wire().raw(bytes.data(), bytes.size()));
  EXPECT_EQ(late->barrier(2).torn, 1U);
  expect_settled({1, 2});
  oracle.check(*replica.gather(id, attempt++), 0, kFirst, kCopies);
}

TEST_F(LateCopies, ThatFindRoomLeaveTheRecord) {
  for (const Holders holders : {Holders{2, 3}, Holders{1, 2}}) {
    ASSERT_NO_FATAL_FAILURE(settle(holders));
    ASSERT_TRUE(late->pages(0, kFirst, bytes, kTwice));
    EXPECT_TRUE(late->barrier(1).acknowledged);
    expect_settled(holders);
  }
  ASSERT_TRUE(source->map_bare(0, kFirst, kCopies, {2, 3}, wire::kFlagFinal | wire::kFlagZero));
  ASSERT_TRUE(source->barrier(3).acknowledged);
  ASSERT_TRUE(late->zeros(0, kFirst, kCopies, kTwice));
  EXPECT_TRUE(late->barrier(2).acknowledged);
  expect_settled({2, 3}, true);
}

// Their holders were lost: they come again, and the record after them.
TEST_F(LateCopies, ThatAreMeantAreHeld) {
  ASSERT_NO_FATAL_FAILURE(settle({2, 3}));
  ASSERT_TRUE(source->pages(0, kFirst, bytes, {1, Holders::kNobody}));
  ASSERT_NO_FATAL_FAILURE(settle({1, Holders::kNobody}));
  expect_settled({1, Holders::kNobody});
  ImageOracle oracle({kSlots});
  oracle.content(0, kFirst, bytes);
  oracle.check(*replica.gather(id, attempt++));
}

TEST_F(ChainTest, WhatIsOverIsPassedOnBeforeWhatComesAfterIt) {
  ASSERT_NO_FATAL_FAILURE(open());
  ASSERT_TRUE(source->frame(chain_over(3, epoch_of(9))));
  ASSERT_TRUE(source->pages(0, 1, page, kTwice));
  const auto over = replica->receive();
  ASSERT_TRUE(over && over->is(FrameType::kChainOver));
  EXPECT_EQ(over->header.region, 3U);
  EXPECT_EQ(over->header.tag, epoch_of(9));
  const auto frame = replica->receive();
  ASSERT_TRUE(frame && frame->is(FrameType::kPages));

  // A chain that is dialled later hears of it before its first page.
  source = bench.scatter(id, 1);
  ASSERT_TRUE(source->pages(0, 1, page, kTwice));
  const auto next = bare.accept();
  ASSERT_TRUE(next && BareReplica::answer(*next));
  const auto whose = next->receive();
  ASSERT_TRUE(whose && whose->is(FrameType::kChainOf));
  EXPECT_EQ(whose->header.tag, epoch_of(1));
  const auto again = next->receive();
  ASSERT_TRUE(again && again->is(FrameType::kChainOver));
  EXPECT_EQ(again->header.tag, epoch_of(9));
  const auto last = next->receive();
  ASSERT_TRUE(last && last->is(FrameType::kPages));
}

TEST(StageChain, WhatTheReplicaHasNoRoomForIsRefused) {
  const std::uint64_t pages = 6000;
  Pair pair(16ULL << 20U, pages, 64ULL << 20U);
  if (system_page_size() != 4096) GTEST_SKIP() << "written for pages of 4 KiB";
  const auto source = pair.first.scatter(pair.id);
  const auto bytes = random_pages(pages, 1);
  ASSERT_TRUE(source->pages(0, 0, bytes, kTwice));
  const auto barrier = source->barrier(5);
  ASSERT_TRUE(barrier.acknowledged);
  ImageOracle replica({pages});
  replica.content(0, 0, bytes);
  std::uint64_t refused = 0;
  for (const auto& run : barrier.refused) {
    refused += run.count;
    replica.absent(0, run.first, run.count);
  }
  EXPECT_EQ(pair.first.stage->image(pair.id)->pages_held, pages);
  EXPECT_EQ(pair.replica.stage->image(pair.id)->pages_held, pages - refused);
  EXPECT_GT(refused, 0U);
  replica.check(*pair.replica.gather(pair.id));
}

TEST(StageChain, WhatTheFirstHasNoRoomForIsNotPassedOn) {
  const std::uint64_t pages = 6000;
  Pair pair(64ULL << 20U, pages, 16ULL << 20U);
  if (system_page_size() != 4096) GTEST_SKIP() << "written for pages of 4 KiB";
  const auto source = pair.first.scatter(pair.id);
  ASSERT_TRUE(source->pages(0, 0, random_pages(pages, 1), kTwice));
  const auto barrier = source->barrier(5);
  ASSERT_TRUE(barrier.acknowledged);
  std::uint64_t refused = 0;
  for (const auto& run : barrier.refused) refused += run.count;
  EXPECT_GT(refused, 0U);
  EXPECT_EQ(pair.first.stage->image(pair.id)->pages_held, pages - refused);
  EXPECT_EQ(pair.replica.stage->image(pair.id)->pages_held, pages - refused);
}

TEST_F(ChainTest, TheHelloOfAChainSaysWhoseItIs) {
  ASSERT_TRUE(source->zeros(0, 0, 1, kTwice));
  wire::Hello hello{};
  const auto chain = bare.accept(&hello);
  ASSERT_TRUE(chain);
  const wire::Hello expected = stage_hello(id, wire::kFirstChainSession, StageRole::kChain, 0);
  EXPECT_EQ(std::memcmp(&hello, &expected, sizeof hello), 0);
}

TEST_F(ChainTest, TheAnswerWaitsForTheReplica) {
  ASSERT_TRUE(source->pages(0, 5, page, kAlone));
  ASSERT_TRUE(source->barrier(1).acknowledged) << "nothing was passed on";
  ASSERT_NO_FATAL_FAILURE(open());
  ASSERT_TRUE(source->ask_barrier(2));
  ASSERT_TRUE(source->ask_barrier(3));
  for (const std::uint64_t tag : {2U, 3U}) {
    const auto asked = replica->receive();
    ASSERT_TRUE(asked && asked->is(FrameType::kBarrier));
    ASSERT_EQ(asked->header.tag, tag);
  }
  // It is here, and yet not acknowledged.
  EXPECT_EQ(bench.stage->image(id)->pages_held, 2U);
  EXPECT_TRUE(silent(*source));
  ASSERT_TRUE(BareReplica::acknowledge(*replica, 2));
  EXPECT_TRUE(source->await_barrier(2).acknowledged);
  EXPECT_TRUE(silent(*source));
  // A refusal of the replica's comes before the answer.
  ASSERT_TRUE(replica->frame(wire::make_header(FrameType::kRefused, 0, {PageNumber{7}, 3})));
  ASSERT_TRUE(BareReplica::acknowledge(*replica, 3));
  const auto third = source->await_barrier(3);
  EXPECT_TRUE(third.acknowledged);
  EXPECT_EQ(third.refused, (std::vector<StageClient::Refused>{{0, 7, 3}}));
}

// The page is passed on as it was sent, although another connection has replaced it here meanwhile.
TEST_F(ChainTest, AStalledReplicaHoldsUpItsSourceAlone) {
  ASSERT_NO_FATAL_FAILURE(open());
  // Until the chain is full: then the source's connection is, too.
  const auto bytes = random_pages(64, 2);
  std::jthread writer([&] {
    for (int turn = 0; turn < 200 && source->pages(0, 0, bytes, kTwice); ++turn) {
    }
  });
  std::uint64_t sent = 0;
  for (int quiet = 0; quiet < 10;) {
    std::this_thread::sleep_for(20ms);
    const std::uint64_t now = bench.stage->image(id)->bytes_in;
    quiet = now == sent ? quiet + 1 : 0;
    sent = now;
  }
  EXPECT_LT(sent, 200 * bytes.size());
  const auto gather = bench.gather(id);
  EXPECT_FALSE(gather->read(0, 0, 64).empty());
  const auto begun = Clock::now();
  EXPECT_TRUE(bench.stage->drop(id));
  EXPECT_LT(Clock::now() - begun, 15s);
  writer.join();
  EXPECT_EQ(bench.stage->stats().free_bytes, bench.stage->stats().slab_bytes);
  EXPECT_EQ(bench.stage->stats().connections, 0U);
}

// A server that is slow with a replica is waited for as long as it says that it is at it, and its source hears of that.
TEST_F(ChainTest, AReplicaThatIsSlowIsWaitedForWhileItSaysSo) {
  const auto say = [&](std::uint64_t so_far) {
    return replica->frame(wire::make_header(FrameType::kTaken, 0, {}, so_far));
  };
  StageBench impatient(StageConfig{.memory_bytes = 32ULL << 20U, .chain_timeout_ms = 1500});
  impatient.make(id, {kPages}, 0);
  ASSERT_TRUE(impatient.stage->set_chain(id, 1, "127.0.0.1", bare.port(), chain_tokens(id, 0, 3)));
  source = impatient.scatter(id);
  ASSERT_NO_FATAL_FAILURE(open());
  ASSERT_TRUE(source->ask_barrier(2));
  ASSERT_TRUE(replica->receive());
  // Less often than somebody looks, so that each look finds it quiet.
  for (int times = 0; times < 9; ++times) {
    ASSERT_TRUE(say(static_cast<std::uint64_t>(times / 3)));
    std::this_thread::sleep_for(400ms);
  }
  ASSERT_TRUE(BareReplica::acknowledge(*replica, 2));
  EXPECT_TRUE(source->await_barrier(2).acknowledged);
  EXPECT_GE(source->signs, 3U);
  // And not when it says no more.
  ASSERT_TRUE(source->ask_barrier(3));
  ASSERT_TRUE(replica->receive());
  expect_broken();
  // Nor one that goes back.
  source = impatient.scatter(id, 1);
  ASSERT_NO_FATAL_FAILURE(open());
  ASSERT_TRUE(say(5) && say(4));
  expect_broken();
  // Nor one that has worked off more than it was sent.
  source = impatient.scatter(id, 2);
  ASSERT_NO_FATAL_FAILURE(open());
  ASSERT_TRUE(say(~std::uint64_t{0}));
  expect_broken();
}

TEST_F(ChainTest, BrokenWhenTheReplicaGoes) {
  ASSERT_NO_FATAL_FAILURE(open());
  ASSERT_TRUE(source->ask_barrier(2));
  replica.reset();
  expect_broken();
  // What it had stays here, for the next connection.
  const auto next = bench.scatter(id, 1);
  ASSERT_TRUE(next->pages(0, 5, page, kAlone));
  EXPECT_TRUE(next->barrier(3).acknowledged);
  EXPECT_EQ(bench.stage->image(id)->pages_held, 2U);
}

TEST_F(ChainTest, BrokenWhileTheSourceIsWriting) {
  ASSERT_NO_FATAL_FAILURE(open());
  std::jthread writer([&] {
    const auto bytes = random_pages(64, 2);
    for (int turn = 0; turn < 4000 && source->pages(0, 0, bytes, kTwice); ++turn) {
    }
  });
  replica.reset();
  writer.join();
  const auto end = source->await_barrier(0);
  EXPECT_FALSE(end.acknowledged);
}

TEST_F(ChainTest, BrokenWhenNobodyListens) {
  bare.close();
  ASSERT_TRUE(source->zeros(0, 0, 1, kTwice));
  expect_broken();
}

TEST_F(ChainTest, BrokenWhenItIsTurnedAway) {
  std::uint32_t attempt = 0;
  for (const auto status : {wire::HelloStatus::kRefused, wire::HelloStatus::kLost}) {
    ASSERT_TRUE(source->zeros(0, 0, 1, kTwice));
    wire::Hello hello{};
    const auto chain = bare.accept(&hello);
    ASSERT_TRUE(chain);
    EXPECT_EQ(hello.epoch & 0xffffU, attempt) << "each dial has a token of its own";
    ASSERT_TRUE(BareReplica::answer(*chain, status));
    expect_broken();
    source = bench.scatter(id, ++attempt);
  }
  // The third dial is the last that there are tokens for.
  ASSERT_NO_FATAL_FAILURE(open());
  source = bench.scatter(id, 3);
  ASSERT_TRUE(source->zeros(0, 0, 1, kTwice));
  expect_broken();
}

TEST_F(ChainTest, BrokenWhenNobodyHasSaidWhereItIs) {
  ASSERT_TRUE(source->zeros(0, 0, 1, {0, 2}));
  const auto end = source->await_barrier(0);
  EXPECT_EQ(end.broken, 2U);
  EXPECT_TRUE(source->ended());
}

TEST_F(ChainTest, BrokenByAReplicaThatMakesNoSense) {
  struct Nonsense {
    std::string name;
    wire::FrameHeader header;
    bool sealed;
  };
  const auto header = [](FrameType type, std::uint32_t region, std::uint64_t first, std::uint64_t count,
                         std::uint64_t tag) {
    return wire::make_header(type, region, {PageNumber{first}, count}, tag);
  };
  const std::vector<Nonsense> all = {
      {"an answer to nothing", header(FrameType::kBarrierAck, 0, 0, 0, 8), true},
      {"refused outside", header(FrameType::kRefused, 0, kPages, 1, 0), true},
      {"refused in no region", header(FrameType::kRefused, 1, 0, 1, 0), true},
      {"refused beyond measure", header(FrameType::kRefused, 0, 1, ~0ULL, 0), true},
      {"a frame of a source", header(FrameType::kZero, 0, 0, 1, kTwice.tag()), true},
      {"a broken chain of its own", header(FrameType::kChainBroken, 0, 0, 0, 3), true},
      {"a wrong checksum", header(FrameType::kBarrierAck, 0, 0, 0, 7), false},
  };
  // More tokens than the fixture has.
  ASSERT_TRUE(bench.stage->set_chain(id, 1, "127.0.0.1", bare.port(), chain_tokens(id, 0, 16)));
  std::uint32_t attempt = 0;
  for (const Nonsense& nonsense : all) {
    SCOPED_TRACE(nonsense.name);
    ASSERT_NO_FATAL_FAILURE(open());
    ASSERT_TRUE(source->ask_barrier(7));
    const auto asked = replica->receive();
    ASSERT_TRUE(asked && asked->is(FrameType::kBarrier));
    wire::FrameHeader said = nonsense.header;
    if (nonsense.sealed) wire::seal(said);
    ASSERT_TRUE(replica->wire().raw(&said, sizeof said));
    expect_broken();
    source = bench.scatter(id, ++attempt);
  }
}

// Barriers that nobody answers are kept, but not without bound.
TEST_F(ChainTest, TooManyBarriersEndTheConnection) {
  ASSERT_NO_FATAL_FAILURE(open());
  const std::uint64_t most = ScatterAnswers::kMostBarriers;
  for (std::uint64_t tag = 0; tag < most; ++tag) ASSERT_TRUE(source->ask_barrier(tag));
  // The last one has come through: all of them are taken.
  for (std::uint64_t tag = 0; tag < most; ++tag) {
    const auto asked = replica->receive();
    ASSERT_TRUE(asked && asked->is(FrameType::kBarrier));
  }
  ASSERT_TRUE(source->ask_barrier(most));
  const auto end = source->await_barrier(0);
  EXPECT_FALSE(end.acknowledged);
  EXPECT_EQ(end.broken, std::nullopt) << "it is the source that is wrong";
  EXPECT_TRUE(source->ended());
  EXPECT_TRUE(replica->ended());
}

// A server that accepts and says nothing: whoever drops the image does not wait for it.
TEST_F(ChainTest, ADialIsCutShort) {
  ASSERT_TRUE(source->zeros(0, 0, 1, kTwice));
  const auto chain = bare.accept();
  ASSERT_TRUE(chain);
  const auto begun = Clock::now();
  EXPECT_TRUE(bench.stage->remove_session(id, StageBench::kSource));
  EXPECT_LT(Clock::now() - begun, 15s);
  EXPECT_TRUE(source->ended());
  EXPECT_TRUE(chain->ended());
  EXPECT_EQ(bench.stage->stats().connections, 0U);
}

// Chains in both directions between two servers, written at once.
TEST(StageChain, TwoServersReplicateForEachOther) {
  Pair pair;
  const auto back = static_cast<std::uint16_t>(wire::kFirstChainSession + 1);
  ASSERT_TRUE(
      pair.first.stage->add_session(pair.id, back, role_bit(StageRole::kChain), stage_tokens(pair.id, back)));
  ASSERT_TRUE(pair.replica.stage->set_chain(pair.id, 0, "127.0.0.1", pair.first.listener->port(),
                                            chain_tokens(pair.id, 1)));
  const auto to_first = pair.first.scatter(pair.id);
  const auto to_replica = pair.replica.scatter(pair.id);
  const auto low = random_pages(64, 1);
  const auto high = random_pages(64, 2);
  std::jthread other([&] {
    for (std::uint64_t turn = 0; turn < 30; ++turn) {
      ASSERT_TRUE(to_replica->pages(0, 64, high, {1, 0}));
      ASSERT_TRUE(to_replica->barrier(turn).acknowledged);
    }
  });
  for (std::uint64_t turn = 0; turn < 30; ++turn) {
    ASSERT_TRUE(to_first->pages(0, 0, low, kTwice));
    ASSERT_TRUE(to_first->barrier(turn).acknowledged);
  }
  other.join();
  ImageOracle both({kPages});
  both.content(0, 0, low);
  both.content(0, 64, high);
  both.check(*pair.first.gather(pair.id));
  both.check(*pair.replica.gather(pair.id));
}

}  // namespace
}  // namespace memferry::test
