// Paging into the memory of another process: a migration that arrives there.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "fake_source.h"
#include "fault/pager.h"
#include "os/process_maps.h"
#include "owner_process.h"
#include "page/owner_watch.h"

namespace memferry::test {
namespace {

using Op = OwnerProcess::Op;
const std::uint64_t kPage = system_page_size();

bool kernel_poisons() { return (Userfaultfd::probe().features & abi::kUffdFeaturePoison) != 0; }

class AttachPager : public testing::TestWithParam<bool> {
 protected:
  static constexpr std::uint64_t kPages = 1024;

  void SetUp() override {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.kernel_faults) GTEST_SKIP() << "no full userfaultfd here: " << std::strerror(offer.error);
  }
  void own(std::uint64_t features = 0, std::uint64_t pages = kPages) {
    owner.emplace(OwnerProcess::Options{
        .pages = pages, .shared = GetParam(), .features = features | UFFD_FEATURE_MISSING_SHMEM});
    bench.emplace(1);
    bench->regions[0] = owner->attach();
    bench->config.regions = bench->regions;
    bench->config.may_page = true;
    watch.emplace(bench->regions[0], nullptr);
    content = random_bytes(pages * kPage, 5);
  }
  void TearDown() override {
    if (bench) {
      for (const auto& wire : bench->wires)
        if (wire) ::shutdown(wire->fd(), SHUT_RDWR);
    }
    if (server.joinable()) server.join();
    if (bench && HasFailure() && bench->log.count(EngineEventKind::kFailed) > 0)
      ADD_FAILURE() << bench->log.wait(EngineEventKind::kFailed).message;
    watch.reset();
  }
  // Answers requests from `content`.
  void serve() {
    server = std::thread([this] {
      for (;;) {
        wire::FrameHeader header{};
        if (!bench->demand().read(&header, sizeof header)) return;
        if (header.type != static_cast<std::uint16_t>(wire::FrameType::kFaultRequest)) continue;
        ++requests;
        (void)bench->demand().pages(0, header.first_page, part(header.first_page, header.page_count), kPage);
      }
    });
  }
  std::span<const std::byte> part(std::uint64_t first, std::uint64_t count) const {
    return std::span(content).subspan(first * kPage, count * kPage);
  }
  std::uint64_t hash(std::uint64_t first, std::uint64_t count) const { return xxh3_64(part(first, count)); }

  std::vector<std::byte> content;
  std::optional<OwnerProcess> owner;
  std::optional<Bench> bench;
  std::optional<OwnerWatch> watch;
  std::atomic<unsigned> requests{0};
  std::thread server;
};
INSTANTIATE_TEST_SUITE_P(Memory, AttachPager, testing::Bool(),
                         [](const auto& of) { return of.param ? "Shared" : "Private"; });

// Its owner keeps the userfaultfd, and would wait for ever at what is registered and nobody serves.
TEST_P(AttachPager, OneThatCannotBeMadeLeavesNothingRegistered) {
  own();
  const OwnerProcess without({.pages = 8, .shared = GetParam(), .hidden_uffd = true});
  const std::shared_ptr<Region> good = bench->regions[0];
  ArrivalMap first(good, true, false);
  ArrivalMap second(without.attach(), true, false);
  EXPECT_THROW(Pager({&first, &second}, [](const std::string&, const std::string&) {}),
               std::invalid_argument);
  std::uint64_t paged = 0;
  for_each_paged_area([&](OwnerAddress start, OwnerAddress end) { paged += end.value - start.value; },
                      good->owner().get());
  EXPECT_EQ(paged, 0U);
  EXPECT_EQ(owner->ask(Op::kRead, 3), 0U);
}

TEST_P(AttachPager, RoundsThenTheSwitchThenFaultsAndThePush) {
  own();
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 700), kPage));
  EXPECT_TRUE(bench->data(1).zeros(0, 900, 50));
  std::memset(content.data() + 900 * kPage, 0, 50 * kPage);
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(1).barrier(1).answered);
  // Written since: every second page of the first 600.
  std::vector<wire::WireRun> dirty;
  for (std::uint64_t page = 0; page < 600; page += 2) {
    dirty.push_back({page, 1});
    content[page * kPage + 9] ^= std::byte{0xff};
  }
  EXPECT_TRUE(bench->data(0).discard(0, dirty));
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  EXPECT_EQ(owner->ask(Op::kHash, 600, 100), hash(600, 100));  // came before the switch
  EXPECT_EQ(owner->ask(Op::kHash, 0, 64), hash(0, 64));
  EXPECT_EQ(owner->ask(Op::kHash, 890, 70), hash(890, 70));
  EXPECT_GT(requests, 0U);
  owner->ask(Op::kWrite, 3, 1, 4711);  // its own from now on
  EXPECT_TRUE(bench->data(1).pages(0, 0, part(0, 900), kPage));
  EXPECT_TRUE(bench->data(1).pages(0, 950, part(950, kPages - 950), kPage));
  bench->log.wait(EngineEventKind::kComplete);
  const std::uint64_t written = 4711;
  std::memcpy(content.data() + 3 * kPage, &written, sizeof written);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
  EXPECT_EQ(bench->log.count(EngineEventKind::kFailed), 0U);
}

