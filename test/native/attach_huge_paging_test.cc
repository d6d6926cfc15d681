// Paging into reserved huge pages of another process: what it touches comes as a whole, nothing is seen half, nothing reads
// as zeros that was not, and what cannot be had fails.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "fake_source.h"
#include "fault/begin_paging.h"
#include "huge_pool.h"
#include "owner_process.h"
#include "page/contents.h"
#include "page/owner_watch.h"
#include "page/region_reader.h"
#include "sanitized.h"
#include "track/dirty_tracker.h"
#include "transfer/send_queue.h"

namespace memferry::test {
namespace {

using Op = OwnerProcess::Op;
constexpr std::uint64_t kUnit = 512;  // pages
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kHuge = Region::kHugePageBytes;

class AttachHugePaging : public testing::Test {
 protected:
  static constexpr std::uint64_t kUnits = 4;

  void SetUp() override {
    pool_.emplace(2 * kUnits);
    if (const std::string why = pool_->obstacle(); !why.empty()) GTEST_SKIP() << why;
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
    bench.reset();
    owner.reset();
    pool_.reset();
  }
  // Without MINOR_HUGETLBFS among the features, as QEMU's userfaultfd is.
  void own(std::uint64_t features = 0, std::uint64_t units = kUnits) {
    bench.reset();
    owner.emplace(
        OwnerProcess::Options{.pages = units * kUnit, .shared = true, .features = features, .huge = true});
    bench.emplace(1);
    bench->regions[0] = owner->attach();
    bench->config.regions = bench->regions;
    bench->config.may_page = true;
    watch.emplace(bench->regions[0], nullptr);
    content = random_bytes(units * kHuge, 5);
  }
  void begin() {
    bench->start();
    bench->connect();
  }
  // Answers requests from `content`.
  void serve() {
    server = std::thread([this] {
      for (;;) {
        wire::FrameHeader header{};
        if (!bench->demand().read(&header, sizeof header)) return;
        if (header.type != static_cast<std::uint16_t>(wire::FrameType::kFaultRequest)) continue;
        (void)bench->demand().pages(0, header.first_page, part(header.first_page, header.page_count), kPage);
      }
    });
  }
  void end_serving() {
    ::shutdown(bench->demand().fd(), SHUT_RDWR);
    server.join();
  }
  std::span<const std::byte> part(std::uint64_t first, std::uint64_t count) const {
    return std::span(content).subspan(first * kPage, count * kPage);
  }
  std::uint64_t hash(std::uint64_t first, std::uint64_t count) const { return xxh3_64(part(first, count)); }
  std::uint64_t word(std::uint64_t page) const {
    std::uint64_t value = 0;
    std::memcpy(&value, content.data() + page * kPage, sizeof value);
    return value;
  }
  void zero(std::uint64_t first, std::uint64_t count) {
    std::memset(content.data() + first * kPage, 0, count * kPage);
  }
  std::uint64_t blocks() const {
    struct stat status {};
    EXPECT_EQ(::fstat(owner->memory(), &status), 0);
    return static_cast<std::uint64_t>(status.st_blocks) * 512 / kHuge;
  }

