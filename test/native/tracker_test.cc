// One suite over every tracker: a tracker that the kernel cannot run is skipped by name.
#include "track/dirty_tracker.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <random>
#include <semaphore>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "every_tracker.h"
#include "lonely_mapping.h"
#include "os/mapping.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"
#include "os/userfaultfd.h"
#include "page/hash.h"
#include "page/racy_read.h"
#include "page_of_zeros.h"

namespace memferry {
namespace {

const std::uint64_t kPage = system_page_size();

class TrackerTest : public EveryTracker {};

TEST_P(TrackerTest, ReportsExactlyWhatWasWritten) {
  const auto region = small_pages(64);
  for (const std::uint64_t page : {1U, 2U, 40U}) write(region, page);
  const auto tracker = make(region);
  EXPECT_EQ(tracker->name(), tracker_name(GetParam().kind));
  tracker->arm();
  EXPECT_EQ(collect(*tracker, 64), PageSet{});
  write(region, 2);   // populated before arming
  write(region, 63);  // never touched
  EXPECT_EQ(collect(*tracker, 64), (PageSet{2, 63}));
  EXPECT_EQ(collect(*tracker, 64), PageSet{});
}

TEST_P(TrackerTest, ReadingIsNotWriting) {
  const auto region = small_pages(16);
  write(region, 3);
  const auto tracker = make(region);
  tracker->arm();
  std::uint64_t sum = 0;
  for (const std::byte byte : region->contiguous({PageNumber{0}, 16})) sum += std::to_integer<unsigned>(byte);
  EXPECT_GT(sum, 0U);
  EXPECT_EQ(collect(*tracker, 16), PageSet{});
  write(region, 9);  // of the page of zeros that the reading mapped
  EXPECT_EQ(collect(*tracker, 16), PageSet{9});
}

TEST_P(TrackerTest, AgreesWithAModelOfRandomWrites) {
  constexpr std::uint64_t kPages = 3000;
  const auto region = small_pages(kPages);
  std::mt19937_64 random(11);
  for (int i = 0; i < 500; ++i) write(region, random() % kPages);
  const auto tracker = make(region);
  tracker->arm();
  for (int round = 0; round < 30; ++round) {
    PageSet model;
    for (std::uint64_t i = random() % 400; i > 0; --i) {
      std::uint64_t page = random() % kPages;
      for (std::uint64_t run = 1 + random() % 20; run > 0 && page < kPages; --run, ++page) {
        write(region, page);
        model.insert(page);
      }
    }
    ASSERT_EQ(collect(*tracker, kPages), model) << "round " << round;
  }
}

TEST_P(TrackerTest, SeveralExtentsAreOneRegion) {
  const Mapping memory = Mapping::anonymous(64 * kPage);
  ASSERT_EQ(::madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE), 0);
  const auto at = [&](std::uint64_t page) { return memory.start().plus(page * kPage); };
  const auto region =
      Region::adopt({{at(40), 3 * kPage}, {at(8), 4 * kPage}, {at(20), 2 * kPage}}, 2 * kPage);
  const auto tracker = make(region);
  tracker->arm();
  for (const std::uint64_t page : {2U, 3U, 8U}) write(region, page);
  memory.data()[30 * kPage] = std::byte{1};  // of no extent
  EXPECT_EQ(collect(*tracker, 9), (PageSet{2, 3, 8}));
}

// A WebAssembly memory: reserved, PROT_NONE beyond its length, grown by mprotect.
TEST_P(TrackerTest, GrowthInPlaceCountsAsWritten) {
  const Mapping memory = Mapping::anonymous(64 * kPage, PROT_NONE);
  const auto open = [&](std::uint64_t pages) {
    ASSERT_EQ(::mprotect(memory.data(), pages * kPage, PROT_READ | PROT_WRITE), 0);
  };
  open(4);
  const auto region = Region::adopt({{memory.start(), 4 * kPage}}, 64 * kPage);
  const auto tracker = make(region);
  tracker->arm();
  open(10);
  write(region, 1);
  EXPECT_EQ(collect(*tracker, 64), PageSet{1});  // mapped, but the region has not been told
  region->grow(10);
  write(region, 2);
  write(region, 7);
  EXPECT_EQ(collect(*tracker, 64), (PageSet{2, 4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(collect(*tracker, 64), PageSet{});
  write(region, 5);
  EXPECT_EQ(collect(*tracker, 64), PageSet{5});
  open(64);
  region->grow(64);
  EXPECT_EQ(collect(*tracker, 64).size(), 54U);
  write(region, 63);
  EXPECT_EQ(collect(*tracker, 64), PageSet{63});
}

// The capacity is not reserved yet: mapped only when the region grows into it.
TEST_P(TrackerTest, GrowthIntoNewlyMappedMemory) {
  const LonelyMapping memory(16 * kPage);
  ASSERT_EQ(::munmap(memory.start().plus(4 * kPage).pointer(), 12 * kPage), 0);
  const auto region = Region::adopt({{memory.start(), 4 * kPage}}, 16 * kPage);
  const auto tracker = make(region);
  tracker->arm();
  void* const tail = memory.start().plus(4 * kPage).pointer();
  ASSERT_EQ(::mmap(tail, 12 * kPage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
            tail);
  region->grow(16);
  const PageSet grown = collect(*tracker, 16);
  for (std::uint64_t page = 4; page < 16; ++page) EXPECT_TRUE(grown.contains(page));
  if (!may_report_neighbours()) {
    EXPECT_EQ(grown.size(), 12U);
  }
  write(region, 12);
  write(region, 1);
  EXPECT_EQ(collect(*tracker, 16), (PageSet{1, 12}));
}

// A discarded page has become zeros: that is a change, and a write after it another.
TEST_P(TrackerTest, DiscardingWhileTrackedIsAChange) {
  const auto region = small_pages(16);
  for (std::uint64_t page = 0; page < 16; ++page) write(region, page);
  const auto tracker = make(region);
  tracker->arm();
  ASSERT_EQ(::madvise(region->address(PageNumber{5}).pointer(), 2 * kPage, MADV_DONTNEED), 0);
  const PageSet discarded = collect(*tracker, 16);
  EXPECT_EQ(discarded, (PageSet{5, 6}));
  write(region, 6);
  EXPECT_TRUE(collect(*tracker, 16).contains(6));
}

TEST_P(TrackerTest, WritesOfTheKernelCount) {
  const auto region = small_pages(8);
  const auto tracker = make(region);
  tracker->arm();
  int pipe_fds[2];
  ASSERT_EQ(::pipe(pipe_fds), 0);
  const UniqueFd reader(pipe_fds[0]);
  const UniqueFd writer(pipe_fds[1]);
  ASSERT_EQ(::write(writer.get(), "content", 7), 7);
  ASSERT_EQ(::read(reader.get(), region->address(PageNumber{6}).pointer(), 7), 7);
  EXPECT_EQ(collect(*tracker, 8), PageSet{6});
}

TEST_P(TrackerTest, AForkDisturbsNothing) {
  const auto region = small_pages(8);
  write(region, 0);
  const auto tracker = make(region);
  tracker->arm();
  write(region, 1);
  const pid_t child = ::fork();
  if (child == 0) {
    *static_cast<volatile std::byte*>(region->address(PageNumber{3}).pointer()) = std::byte{9};
    ::_exit(0);
  }
  ASSERT_GT(child, 0);
  write(region, 2);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  const PageSet dirty = collect(*tracker, 8);
  EXPECT_TRUE(dirty.contains(1));
  EXPECT_TRUE(dirty.contains(2));
  EXPECT_FALSE(dirty.contains(3)) << "the child's own copy";
}

// The contract itself, as pre-copy uses it: writers write all the time; each round copies what was collected,
// and tells a comparing tracker what it copied. Once the writers have stopped, one last round must make the
// copy equal to the memory. A tracker that loses one write leaves a page that differs.
TEST_P(TrackerTest, APreCopyWhileThreadsWriteEndsWithAnEqualCopy) {
  constexpr std::uint64_t kPages = 400;
  constexpr int kWriters = 2;
  constexpr int kRounds = 60;
  const auto region = small_pages(kPages);
  std::vector<std::byte> copy(kPages * kPage);
  const auto tracker = make(region);
  std::atomic<bool> stop{false};
  std::vector<std::thread> writers;
  for (int w = 0; w < kWriters; ++w) {
    writers.emplace_back([&, w] {
      std::mt19937_64 random(static_cast<std::uint64_t>(w));
      while (!stop.load(std::memory_order_relaxed)) {
        const std::uint64_t page = random() % kPages;
        // Each writer has its own half of a page, so that the writers do not race with each other. A few
        // values only: pages go back to former contents all the time.
        const std::uint64_t half = static_cast<std::uint64_t>(w) * (kPage / kWriters);
        const auto value = static_cast<std::byte>(random() % 3);
        region->address(PageNumber{page}).pointer()[half + 64 * (random() % 4)] = value;
      }
    });
  }
  const auto send = [&](std::uint64_t page) {
    const std::span<std::byte> to(copy.data() + page * kPage, kPage);
    racy_copy(to.data(), region->address(PageNumber{page}).pointer(), kPage);
    if (tracker->wants_sent()) tracker->sent(PageNumber{page}, xxh3_64(to));
  };
  tracker->arm();
  for (std::uint64_t page = 0; page < kPages; ++page) send(page);
  for (int round = 0; round < kRounds; ++round) {
    for (const std::uint64_t page : collect(*tracker, kPages)) send(page);
  }
  stop = true;
  for (std::thread& writer : writers) writer.join();
  for (const std::uint64_t page : collect(*tracker, kPages)) send(page);
  for (std::uint64_t page = 0; page < kPages; ++page) {
    ASSERT_EQ(std::memcmp(copy.data() + page * kPage, region->address(PageNumber{page}).pointer(), kPage), 0)
        << "page " << page;
  }
  EXPECT_EQ(collect(*tracker, kPages), PageSet{});
}

// A at collect(), B when it is sent, A again: the receiver has B, so the page must be reported.
TEST_P(TrackerTest, APageThatWentAwayAndBackAroundItsSendingIsReported) {
  const auto region = small_pages(4);
  const auto bytes = region->contiguous({PageNumber{2}, 1});
  const auto fill = [&](int value) { std::memset(bytes.data(), value, bytes.size()); };
  fill(1);
  const auto tracker = make(region);
  tracker->arm();
  fill(2);
  EXPECT_EQ(collect(*tracker, 4), PageSet{2});
  fill(3);
  tracker->sent(PageNumber{2}, xxh3_64(bytes));
  fill(2);
  EXPECT_EQ(collect(*tracker, 4), PageSet{2});
  tracker->sent(PageNumber{2}, xxh3_64(bytes));
  EXPECT_EQ(collect(*tracker, 4), PageSet{});
}

// Around the first round, too: armed with A, sent as B, A again.
TEST_P(TrackerTest, TheSameBeforeTheFirstCollect) {
  const auto region = small_pages(4);
  const auto bytes = region->contiguous({PageNumber{1}, 1});
  const auto tracker = make(region);
  tracker->arm();  // the page was never touched
  std::memset(bytes.data(), 5, bytes.size());
  tracker->sent(PageNumber{1}, xxh3_64(bytes));
  std::memset(bytes.data(), 0, bytes.size());
  EXPECT_EQ(collect(*tracker, 4), PageSet{1});
}

TEST_P(TrackerTest, ArmingAgainStartsAfresh) {
  const auto region = small_pages(8);
  const auto tracker = make(region);
  tracker->arm();
  write(region, 1);
  tracker->arm();
  EXPECT_EQ(collect(*tracker, 8), PageSet{});
  write(region, 2);
  EXPECT_EQ(collect(*tracker, 8), PageSet{2});
  tracker->disarm();
  tracker->disarm();
  write(region, 3);
  AtomicBitmap dirty(8);
  EXPECT_THROW(tracker->collect(dirty), std::logic_error);
}

TEST_P(TrackerTest, TwoTrackersOneAfterTheOther) {
  const auto region = small_pages(8);
  make(region)->arm();  // dropped while armed
  const auto tracker = make(region);
  tracker->arm();
  write(region, 4);
  EXPECT_EQ(collect(*tracker, 8), PageSet{4});
}

TEST_P(TrackerTest, ABitmapThatIsTooSmallIsRefusedBeforeAnythingIsLost) {
  const auto region = small_pages(128);
  const auto tracker = make(region);
  tracker->arm();
  write(region, 100);
  AtomicBitmap small(64);
  EXPECT_THROW(tracker->collect(small), std::invalid_argument);
  EXPECT_EQ(collect(*tracker, 128), PageSet{100});
}

TEST_P(TrackerTest, ARetiredRegionIsAnErrorNotAnEmptyAnswer) {
  const auto region = small_pages(8);
  const auto tracker = make(region);
  tracker->arm();
  write(region, 1);
  region->retire();
  AtomicBitmap dirty(8);
  EXPECT_THROW(tracker->collect(dirty), RegionGone);
  EXPECT_THROW(tracker->arm(), RegionGone);
}

TEST_P(TrackerTest, RetiringWhileCollectingWaitsOrRefuses) {
  constexpr std::uint64_t kPages = 20000;
  const auto region = small_pages(kPages);
  std::memset(region->address(PageNumber{0}).pointer(), 1, region->bytes());
  const auto tracker = make(region);
  tracker->arm();
  std::binary_semaphore started(0);
  std::thread collector([&] {
    AtomicBitmap dirty(kPages);
    started.release();
    try {
      for (;;) tracker->collect(dirty);
    } catch (const RegionGone&) {
    }
  });
  started.acquire();
  region->retire();
  // From here on nobody may read: a collector that still does dies of SIGSEGV.
  EXPECT_EQ(::mprotect(region->address(PageNumber{0}).pointer(), region->bytes(), PROT_NONE), 0);
  collector.join();
}

TEST_P(TrackerTest, SaysWhichPagesHadContentWhenItWasArmed) {
  const auto region = small_pages(32);
  for (const std::uint64_t page : {3U, 4U, 17U}) write(region, page);
  // Reading maps the page of zeros, which is no content, or, on some kernels, a page of its own, which is.
  const bool shared = reads_share_the_page_of_zeros();
  const std::byte read_only = *static_cast<volatile std::byte*>(region->address(PageNumber{8}).pointer());
  EXPECT_EQ(read_only, std::byte{0});
  const auto tracker = make(region);
  EXPECT_EQ(tracker->populated_when_armed(), nullptr);
  tracker->arm();
  const AtomicBitmap* populated = tracker->populated_when_armed();
  if (populated == nullptr) return;  // then the sender looks for itself
  write(region, 30);                 // later: for collect() to report
  for (std::uint64_t page = 0; page < 32; ++page) {
    if (page == 8 && !shared) continue;  // zeros of its own: either is right
    EXPECT_EQ(populated->test(PageNumber{page}), page == 3 || page == 4 || page == 17) << page;
  }
  EXPECT_EQ(collect(*tracker, 32), PageSet{30});
  // It does not know any more: what collect() has reported is not reported again.
  EXPECT_EQ(tracker->populated_when_armed(), nullptr);
}

// What hash-diff may be asked for as long as something is mapped there.
bool sees_mappings(const TrackerCase& tracker) { return tracker.kind != TrackerKind::kHashDiff; }

TEST_P(TrackerTest, UnmappedMemoryIsNeverSilentlyClean) {
  if (!sees_mappings(GetParam())) GTEST_SKIP() << "hash-diff reads the memory, so it must be there";
  const LonelyMapping memory(16 * kPage);
  const auto region = Region::adopt({{memory.start(), 16 * kPage}}, 16 * kPage);
  const auto tracker = make(region);
  tracker->arm();
  AtomicBitmap dirty(16);
  ASSERT_EQ(::munmap(memory.start().plus(4 * kPage).pointer(), kPage), 0);
  EXPECT_EQ(error_of([&] { tracker->collect(dirty); }), ENOMEM);
  // Something else is there now, which nobody armed: an error, or all of it written.
  ASSERT_NE(::mmap(memory.start().plus(4 * kPage).pointer(), kPage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0),
            MAP_FAILED);
  if (GetParam().kind == TrackerKind::kSoftDirty) {
    EXPECT_TRUE(collect(*tracker, 16).contains(4));
  } else {
    EXPECT_EQ(error_of([&] { tracker->collect(dirty); }), EPERM);
  }
}

TEST_P(TrackerTest, MovedMemoryIsNeverSilentlyClean) {
  if (!sees_mappings(GetParam())) GTEST_SKIP() << "hash-diff reads the memory, so it must be there";
  const LonelyMapping memory(16 * kPage);
  const LonelyMapping elsewhere(16 * kPage);
  for (std::uint64_t page = 0; page < 16; ++page) memory.data()[page * kPage] = std::byte{1};
  const auto region = Region::adopt({{memory.start(), 16 * kPage}}, 16 * kPage);
  const auto tracker = make(region);
  tracker->arm();
  ASSERT_NE(::mremap(memory.data(), 16 * kPage, 16 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere.data()),
            MAP_FAILED);
  AtomicBitmap dirty(16);
  EXPECT_EQ(error_of([&] { tracker->collect(dirty); }), ENOMEM);
  // Moved back, written on the way: mapped again, but without what was armed.
  elsewhere.data()[7 * kPage] = std::byte{2};
  ASSERT_NE(::mremap(elsewhere.data(), 16 * kPage, 16 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, memory.data()),
            MAP_FAILED);
  if (GetParam().kind == TrackerKind::kSoftDirty) {
    EXPECT_TRUE(collect(*tracker, 16).contains(7));
  } else {
    EXPECT_EQ(error_of([&] { tracker->collect(dirty); }), EPERM);
  }
}

// The page of zeros that the read maps has no mark of anybody's.
TEST_P(TrackerTest, ADiscardedPageThatWasReadSinceIsAChange) {
  const auto region = small_pages(16);
  for (std::uint64_t page = 0; page < 16; ++page) write(region, page);
  const auto tracker = make(region);
  tracker->arm();
  EXPECT_EQ(collect(*tracker, 16), PageSet{});
  ASSERT_EQ(::madvise(region->address(PageNumber{5}).pointer(), 2 * kPage, MADV_DONTNEED), 0);
  EXPECT_EQ(read(region, 5), std::byte{0});
  EXPECT_EQ(collect(*tracker, 16), (PageSet{5, 6}));
  EXPECT_EQ(collect(*tracker, 16), PageSet{});
  write(region, 5);
  EXPECT_EQ(collect(*tracker, 16), PageSet{5});
}

TEST_P(TrackerTest, ADiscardWhileAChildSharesThePagesIsAChange) {
  const auto region = small_pages(8);
  for (std::uint64_t page = 0; page < 8; ++page) write(region, page);
  const auto tracker = make(region);
  tracker->arm();
  int hold[2];
  ASSERT_EQ(::pipe(hold), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(hold[1]);
    char byte = 0;
    (void)!::read(hold[0], &byte, 1);
    ::_exit(0);
  }
  ::close(hold[0]);
  (void)collect(*tracker, 8);
  ASSERT_EQ(::madvise(region->address(PageNumber{3}).pointer(), kPage, MADV_DONTNEED), 0);
  EXPECT_EQ(read(region, 3), std::byte{0});
  write(region, 6);
  const PageSet dirty = collect(*tracker, 8);
  EXPECT_TRUE(dirty.contains(3));
  EXPECT_TRUE(dirty.contains(6));
  ::close(hold[1]);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
}

// One tracker's look must not take what another has not reported yet: soft-dirty bits are the whole process's.
TEST_P(TrackerTest, TwoRegionsAreTrackedAtOnce) {
  const auto one = small_pages(40);
  const auto two = small_pages(40);
  const auto of_one = make(one);
  const auto of_two = make(two);
  of_one->arm();
  write(one, 1);
  of_two->arm();
  write(two, 2);
  EXPECT_EQ(collect(*of_one, 40), PageSet{1});
  write(one, 3);
  EXPECT_EQ(collect(*of_two, 40), PageSet{2});
  EXPECT_EQ(collect(*of_two, 40), PageSet{});
  EXPECT_EQ(collect(*of_one, 40), PageSet{3});
  of_one->disarm();
  write(two, 4);
  of_one->arm();
  EXPECT_EQ(collect(*of_two, 40), PageSet{4});
}

// Letting go while threads write: nobody hangs, and every write arrives.
TEST_P(TrackerTest, ArmingAndLettingGoWhileThreadsWrite) {
  constexpr std::uint64_t kPages = 300;
  const auto region = small_pages(kPages);
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> sum{0};
  std::vector<std::thread> writers;
  for (std::uint64_t w = 0; w < 2; ++w) {
    writers.emplace_back([&, w] {
      for (std::uint64_t i = 0; !stop.load(std::memory_order_relaxed); ++i) {
        auto* const word =
            reinterpret_cast<std::uint64_t*>(region->address(PageNumber{i % kPages}).pointer()) + w;
        std::atomic_ref(*word).fetch_add(1, std::memory_order_relaxed);
        sum.fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  const auto tracker = make(region);
  for (int i = 0; i < 30; ++i) {
    tracker->arm();
    AtomicBitmap dirty(kPages);
    tracker->collect(dirty);
    if (i % 3 != 0) tracker->disarm();
  }
  stop = true;
  for (std::thread& writer : writers) writer.join();
  std::uint64_t found = 0;
  for (std::uint64_t page = 0; page < kPages; ++page) {
    const auto* const words =
        reinterpret_cast<const std::uint64_t*>(region->address(PageNumber{page}).pointer());
    found += words[0] + words[1];
  }
  EXPECT_EQ(found, sum.load());
}

INSTANTIATE_TEST_SUITE_P(Every, TrackerTest, testing::ValuesIn(every_tracker()),
                         [](const auto& tracker) { return tracker.param.name(); });
INSTANTIATE_TEST_SUITE_P(Kvm, TrackerTest, testing::Values(TrackerCase{TrackerKind::kKvmLog}),
                         [](const auto& tracker) { return tracker.param.name(); });

TEST(TrackerNamesTest, GoBothWays) {
  for (const TrackerProbe& probe : probe_trackers()) {
    ASSERT_TRUE(tracker_kind(probe.name));
    EXPECT_EQ(tracker_name(*tracker_kind(probe.name)), probe.name);
    EXPECT_EQ(probe.reason.empty(), probe.available);
  }
  EXPECT_FALSE(tracker_kind("none"));
}

// What only concerns uffd-wp-async.
class UffdWpAsyncTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const TrackerProbe& probe : probe_trackers()) {
      if (probe.name == "uffd-wp-async" && !probe.available) {
        GTEST_SKIP() << "uffd-wp-async does not work here: " << probe.reason << " (needs: " << probe.remedy
                     << ")";
      }
    }
  }
  static int error_of(const std::function<void()>& call) {
    try {
      call();
    } catch (const SystemError& error) {
      return error.error();
    }
    return 0;
  }
};

TEST_F(UffdWpAsyncTest, MemoryThatIsWatchedAlreadyIsAClearError) {
  const auto region = Region::allocate(8 * kPage);
  Userfaultfd other = Userfaultfd::open(0);
  other.register_missing(region->address(PageNumber{0}), region->bytes());
  const auto tracker = make_tracker(TrackerKind::kUffdWpAsync, region);
  EXPECT_EQ(error_of([&] { tracker->arm(); }), EBUSY);
  other.close();
  tracker->arm();
}

TEST(HashDiffTest, SeesWritesToSharedMemoryThroughItsFile) {
  const UniqueFd memfd(static_cast<int>(::syscall(SYS_memfd_create, "test", 1U)));
  ASSERT_TRUE(memfd.valid());
  ASSERT_EQ(::ftruncate(memfd.get(), static_cast<off_t>(4 * kPage)), 0);
  const Mapping memory = Mapping::shared(memfd.get(), 4 * kPage);
  const auto region = Region::adopt({{memory.start(), 4 * kPage}}, 4 * kPage);
  const auto tracker = make_tracker(TrackerKind::kHashDiff, region);
  tracker->arm();
  ASSERT_EQ(::pwrite(memfd.get(), "x", 1, static_cast<off_t>(2 * kPage)), 1);
  AtomicBitmap dirty(4);
  EXPECT_EQ(tracker->collect(dirty), 1U);
  EXPECT_TRUE(dirty.test(PageNumber{2}));
}

}  // namespace
}  // namespace memferry