TEST_P(AttachPager, WhoTouchesItBeforeTheSwitchWaits) {
  own();
  bench->start();
  bench->connect();
  owner->tell(Op::kRead, 17);
  EXPECT_EQ(owner->reply(100), std::nullopt);
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  std::uint64_t expected = 0;
  std::memcpy(&expected, content.data() + 17 * kPage, sizeof expected);
  EXPECT_EQ(owner->reply(), expected);
}

TEST_P(AttachPager, AMigrationThatEndsBeforeTheSwitchLeavesNobodyWaiting) {
  own();
  bench->start();
  bench->connect();
  owner->tell(Op::kRead, 17);
  EXPECT_EQ(owner->reply(100), std::nullopt);
  bench->receiver->close();
  EXPECT_EQ(owner->reply(), 0U);
  EXPECT_EQ(owner->ask(Op::kRead, 900), 0U);
}

TEST_P(AttachPager, AMigrationThatNeverPages) {
  for (const bool might : {false, true}) {
    own();
    bench->config.may_page = might;
    bench->start();
    bench->connect();
    EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 800), kPage));
    EXPECT_TRUE(bench->data(1).zeros(0, 800, kPages - 800));
    content[5] ^= std::byte{1};
    EXPECT_TRUE(bench->data(1).barrier(1).answered);
    EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 20), kPage));  // a second round
    EXPECT_TRUE(bench->data(0).barrier(1).answered);
    std::memset(content.data() + 800 * kPage, 0, (kPages - 800) * kPage);
    EXPECT_TRUE(bench->receiver->seal());
    EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
    watch.reset();
  }
}

TEST_P(AttachPager, ASealThatCannotDeliverFailsAndDoesNotHang) {
  if (GetParam()) GTEST_SKIP() << "a shared file's pages need not be delivered";
  own();
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, kPages), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(1).barrier(1).answered);
  EXPECT_EQ(owner->ask(Op::kRemap, 512, 512), 0U);
  EXPECT_THROW((void)bench->receiver->seal(), std::runtime_error);
  EXPECT_EQ(bench->log.wait(EngineEventKind::kFailed).code, "REGION_GONE");
  bench->receiver->close();
}

// Its owner keeps the userfaultfd: what is not missing may not stay registered with nobody who reads.
TEST_P(AttachPager, AfterAFailureNobodyWaitsForZerosThatCame) {
  if (!kernel_poisons())
    GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_POISON (Linux 6.6): its owner is ended";
  own();
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).zeros(0, 900, 50));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  bench->receiver->close();
  EXPECT_EQ(owner->ask(Op::kRead, 910), 0U);
}

TEST_P(AttachPager, PrivateMemoryThatWasOnlyReadIsNotFresh) {
  if (GetParam()) GTEST_SKIP() << "what a shared file holds can be dropped from here";
  own();
  EXPECT_EQ(owner->ask(Op::kRead, 10), 0U);
  EXPECT_THROW((void)Receiver::create(bench->config), std::invalid_argument);
}

TEST_P(AttachPager, ItsDeathEndsTheArrivalAtOnce) {
  own();
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 100), kPage));
  EXPECT_TRUE(bench->data(0).switch_over());
  owner->tell(Op::kRead, 500);  // waits for a page that nobody brings
  const auto began = std::chrono::steady_clock::now();
  owner->kill();
  const EngineEvent failed = bench->log.wait(EngineEventKind::kFailed);
  EXPECT_EQ(failed.code, "OWNER_GONE") << failed.message;
  EXPECT_LT(std::chrono::steady_clock::now() - began, 20s);
}

