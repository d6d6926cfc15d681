// Trackers over memory that others may write too: memfds, shared anonymous memory; and over huge pages.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "every_tracker.h"
#include "os/unique_fd.h"
#include "page/hash.h"

namespace memferry {
namespace {

constexpr TrackerOptions kOnOurWord{Writers::kTrackedMapping};

class SharedMemory : public EveryTracker {
 protected:
  static constexpr std::uint64_t kPages = 64;
  void SetUp() override {
    EveryTracker::SetUp();
    if (IsSkipped()) return;
    memfd_ = UniqueFd(static_cast<int>(::syscall(SYS_memfd_create, "tracked", 1U)));
    ASSERT_TRUE(memfd_.valid());
    ASSERT_EQ(::ftruncate(memfd_.get(), static_cast<off_t>(kPages * page_)), 0);
    mapping_ = Mapping::shared(memfd_.get(), kPages * page_);
    region_ = Region::adopt({{mapping_.start(), mapping_.size()}}, mapping_.size());
  }
  [[nodiscard]] bool refused(const TrackerOptions& options) const {
    return tracker_refusal(GetParam().kind, *region_, options).has_value();
  }
  void punch(std::uint64_t first, std::uint64_t count) const {
    ASSERT_EQ(::fallocate(memfd_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          static_cast<off_t>(first * page_), static_cast<off_t>(count * page_)),
              0);
  }
  UniqueFd memfd_;
  Mapping mapping_;
  std::shared_ptr<Region> region_;
};

TEST_P(SharedMemory, NeedsTheCallersWordOrAComparison) {
  const bool compares = GetParam().kind == TrackerKind::kHashDiff;
  EXPECT_EQ(refused({}), !compares);
  EXPECT_EQ(error_of([&] { make(region_)->arm(); }), compares ? 0 : EOPNOTSUPP);
  // Reclaim drops the entries of shared pages, and with them their soft-dirty bits: nobody's word helps there.
  const bool ever = GetParam().kind != TrackerKind::kSoftDirty;
  EXPECT_EQ(refused(kOnOurWord), !ever);
  EXPECT_EQ(error_of([&] { make(region_, kOnOurWord)->arm(); }), ever ? 0 : EOPNOTSUPP);
}

TEST_P(SharedMemory, ReportsExactlyWhatWasWritten) {
  if (refused(kOnOurWord)) GTEST_SKIP() << "refused";
  for (const std::uint64_t page : {1U, 2U, 40U}) write(region_, page);
  ASSERT_EQ(::pwrite(memfd_.get(), "x", 1, static_cast<off_t>(50 * page_)), 1);  // in no page table
  const auto tracker = make(region_, kOnOurWord);
  tracker->arm();
  if (const AtomicBitmap* populated = tracker->populated_when_armed()) {
    for (std::uint64_t page = 0; page < kPages; ++page)
      EXPECT_EQ(populated->test(PageNumber{page}), page == 1 || page == 2 || page == 40 || page == 50)
          << page;
  }
  EXPECT_EQ(collect(*tracker, kPages), PageSet{});
  write(region_, 2);
  write(region_, 50);
  write(region_, 63);
  EXPECT_EQ(read(region_, 7), std::byte{0});  // a hole that now has a page
  EXPECT_EQ(collect(*tracker, kPages), (PageSet{2, 50, 63}));
  EXPECT_EQ(collect(*tracker, kPages), PageSet{});
  // The page tables forget, the file does not.
  ASSERT_EQ(::madvise(mapping_.data(), mapping_.size(), MADV_DONTNEED), 0);
  EXPECT_EQ(collect(*tracker, kPages), PageSet{});
  write(region_, 1);
  write(region_, 8);
  EXPECT_EQ(collect(*tracker, kPages), (PageSet{1, 8}));
}

// Its mark stays when a page is cut out of the file, also when it was read since.
TEST_P(SharedMemory, WhatIsCutOutIsAChange) {
  if (refused(kOnOurWord)) GTEST_SKIP() << "refused";
  for (std::uint64_t page = 0; page < 32; ++page) write(region_, page);
  const auto tracker = make(region_, kOnOurWord);
  tracker->arm();
  EXPECT_EQ(collect(*tracker, kPages), PageSet{});
  ASSERT_EQ(::madvise(region_->address(PageNumber{3}).pointer(), 2 * page_, MADV_REMOVE), 0);
  punch(10, 2);
  punch(20, 1);
  EXPECT_EQ(read(region_, 11), std::byte{0});
  write(region_, 20);
  punch(40, 4);  // holes anyway
  EXPECT_EQ(collect(*tracker, kPages), (PageSet{3, 4, 10, 11, 20}));
  EXPECT_EQ(collect(*tracker, kPages), PageSet{});
  // At once after a look, within the same tick of the file's clock.
  for (std::uint64_t page = 0; page < 10; ++page) {
    if (page == 3 || page == 4) continue;
    punch(page, 1);
    EXPECT_EQ(collect(*tracker, kPages), PageSet{page});
  }
  // And when the clock has settled.
  std::this_thread::sleep_for(std::chrono::milliseconds(120));
  EXPECT_EQ(collect(*tracker, kPages), PageSet{});
  punch(25, 1);
  EXPECT_EQ(read(region_, 25), std::byte{0});
  EXPECT_EQ(collect(*tracker, kPages), PageSet{25});
}

TEST_P(SharedMemory, AgreesWithAModelOfWritesAndHoles) {
  if (refused(kOnOurWord)) GTEST_SKIP() << "refused";
  std::mt19937_64 random(5);
  std::vector<bool> content(kPages);
  const auto tracker = make(region_, kOnOurWord);
  tracker->arm();
  for (int round = 0; round < 60; ++round) {
    PageSet must;
    PageSet may;
    for (std::uint64_t i = random() % 12; i > 0; --i) {
      const std::uint64_t page = random() % kPages;
      if (random() % 3 != 0) {
        write(region_, page);
        content[page] = true;
        must.insert(page);
      } else {
        punch(page, 1);
        if (content[page]) must.insert(page);
        may.insert(page);
        content[page] = false;
      }
      (void)read(region_, random() % kPages);
    }
    const PageSet found = collect(*tracker, kPages);
    for (const std::uint64_t page : found) ASSERT_TRUE(must.contains(page) || may.contains(page)) << page;
    for (const std::uint64_t page : must) {
      // What was written and cut out again since the last look is what it was then, for one that compares.
      if (GetParam().kind == TrackerKind::kHashDiff && may.contains(page)) continue;
      ASSERT_TRUE(found.contains(page)) << "page " << page << ", round " << round;
    }
  }
}

TEST_P(SharedMemory, SharedAnonymousMemoryIsLikeAMemfd) {
  if (refused(kOnOurWord)) GTEST_SKIP() << "refused";
  void* const at = ::mmap(nullptr, 8 * page_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(at, MAP_FAILED);
  const auto region = Region::adopt({{Address::of(at), 8 * page_}}, 8 * page_);
  write(region, 1);
  const auto tracker = make(region, kOnOurWord);
  tracker->arm();
  write(region, 5);
  EXPECT_EQ(collect(*tracker, 8), PageSet{5});
  ASSERT_EQ(::madvise(region->address(PageNumber{1}).pointer(), page_, MADV_REMOVE), 0);
  EXPECT_EQ(collect(*tracker, 8), PageSet{1});
  tracker->disarm();
  ::munmap(at, 8 * page_);
}

TEST_P(SharedMemory, APrivateMappingOfAFileIsComparedOrRefused) {
  void* const at = ::mmap(nullptr, 4 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE, memfd_.get(), 0);
  ASSERT_NE(at, MAP_FAILED);
  const auto region = Region::adopt({{Address::of(at), 4 * page_}}, 4 * page_);
  const bool compares = GetParam().kind == TrackerKind::kHashDiff;
  EXPECT_EQ(error_of([&] { make(region, kOnOurWord)->arm(); }), compares ? 0 : EOPNOTSUPP);
  ::munmap(at, 4 * page_);
}

INSTANTIATE_TEST_SUITE_P(Every, SharedMemory, testing::ValuesIn(every_tracker()),
                         [](const auto& tracker) { return tracker.param.name(); });

// Huge pages of 2 MiB, reserved for the test and given back.
class HugePages : public EveryTracker {
 protected:
  static constexpr std::uint64_t kHuge = 2UL << 20;
  static constexpr std::uint64_t kCount = 4;
  static constexpr std::uint64_t kSmallInHuge = 512;
  static constexpr const char* kReserved = "/proc/sys/vm/nr_hugepages";

  static std::uint64_t number_in(const char* path) {
    std::uint64_t number = 0;
    std::ifstream(path) >> number;
    return number;
  }
  void SetUp() override {
    EveryTracker::SetUp();
    if (IsSkipped()) return;
    before_ = number_in(kReserved);
    std::ofstream(kReserved) << before_ + 2 * kCount;
    if (number_in(kReserved) < before_ + 2 * kCount) {
      GTEST_SKIP() << "no huge pages can be reserved here (needs root, and " << 4 * kCount
                   << " MiB in one piece each)";
    }
    reserved_ = true;
  }
  void TearDown() override {
    if (at_ != nullptr) ::munmap(at_, kCount * kHuge);
    if (before_ != number_in(kReserved)) std::ofstream(kReserved) << before_;
  }
  std::shared_ptr<Region> map(bool shared, std::uint64_t page_size) {
    const int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS | MAP_HUGETLB;
    at_ = ::mmap(nullptr, kCount * kHuge, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (at_ == MAP_FAILED) throw_errno("mmap(MAP_HUGETLB)");
    return Region::adopt({{Address::of(at_), kCount * kHuge}}, kCount * kHuge, page_size);
  }
  std::uint64_t before_ = 0;
  bool reserved_ = false;
  void* at_ = nullptr;
};

TEST_P(HugePages, AreTrackedByWholePages) {
  for (const bool shared : {false, true}) {
    const auto region = map(shared, kHuge);
    if (tracker_refusal(GetParam().kind, *region, kOnOurWord)) {
      EXPECT_EQ(GetParam().kind, TrackerKind::kSoftDirty);
      EXPECT_EQ(error_of([&] { make(region, kOnOurWord)->arm(); }), EOPNOTSUPP);
    } else {
      EXPECT_EQ(region->pages(), kCount);
      write(region, 0);
      const auto tracker = make(region, kOnOurWord);
      tracker->arm();
      EXPECT_EQ(collect(*tracker, kCount), PageSet{});
      std::memset(region->address(PageNumber{0}).pointer() + kHuge - 1, 9, 1);
      write(region, 2);
      EXPECT_EQ(collect(*tracker, kCount), (PageSet{0, 2}));
      EXPECT_EQ(collect(*tracker, kCount), PageSet{});
      // Its mark outlives a discard (private) or a hole (shared), also when the page was read since.
      for (const std::uint64_t page : {0U, 2U}) {
        ASSERT_EQ(::madvise(region->address(PageNumber{page}).pointer(), kHuge,
                            shared ? MADV_REMOVE : MADV_DONTNEED),
                  0);
      }
      EXPECT_EQ(read(region, 2), std::byte{0});
      EXPECT_EQ(collect(*tracker, kCount), (PageSet{0, 2}));
      EXPECT_EQ(collect(*tracker, kCount), PageSet{});
    }
    ::munmap(std::exchange(at_, nullptr), kCount * kHuge);
  }
}

TEST_P(HugePages, AreTrackedAsManySmallOnesWhenTheRegionsPagesAreSmall) {
  const auto region = map(false, page_);
  ASSERT_EQ(region->pages(), kCount * kSmallInHuge);
  if (tracker_refusal(GetParam().kind, *region)) GTEST_SKIP() << "refused";
  const auto tracker = make(region);
  tracker->arm();
  write(region, kSmallInHuge + 3);
  const PageSet found = collect(*tracker, region->pages());
  if (GetParam().kind == TrackerKind::kHashDiff) {
    EXPECT_EQ(found, PageSet{kSmallInHuge + 3});
  } else {
    EXPECT_EQ(found.size(), kSmallInHuge);
    EXPECT_EQ(*found.begin(), kSmallInHuge);
  }
}

// As a sender does: what each page holds now has been sent.
void send_all(DirtyTracker& tracker, const Region& region) {
  std::vector<std::uint64_t> hashes(static_cast<std::size_t>(region.pages()));
  hash_pages(region.contiguous({PageNumber{0}, region.pages()}), region.page_size(), hashes.data());
  for (std::uint64_t page = 0; page < region.pages(); ++page) tracker.sent(PageNumber{page}, hashes[page]);
}

TEST_P(HugePages, AreSplitWhereOnlyWhatChangedIsToBeSentAgain) {
  for (const bool shared : {false, true}) {
    const auto region = map(shared, page_);
    TrackerOptions options = kOnOurWord;
    if (!tracker_refusal(GetParam().kind, *region, options)) {
      options.split_huge_pages = true;
      const auto tracker = make_tracker(GetParam().kind, region, options);
      EXPECT_TRUE(tracker->wants_sent());
      write(region, kSmallInHuge + 3);
      tracker->arm();
      send_all(*tracker, *region);
      EXPECT_EQ(collect(*tracker, region->pages()), PageSet{});
      write(region, kSmallInHuge + 3);
      write(region, 3 * kSmallInHuge);
      EXPECT_EQ(collect(*tracker, region->pages()), (PageSet{kSmallInHuge + 3, 3 * kSmallInHuge}));
      send_all(*tracker, *region);
      // There and back, sent in between: what went out last counts.
      std::byte* const at = region->address(PageNumber{kSmallInHuge + 3}).pointer();
      const std::byte former = *at;
      *at = former ^ std::byte{1};
      send_all(*tracker, *region);
      *at = former;
      EXPECT_EQ(collect(*tracker, region->pages()), PageSet{kSmallInHuge + 3});
      // There and back, and nothing was sent.
      send_all(*tracker, *region);
      *at = former ^ std::byte{1};
      *at = former;
      EXPECT_EQ(collect(*tracker, region->pages()), PageSet{});
      // A hole: zeros, which were sent for all but two pages.
      ASSERT_EQ(::madvise(region->address(PageNumber{kSmallInHuge}).pointer(), kHuge,
                          shared ? MADV_REMOVE : MADV_DONTNEED),
                0);
      EXPECT_EQ(collect(*tracker, region->pages()), PageSet{kSmallInHuge + 3});
    }
    ::munmap(std::exchange(at_, nullptr), kCount * kHuge);
  }
}

// Such as kvm-log has beside it for who is no vCPU.
TEST(SplitOverATrackerThatCompares, TellsItWhatWasSent) {
  const auto region = Region::allocate(4 * system_page_size());
  const auto tracker = split_huge_pages(region, make_tracker(TrackerKind::kHashDiff, region));
  std::byte* const at = region->address(PageNumber{1}).pointer();
  *at = std::byte{1};
  tracker->arm();
  *at = std::byte{2};
  send_all(*tracker, *region);
  *at = std::byte{1};
  AtomicBitmap dirty(4);
  EXPECT_EQ(tracker->collect(dirty), 1U);
  EXPECT_TRUE(dirty.test(PageNumber{1}));
}

TEST_P(HugePages, WhatWasFoundWrittenAndNobodySentCountsAgain) {
  const auto region = map(false, page_);
  TrackerOptions options = kOnOurWord;
  if (tracker_refusal(GetParam().kind, *region, options)) GTEST_SKIP() << "refused";
  if (GetParam().kind == TrackerKind::kHashDiff) GTEST_SKIP() << "it takes what it found for sent";
  options.split_huge_pages = true;
  const auto tracker = make_tracker(GetParam().kind, region, options);
  tracker->arm();
  send_all(*tracker, *region);
  write(region, 7);
  EXPECT_EQ(collect(*tracker, region->pages()), PageSet{7});
  // Another page of the same huge one.
  write(region, 9);
  EXPECT_EQ(collect(*tracker, region->pages()), (PageSet{7, 9}));
  send_all(*tracker, *region);
  // Arming forgets what was sent: nobody knows to whom.
  tracker->arm();
  write(region, 9);
  EXPECT_EQ(collect(*tracker, region->pages()).size(), kSmallInHuge);
}

TEST_P(HugePages, ARegionThatEndsInsideOfOneIsRefused) {
  const auto whole = map(false, page_);
  const auto region = Region::adopt({{Address::of(at_).plus(page_), 4 * page_}}, 4 * page_);
  const bool compares = GetParam().kind == TrackerKind::kHashDiff;
  EXPECT_EQ(error_of([&] { make(region)->arm(); }), compares ? 0 : EOPNOTSUPP);
}

INSTANTIATE_TEST_SUITE_P(Every, HugePages, testing::ValuesIn(every_tracker()),
                         [](const auto& tracker) { return tracker.param.name(); });

// Pages of a region may also be larger than those of its memory.
using LargePages = EveryTracker;
TEST_P(LargePages, AreWrittenWhenAPartOfThemIs) {
  constexpr std::uint64_t kLarge = 2UL << 20;
  if (GetParam().kind == TrackerKind::kSoftDirty) GTEST_SKIP() << "only the system's pages";
  const Mapping memory = Mapping::anonymous(4 * kLarge);
  const Address start{(memory.start().value + kLarge - 1) / kLarge * kLarge};
  const auto region = Region::adopt({{start, 3 * kLarge}}, 3 * kLarge, kLarge);
  const auto tracker = make(region);
  tracker->arm();
  start.pointer()[kLarge + 5 * page_] = std::byte{1};
  start.pointer()[kLarge + 9 * page_] = std::byte{1};
  AtomicBitmap dirty(3);
  EXPECT_GE(tracker->collect(dirty), 1U);
  EXPECT_EQ(dirty.count(), 1U);
  EXPECT_TRUE(dirty.test(PageNumber{1}));
}
INSTANTIATE_TEST_SUITE_P(Every, LargePages, testing::ValuesIn(every_tracker()),
                         [](const auto& tracker) { return tracker.param.name(); });

}  // namespace
}  // namespace memferry