  std::vector<std::byte> content;
  std::optional<HugePool> pool_;
  std::optional<OwnerProcess> owner;
  std::optional<Bench> bench;
  std::optional<OwnerWatch> watch;
  std::thread server;
};

TEST_F(AttachHugePaging, RoundsThenTheSwitchThenFaultsAndThePush) {
  own();
  owner->ask(Op::kWrite, 0, kUnits * kUnit, 7);  // none of the guest's
  begin();
  // The first whole, the second but for its end; of the third some, with zeros.
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 1000), kPage));
  EXPECT_TRUE(bench->data(1).zeros(0, 1100, 50));
  zero(1100, 50);
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(1).barrier(1).answered);
  // Written since: of the second every other page, and a piece.
  std::vector<wire::WireRun> dirty;
  for (std::uint64_t page = kUnit; page < kUnit + 200; page += 2) dirty.push_back({page, 1});
  dirty.push_back({900, 60});
  for (const wire::WireRun& run : dirty) {
    for (std::uint64_t page = run.first_page; page < run.first_page + run.page_count; ++page)
      content[page * kPage + 9] ^= std::byte{0xff};
  }
  EXPECT_TRUE(bench->data(0).discard(0, dirty));
  EXPECT_TRUE(bench->data(0).switch_over());
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnit), hash(0, kUnit));  // whole before the switch
  serve();
  EXPECT_EQ(owner->ask(Op::kHash, kUnit, kUnit), hash(kUnit, kUnit));
  EXPECT_EQ(owner->ask(Op::kHash, 1090, 70), hash(1090, 70));
  owner->ask(Op::kWrite, 3, 1, 4711);  // its own from now on
  EXPECT_TRUE(bench->data(1).pages(0, 0, part(0, kUnits * kUnit), kPage));
  bench->log.wait(EngineEventKind::kComplete);
  const std::uint64_t written = 4711;
  std::memcpy(content.data() + 3 * kPage, &written, sizeof written);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnits * kUnit), hash(0, kUnits * kUnit));
  EXPECT_EQ(bench->log.count(EngineEventKind::kFailed), 0U);
  // Ordinary memory: nobody is asked for it any more.
  EXPECT_NO_THROW(EXPECT_FALSE(bench->regions[0]->check_not_missing("test")));
}

// READY is said after the switch: nothing that it stands for may fail for want of memory.
TEST_F(AttachHugePaging, WhatIsMissingIsReservedBeforeTheSwitchIsAnswered) {
  const auto reserved = [] {
    std::ifstream info("/proc/meminfo");
    std::string word;
    std::uint64_t number = 0;
    while (info >> word && word != "HugePages_Rsvd:") {
    }
    info >> number;
    return number;
  };
  own();
  owner->ask(Op::kWrite, 0, kUnits * kUnit, 7);  // and its reservation goes with what is discarded
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, kUnit), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  const std::uint64_t before = reserved();
  EXPECT_TRUE(bench->data(0).switch_over());
  EXPECT_EQ(reserved(), before + kUnits - 1);
  serve();
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnits * kUnit), hash(0, kUnits * kUnit));
  EXPECT_EQ(reserved(), before);
}

TEST_F(AttachHugePaging, NothingIsSeenBeforeAllOfAHugePageIsThere) {
  own();
  begin();
  EXPECT_TRUE(bench->data(0).switch_over());
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 300), kPage));
  EXPECT_TRUE(bench->data(0).pages(0, 301, part(301, 211), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  owner->tell(Op::kHash, 0, kUnit);
  const auto request = bench->demand().request();
  ASSERT_TRUE(request);
  EXPECT_EQ(request->first_page, 300U);
  EXPECT_EQ(request->page_count, 1U);
  EXPECT_EQ(owner->reply(100), std::nullopt);
  EXPECT_TRUE(bench->demand().pages(0, 300, part(300, 1), kPage));
  EXPECT_EQ(owner->reply(), hash(0, kUnit));
}

TEST_F(AttachHugePaging, WhoTouchesItBeforeTheSwitchWaits) {
  own();
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 100), kPage));  // which may still change
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  owner->tell(Op::kRead, 17);
  EXPECT_EQ(owner->reply(100), std::nullopt);
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  EXPECT_EQ(owner->reply(), word(17));
}

TEST_F(AttachHugePaging, AMigrationThatEndsBeforeTheSwitchLeavesNobodyWaiting) {
  own();
  begin();
  owner->tell(Op::kRead, 17);
  EXPECT_EQ(owner->reply(100), std::nullopt);
  bench->receiver->close();
  EXPECT_EQ(owner->reply(), 0U);
  EXPECT_EQ(owner->ask(Op::kRead, 900), 0U);
}