TEST_P(AttachPager, SoDoesAnExec) {
  own();
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).switch_over());
  owner->tell(Op::kExec);
  const EngineEvent failed = bench->log.wait(EngineEventKind::kFailed);
  EXPECT_EQ(failed.code, "OWNER_GONE") << failed.message;
}

TEST_P(AttachPager, WhatIsLostFailsAndIsNeverZeros) {
  own();
  bench->config.recover_timeout = 100ms;
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 100), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  EXPECT_EQ(owner->ask(Op::kHash, 0, 100), hash(0, 100));
  owner->tell(Op::kRead, 500);
  for (const auto& wire : bench->wires) wire->close();
  bench->log.wait(EngineEventKind::kLost);
  int status = 0;
  EXPECT_EQ(::waitpid(owner->pid(), &status, 0), owner->pid());
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), kernel_poisons() ? SIGBUS : SIGKILL);  // ended before it can read anything
}

TEST_P(AttachPager, WhatItDiscardsReadsAsZeros) {
  own(UFFD_FEATURE_EVENT_REMOVE);
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 100), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  EXPECT_EQ(owner->ask(Op::kHash, 0, 100), hash(0, 100));
  EXPECT_EQ(owner->ask(Op::kDiscard, 90, 20), 0U);  // 90 to 99 are there, 100 to 109 are not
  EXPECT_EQ(owner->ask(Op::kRead, 95), 0U);
  EXPECT_EQ(owner->ask(Op::kRead, 105), 0U);
  EXPECT_TRUE(bench->data(1).pages(0, 100, part(100, kPages - 100), kPage));
  bench->log.wait(EngineEventKind::kComplete);
  ::shutdown(bench->demand().fd(), SHUT_RDWR);
  server.join();
  std::memset(content.data() + 90 * kPage, 0, 20 * kPage);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
}

// The event and the pushed pages race: neither a deadlock nor old content.
TEST_P(AttachPager, DiscardsBesideThePush) {
  constexpr std::uint64_t kMany = 8192;
  own(UFFD_FEATURE_EVENT_REMOVE, kMany);
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  std::vector<std::byte> expected = content;  // what is sent stays as it is
  std::thread push([&] {
    for (std::uint64_t page = 0; page < kMany; page += 64)
      ASSERT_TRUE(bench->data(1).pages(0, page, part(page, 64), kPage));
  });
  for (std::uint64_t page = 0; page < kMany; page += 128) {
    ASSERT_EQ(owner->ask(Op::kDiscard, page, 32), 0U);
    ASSERT_EQ(owner->ask(Op::kRead, page + 7), 0U) << page;
    std::memset(expected.data() + page * kPage, 0, 32 * kPage);
  }
  push.join();
  bench->log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kMany), xxh3_64(expected));
}

TEST_P(AttachPager, MemoryThatItUnmapsIsAnErrorOnlyThere) {
  own(UFFD_FEATURE_EVENT_UNMAP);
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).switch_over());
  owner->tell(Op::kUnmap, 512, 512);
  const EngineEvent failed = bench->log.wait(EngineEventKind::kFailed);
  EXPECT_EQ(failed.code, "REGION_GONE") << failed.message;
  EXPECT_EQ(owner->reply(), 0U);
}

TEST_P(AttachPager, MemoryThatItMovesIsAnErrorWithoutItsTellingToo) {
  own();
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).switch_over());
  EXPECT_EQ(owner->ask(Op::kRemap, 512, 512), 0U);
  (void)bench->data(1).pages(0, 0, part(0, kPages), kPage);
  const EngineEvent failed = bench->log.wait(EngineEventKind::kFailed);
  EXPECT_EQ(failed.code, "REGION_GONE") << failed.message;
}

TEST_P(AttachPager, AChildNeverReadsZerosForWhatIsMissing) {
  if (!kernel_poisons())
    GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_POISON (Linux 6.6): a fork ends the arrival";
  own(UFFD_FEATURE_EVENT_FORK);
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 100), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  EXPECT_EQ(owner->ask(Op::kHash, 0, 100), hash(0, 100));
  EXPECT_EQ(owner->ask(Op::kFork, 50), 11U);       // there: the child has it
  EXPECT_EQ(owner->ask(Op::kFork, 500), 0xdeadU);  // missing: the child is killed
  EXPECT_EQ(owner->ask(Op::kGrandchild, 50), 11U);
  EXPECT_EQ(owner->ask(Op::kGrandchild, 500), 0xdeadU);
  EXPECT_EQ(owner->ask(Op::kHash, 500, 1), hash(500, 1));
}