TEST_F(AttachHugePaging, AMigrationThatNeverPages) {
  for (const bool might : {false, true}) {
    own();
    owner->ask(Op::kWrite, 0, kUnits * kUnit, 7);
    bench->config.may_page = might;
    begin();
    constexpr std::uint64_t kAll = kUnits * kUnit;
    EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 800), kPage));
    EXPECT_TRUE(bench->data(1).zeros(0, 800, kAll - 800));
    content[5] ^= std::byte{1};
    EXPECT_TRUE(bench->data(1).barrier(1).answered);
    EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 20), kPage));  // a second round
    EXPECT_TRUE(bench->data(0).barrier(1).answered);
    zero(800, kAll - 800);
    EXPECT_TRUE(bench->receiver->seal());
    EXPECT_EQ(owner->ask(Op::kHash, 0, kAll), hash(0, kAll)) << might;
    watch.reset();
  }
}

// What was there stays, and is replaced in part: nothing of it is seen again before the rest has come.
TEST_F(AttachHugePaging, WhatItsOwnerHasMappedIsTakenAway) {
  own();
  owner->ask(Op::kWrite, 0, kUnits * kUnit, 7);
  bench->config.discard_first = false;
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 2 * kUnit), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_EQ(owner->ask(Op::kRead, 600), word(600));  // mapped, as it comes
  content[(kUnit + 5) * kPage] ^= std::byte{0xff};
  EXPECT_TRUE(bench->data(0).discard(0, {{kUnit + 5, 1}}));
  EXPECT_TRUE(bench->data(0).switch_over());
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnit), hash(0, kUnit));
  owner->tell(Op::kHash, kUnit, kUnit);
  EXPECT_EQ(owner->reply(100), std::nullopt);
  owner->tell(Op::kRead, 3 * kUnit + 1);
  serve();
  EXPECT_EQ(owner->reply(), hash(kUnit, kUnit));
  EXPECT_EQ(owner->reply(), word(3 * kUnit + 1));
}

// Paging from the start, with rounds still to come: a huge page that was whole, and was read, is not any more.
TEST_F(AttachHugePaging, APageThatIsToComeAgainTakesItsHugePageAway) {
  own();
  bench->config.paging_from_start = true;
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 2 * kUnit), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_EQ(owner->ask(Op::kHash, 0, 2 * kUnit), hash(0, 2 * kUnit));
  content[5 * kPage] ^= std::byte{0xff};
  EXPECT_TRUE(bench->data(0).discard(0, {{5, 1}}));
  EXPECT_TRUE(bench->data(0).barrier(2).answered);
  owner->tell(Op::kHash, 0, kUnit);
  EXPECT_EQ(owner->reply(100), std::nullopt);
  EXPECT_TRUE(bench->data(0).pages(0, 5, part(5, 1), kPage));
  EXPECT_EQ(owner->reply(), hash(0, kUnit));
  EXPECT_EQ(owner->ask(Op::kHash, kUnit, kUnit), hash(kUnit, kUnit));
}

TEST_F(AttachHugePaging, ZerosAreZerosBeforeAndAfterTheEnd) {
  own();
  owner->ask(Op::kWrite, 0, kUnits * kUnit, 7);
  bench->config.paging_from_start = true;
  begin();
  EXPECT_TRUE(bench->data(0).switch_over());
  owner->tell(Op::kRead, 3);
  ASSERT_TRUE(bench->demand().request());
  EXPECT_TRUE(bench->data(0).zeros(0, 0, 2 * kUnit));
  EXPECT_EQ(owner->reply(), 0U);
  EXPECT_EQ(owner->ask(Op::kRead, kUnit + 1), 0U);
  EXPECT_TRUE(bench->data(0).zeros(0, 3 * kUnit, kUnit));
  EXPECT_TRUE(bench->data(0).pages(0, 2 * kUnit, part(2 * kUnit, 64), kPage));
  EXPECT_TRUE(bench->data(0).zeros(0, 2 * kUnit + 64, kUnit - 64));
  bench->log.wait(EngineEventKind::kComplete);
  zero(0, 2 * kUnit);
  zero(2 * kUnit + 64, 2 * kUnit - 64);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnits * kUnit), hash(0, kUnits * kUnit));
}

TEST_F(AttachHugePaging, ItsDeathEndsTheArrivalAtOnce) {
  own();
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 100), kPage));
  EXPECT_TRUE(bench->data(0).switch_over());
  owner->tell(Op::kRead, 500);  // waits for pages that nobody brings
  const auto began = std::chrono::steady_clock::now();
  owner->kill();
  const EngineEvent failed = bench->log.wait(EngineEventKind::kFailed);
  EXPECT_EQ(failed.code, "OWNER_GONE") << failed.message;
  EXPECT_LT(std::chrono::steady_clock::now() - began, 20s);
}

TEST_F(AttachHugePaging, WhatIsLostTakesItsHugePageWithItAndIsNeverSentAsZeros) {
  if ((Userfaultfd::probe().features & abi::kUffdFeaturePoison) == 0)
    GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_POISON (Linux 6.6): its owner is ended";
  own();
  bench->config.recover_timeout = 100ms;
  begin();
  EXPECT_TRUE(bench->data(0).switch_over());
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 2 * kUnit - 1), kPage));
  EXPECT_TRUE(bench->data(0).zeros(0, 3 * kUnit, kUnit));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnit), hash(0, kUnit));
  for (const auto& wire : bench->wires) wire->close();
  const EngineEvent lost = bench->log.wait(EngineEventKind::kLost);
  ASSERT_EQ(lost.lost.size(), 1U);
  EXPECT_EQ(lost.lost[0].run, (PageRun{PageNumber{kUnit}, 2 * kUnit}));
  bench->receiver->close();
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnit), hash(0, kUnit));
  EXPECT_EQ(owner->ask(Op::kRead, 3 * kUnit + 1), 0U);
  // Whoever would send it on: in the file the second one looks nearly whole, and the third like zeros.
  try {
    const SendQueue queue(bench->regions);
    ADD_FAILURE() << "lost pages may be sent";
  } catch (const SystemError& error) {
    EXPECT_EQ(error.error(), EIO);
    EXPECT_NE(std::string(error.what()).find("512-1535"), std::string::npos) << error.what();
  }
  owner->tell(Op::kRead, kUnit);  // a page of it that had come
  int status = 0;
  EXPECT_EQ(::waitpid(owner->pid(), &status, 0), owner->pid());
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGBUS);
}

TEST_F(AttachHugePaging, WhoWaitsForWhatIsLostIsKilled) {
  own();
  bench->config.recover_timeout = 100ms;
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, kUnit), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  owner->tell(Op::kRead, kUnit + 3);
  for (const auto& wire : bench->wires) wire->close();
  bench->log.wait(EngineEventKind::kLost);
  int status = 0;
  EXPECT_EQ(::waitpid(owner->pid(), &status, 0), owner->pid());
  EXPECT_TRUE(WIFSIGNALED(status));
  const bool poisons = (Userfaultfd::probe().features & abi::kUffdFeaturePoison) != 0;
  EXPECT_EQ(WTERMSIG(status), poisons ? SIGBUS : SIGKILL);
}

TEST_F(AttachHugePaging, WhatItDiscardsReadsAsZeros) {
  own(UFFD_FEATURE_EVENT_REMOVE);
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, kUnit + 100), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnit), hash(0, kUnit));
  EXPECT_EQ(owner->ask(Op::kDiscard, 0, kUnit), 0U);  // is there, and mapped
  EXPECT_EQ(owner->ask(Op::kRead, 7), 0U);
  // Has come in part, and not at all.
  EXPECT_EQ(owner->ask(Op::kDiscard, kUnit, 2 * kUnit), 0U);
  serve();
  EXPECT_EQ(owner->ask(Op::kRead, kUnit + 5), 0U);
  EXPECT_EQ(owner->ask(Op::kRead, kUnit + 300), 0U);
  EXPECT_TRUE(bench->data(1).pages(0, kUnit, part(kUnit, 3 * kUnit), kPage));
  bench->log.wait(EngineEventKind::kComplete);
  end_serving();
  zero(0, 3 * kUnit);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kUnits * kUnit), hash(0, kUnits * kUnit));
}