// What came before the switch waits here, and is not at the owner's yet.
TEST_P(AttachPager, AChildBeforeTheSwitchNeverReadsZerosEither) {
  if (!kernel_poisons()) GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_POISON (Linux 6.6): a child waits";
  own(UFFD_FEATURE_EVENT_FORK);
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 100), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_EQ(owner->ask(Op::kFork, 50), GetParam() ? 11U : 0xdeadU);
  EXPECT_EQ(owner->ask(Op::kFork, 500), 0xdeadU);
}

// Two pieces in the wrong order, with memory before, between and behind them that is nobody's business.
TEST_P(AttachPager, NothingOutsideTheMappingsIsTouched) {
  own();
  owner->ask(Op::kWrite, 0, 100, 100);
  owner->ask(Op::kWrite, 300, 100, 400);
  owner->ask(Op::kWrite, 600, 424, 700);
  Region::Attachment attachment = owner->attachment();
  attachment.extents = {{owner->address().plus(400 * kPage), 200 * kPage},
                        {owner->address().plus(100 * kPage), 200 * kPage}};
  if (GetParam()) attachment.offsets = {400 * kPage, 100 * kPage};
  watch.reset();
  bench->regions[0] = Region::attach(std::move(attachment));
  bench->config.regions = bench->regions;
  bench->config.discard_first = true;
  bench->start();
  bench->connect();
  EXPECT_EQ(owner->ask(Op::kRead, 50), 150U);  // nobody waits there
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 150), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  EXPECT_EQ(owner->ask(Op::kHash, 400, 200), hash(0, 200));
  EXPECT_EQ(owner->ask(Op::kHash, 100, 200), hash(200, 200));
  EXPECT_TRUE(bench->data(1).pages(0, 0, part(0, 400), kPage));
  bench->log.wait(EngineEventKind::kComplete);
  EXPECT_EQ(owner->ask(Op::kRead, 99), 199U);
  EXPECT_EQ(owner->ask(Op::kRead, 300), 400U);
  EXPECT_EQ(owner->ask(Op::kRead, 399), 499U);
  EXPECT_EQ(owner->ask(Op::kRead, 600), 700U);
  EXPECT_EQ(owner->ask(Op::kRead, 1023), 1123U);
}

TEST_P(AttachPager, PrivateMemoryMustBeFresh) {
  if (GetParam()) GTEST_SKIP() << "what a shared file holds can be dropped from here";
  own();
  owner->ask(Op::kWrite, 10, 1, 1);
  EXPECT_THROW((void)Receiver::create(bench->config), std::invalid_argument);
}

TEST_P(AttachPager, SharedMemoryIsDroppedFirst) {
  if (!GetParam()) GTEST_SKIP() << "nobody can drop another process's private memory";
  own();
  owner->ask(Op::kWrite, 0, kPages, 1);
  bench->config.discard_first = true;
  bench->start();
  bench->connect();
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  EXPECT_EQ(owner->ask(Op::kHash, 0, 50), hash(0, 50));
}

TEST_P(AttachPager, AUserfaultfdOfAThirdProcess) {
  own();
  // Forked alike, so that its memory is at the same addresses.
  const OwnerProcess third({.pages = kPages, .shared = GetParam(), .features = UFFD_FEATURE_MISSING_SHMEM});
  Region::Attachment attachment = owner->attachment();
  attachment.uffd = Userfaultfd::adopt(third.uffd(), 0);
  bench->config.regions = {Region::attach(std::move(attachment))};
  EXPECT_ANY_THROW((void)Receiver::create(bench->config));
}

TEST_P(AttachPager, OnePagerAtATimeAndOnlyWithAUserfaultfd) {
  own();
  bench->start();
  EXPECT_THROW((void)Receiver::create(bench->config), std::invalid_argument);
  const OwnerProcess none({.pages = 4, .shared = GetParam(), .hidden_uffd = true});
  Bench other(1);
  other.config.regions = {none.attach()};
  other.config.may_page = true;
  EXPECT_THROW((void)Receiver::create(other.config), std::invalid_argument);
}

}  // namespace
}  // namespace memferry::test