// The event and the pushed pages race: neither a deadlock nor old content, nor half of either.
TEST_F(AttachHugePaging, DiscardsBesideThePush) {
  constexpr int kTurns = 12;
  for (int turn = 0; turn < kTurns && !HasFailure(); ++turn) {
    own(UFFD_FEATURE_EVENT_REMOVE);
    begin();
    EXPECT_TRUE(bench->data(0).switch_over());
    serve();
    std::atomic<std::uint64_t> sent{0};
    std::thread push([&] {
      for (std::uint64_t page = 0; page < kUnits * kUnit; page += 16) {
        ASSERT_TRUE(bench->data(1).pages(0, page, part(page, 16), kPage));
        sent = page;
      }
    });
    for (std::uint64_t unit = 0; unit < kUnits; ++unit) {
      // Some time while it is on its way.
      while (sent < unit * kUnit + static_cast<std::uint64_t>(turn) * 40) std::this_thread::yield();
      ASSERT_EQ(owner->ask(Op::kDiscard, unit * kUnit, kUnit), 0U);
      ASSERT_EQ(owner->ask(Op::kRead, unit * kUnit + 7), 0U) << unit;
      ASSERT_EQ(owner->ask(Op::kRead, unit * kUnit + 500), 0U) << unit;
    }
    push.join();
    bench->log.wait(EngineEventKind::kComplete);
    EXPECT_EQ(owner->ask(Op::kHash, 0, kUnits * kUnit), xxh3_64(std::vector<std::byte>(content.size())));
    end_serving();
    watch.reset();
  }
}

// A fault is answered while the event of another thread's discard waits to be read by who answers.
TEST_F(AttachHugePaging, ThreadsOfItDiscardWhatIsThere) {
  if (kThreadsChecked) GTEST_SKIP() << "the thread sanitizer knows no threads of a forked child";
  own(UFFD_FEATURE_EVENT_REMOVE);
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, 2 * kUnit), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  owner->tell(Op::kDiscardBeside, 0, kUnit, kUnit);
  EXPECT_EQ(owner->reply(30'000), 0U);
  EXPECT_EQ(bench->log.count(EngineEventKind::kFailed), 0U);
}

TEST_F(AttachHugePaging, AChildNeverReadsZerosForWhatIsMissing) {
  if ((Userfaultfd::probe().features & abi::kUffdFeaturePoison) == 0)
    GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_POISON (Linux 6.6): a fork ends the arrival";
  own(UFFD_FEATURE_EVENT_FORK);
  begin();
  EXPECT_TRUE(bench->data(0).pages(0, 0, part(0, kUnit + 100), kPage));
  EXPECT_TRUE(bench->data(0).barrier(1).answered);
  EXPECT_TRUE(bench->data(0).switch_over());
  serve();
  EXPECT_EQ(owner->ask(Op::kFork, 50), 11U);              // there: the child has it
  EXPECT_EQ(owner->ask(Op::kFork, kUnit + 50), 0xdeadU);  // has come, in a huge page that has not
  EXPECT_EQ(owner->ask(Op::kFork, 2 * kUnit), 0xdeadU);   // missing: the child is killed
  EXPECT_EQ(owner->ask(Op::kGrandchild, 50), 11U);
  EXPECT_EQ(owner->ask(Op::kGrandchild, 2 * kUnit), 0xdeadU);
  EXPECT_EQ(owner->ask(Op::kGrandchild, 2 * kUnit, 1, 50), 0xdeadU);  // a child that has read what is there
  EXPECT_EQ(owner->ask(Op::kHash, kUnit, kUnit), hash(kUnit, kUnit));
}

TEST_F(AttachHugePaging, ASourceReadsAndTracksThemAndTakesNone) {
  own(UFFD_FEATURE_EVENT_REMOVE | abi::kUffdFeatureWpHugetlbfsShmem | abi::kUffdFeatureWpUnpopulated |
      abi::kUffdFeatureWpAsync);
  bench.reset();
  const auto region = owner->attach();
  watch.emplace(region, nullptr);
  owner->ask(Op::kWrite, 0, kUnit, 100);
  owner->ask(Op::kWrite, kUnit, kUnit, 100);
  EXPECT_EQ(blocks(), 2U);
  EXPECT_EQ(region->huge_page_bytes(), kHuge);
  RegionReader reader;
  for (std::uint64_t page = 0; page < kUnits * kUnit; page += 64) {
    const auto bytes = reader.read(*region, {PageNumber{page}, 64});
    std::uint64_t found = 0;
    std::memcpy(&found, bytes.data() + 3 * kPage, sizeof found);
    EXPECT_EQ(found, page < 2 * kUnit ? 100 + (page + 3) % kUnit : 0);
    reader.reset();
  }
  EXPECT_EQ(blocks(), 2U);
  std::uint64_t value = 1000;
  for (const TrackerKind kind : {TrackerKind::kUffdWpAsync, TrackerKind::kHashDiff}) {
    if (!probe_tracker(kind).available) continue;
    const auto tracker = make_tracker(kind, region);
    tracker->arm();
    AtomicBitmap first(kUnits * kUnit);
    tracker->collect(first);
    AtomicBitmap dirty(kUnits * kUnit);
    owner->ask(Op::kWrite, kUnit + 3, 1, ++value);
    owner->ask(Op::kWrite, 3 * kUnit + 5, 1, ++value);  // nothing is there
    tracker->collect(dirty);
    EXPECT_TRUE(dirty.test(PageNumber{kUnit + 3}));
    EXPECT_TRUE(dirty.test(PageNumber{3 * kUnit + 5}));
    EXPECT_EQ(dirty.count({PageNumber{0}, kUnit}), 0U);
    EXPECT_EQ(owner->ask(Op::kDiscard, 3 * kUnit, kUnit), 0U);
    AtomicBitmap dropped(kUnits * kUnit);
    tracker->collect(dropped);
    EXPECT_TRUE(dropped.test(PageNumber{3 * kUnit + 5}));
    EXPECT_EQ(dropped.count({PageNumber{0}, 2 * kUnit}), 0U);
    AtomicBitmap again(kUnits * kUnit);
    tracker->collect(again);
    EXPECT_EQ(blocks(), 2U);  // what was given back
  }
}

TEST_F(AttachHugePaging, WhatIsRefused) {
  own();
  const auto refusal = [&](auto change) -> std::string {
    Region::Attachment attachment = owner->attachment();
    change(attachment);
    watch.reset();
    bench.reset();
    try {
      (void)Region::attach(std::move(attachment));
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal([](Region::Attachment&) {}), "");
  EXPECT_NE(refusal([](Region::Attachment& of) { of.extents[0].bytes -= kPage; }).find("begin and end"),
            std::string::npos);
  EXPECT_NE(refusal([](Region::Attachment& of) {
              of.extents[0].start = of.extents[0].start.plus(kPage);
              of.extents[0].bytes -= kHuge;
              of.offsets[0] = kPage;
            }).find("begin and end"),
            std::string::npos);
  EXPECT_NE(refusal([](Region::Attachment& of) {
              of.extents[0].bytes -= kHuge;
              of.offsets[0] = kHuge;
            }).find("not the given file's memory"),
            std::string::npos);
  const OwnerProcess privately({.pages = kUnit, .huge = true});
  try {
    (void)privately.attach();
    ADD_FAILURE() << "private huge pages are attached";
  } catch (const SystemError& error) {
    EXPECT_NE(std::string(error.what()).find("mapped privately"), std::string::npos) << error.what();
  }
  const auto region = owner->attach();
  try {
    begin_paging(*region);
    ADD_FAILURE() << "a file is served into huge pages";
  } catch (const SystemError& error) {
    EXPECT_EQ(error.error(), EOPNOTSUPP);
  }
}

}  // namespace
}  // namespace memferry::test
