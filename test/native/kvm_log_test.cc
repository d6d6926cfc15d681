// KVM's dirty log under the contract of every tracker, with a guest that really writes.
#include "track/kvm_log.h"

#include <gtest/gtest.h>

#if defined(__x86_64__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "kvm_vm.h"
#include "os/kvm_abi.h"
#include "page/hash.h"
#include "page/racy_read.h"

namespace memferry {
namespace {

static_assert(abi::kKvmGetApiVersion == KVM_GET_API_VERSION);
static_assert(abi::kKvmCheckExtension == KVM_CHECK_EXTENSION);
static_assert(abi::kKvmGetDirtyLog == KVM_GET_DIRTY_LOG);
static_assert(abi::kKvmEnableCap == KVM_ENABLE_CAP);
static_assert(abi::kKvmClearDirtyLog == KVM_CLEAR_DIRTY_LOG);
static_assert(abi::kKvmApiVersion == KVM_API_VERSION);
static_assert(abi::kKvmCapManualDirtyLogProtect2 == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
static_assert(abi::kKvmDirtyLogManualProtect == KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
static_assert(offsetof(abi::KvmDirtyLog, bitmap) == offsetof(kvm_dirty_log, dirty_bitmap));
static_assert(offsetof(abi::KvmClearDirtyLog, pages) == offsetof(kvm_clear_dirty_log, num_pages));
static_assert(offsetof(abi::KvmClearDirtyLog, first_page) == offsetof(kvm_clear_dirty_log, first_page));
static_assert(offsetof(abi::KvmClearDirtyLog, bitmap) == offsetof(kvm_clear_dirty_log, dirty_bitmap));
static_assert(offsetof(abi::KvmEnableCap, args) == offsetof(kvm_enable_cap, args));

using PageSet = std::set<std::uint64_t>;
constexpr std::uint64_t kGuest = 0x100000;  // where the region begins for the guest
const std::uint64_t kPage = system_page_size();

int error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const SystemError& error) {
    return error.error();
  }
  return 0;
}

class KvmLogTest : public testing::Test {
 protected:
  void SetUp() override {
    const TrackerProbe probe = probe_kvm_log();
    if (!probe.available) {
      GTEST_SKIP() << "kvm-log does not work here: " << probe.reason << " (needs: " << probe.remedy << ")";
    }
  }

  // A VM whose slot 0 is the region, with marks.
  struct Rig {
    explicit Rig(std::uint64_t pages, bool by_hand = true)
        : region(Region::allocate(pages * kPage)), manual_protect(by_hand) {
      vm.map(0, kGuest, region->address(PageNumber{0}), region->bytes());
      marks = std::make_shared<WriteMarks>(pages);
    }
    [[nodiscard]] KvmLog log() const {
      return {vm.fd(), {{0, {PageNumber{0}, region->pages()}}}, marks, manual_protect};
    }
    void write(std::uint64_t page) {
      vm.write(kGuest + page * kPage + 8 * (page % 100), static_cast<std::uint32_t>(++writes));
    }
    PageSet collect(DirtyTracker& tracker) const {
      AtomicBitmap dirty(region->capacity_pages());
      const std::uint64_t count = tracker.collect(dirty);
      PageSet pages;
      PageNumber from{0};
      while (const auto run = dirty.take_run(from, PageNumber{region->pages()}, region->pages())) {
        for (std::uint64_t i = 0; i < run->count; ++i) pages.insert(run->first.value + i);
        from = run->end();
      }
      EXPECT_EQ(count, pages.size());
      return pages;
    }
    std::shared_ptr<Region> region;
    const bool manual_protect;
    WritingVm vm;
    std::shared_ptr<WriteMarks> marks;
    std::uint64_t writes = 0;
  };
};

// Reading and protecting in one step, as before Linux 5.2, and in two.
class KvmLogStepsTest : public KvmLogTest, public testing::WithParamInterface<bool> {};
INSTANTIATE_TEST_SUITE_P(Every, KvmLogStepsTest, testing::Bool(),
                         [](const testing::TestParamInfo<bool>& two) { return two.param ? "two" : "one"; });

TEST_P(KvmLogStepsTest, ReportsWhatTheGuestWroteAndNothingElse) {
  Rig rig(300, GetParam());
  KvmLogTracker tracker(rig.region, rig.log(), nullptr);
  rig.write(7);
  tracker.arm();
  EXPECT_EQ(rig.collect(tracker), PageSet{});
  rig.write(7);
  rig.write(63);
  rig.write(64);
  rig.write(299);
  EXPECT_EQ(rig.collect(tracker), (PageSet{7, 63, 64, 299}));
  EXPECT_EQ(rig.collect(tracker), PageSet{});
  rig.write(64);
  EXPECT_EQ(rig.collect(tracker), PageSet{64});
  tracker.arm();
  EXPECT_EQ(rig.collect(tracker), PageSet{});
}

TEST_P(KvmLogStepsTest, AgreesWithAModelOfRandomWritesOfGuestAndVmm) {
  constexpr std::uint64_t kPages = 1000;
  Rig rig(kPages, GetParam());
  KvmLogTracker tracker(rig.region, rig.log(), nullptr);
  tracker.arm();
  std::mt19937_64 random(5);
  for (int round = 0; round < 30; ++round) {
    PageSet model;
    for (std::uint64_t i = random() % 100; i > 0; --i) {
      const std::uint64_t page = random() % kPages;
      rig.write(page);
      model.insert(page);
    }
    const PageRun run{PageNumber{random() % 700}, random() % 300};
    for (std::uint64_t page = run.first.value; page < run.end().value; ++page) {
      rig.region->address(PageNumber{page}).pointer()[0] = static_cast<std::byte>(round);
      model.insert(page);
    }
    rig.marks->mark(run);
    ASSERT_EQ(rig.collect(tracker), model) << "round " << round;
  }
}

// Whatever the VMM does: another tracker looks at the same memory.
TEST_F(KvmLogTest, WritesThatNobodyMarkedAreSeenByTheOtherTracker) {
  Rig rig(64);
  KvmLog log = rig.log();
  log.marks = nullptr;
  KvmLogTracker tracker(rig.region, log, make_tracker(TrackerKind::kHashDiff, rig.region));
  tracker.arm();
  rig.write(3);
  rig.region->address(PageNumber{40}).pointer()[5] = std::byte{1};
  EXPECT_EQ(rig.collect(tracker), (PageSet{3, 40}));
  EXPECT_EQ(rig.collect(tracker), PageSet{});
  EXPECT_THROW(KvmLogTracker(rig.region, log, nullptr), std::invalid_argument)
      << "neither marks nor a tracker";
}

// The contract, as pre-copy uses it, with a vCPU and a device that write throughout. In short bursts, over so many pages
// that hardly one is written twice: a write that is lost is not made good by the next.
TEST_P(KvmLogStepsTest, APreCopyWhileTheGuestWritesEndsWithAnEqualCopy) {
  constexpr std::uint64_t kPages = 4000;
  constexpr int kBursts = 30;
  Rig rig(kPages, GetParam());
  KvmLogTracker tracker(rig.region, rig.log(), nullptr);
  std::vector<std::byte> copy(kPages * kPage);
  const auto memory = [&](std::uint64_t page) { return rig.region->address(PageNumber{page}).pointer(); };
  const auto send = [&](std::uint64_t page) { racy_copy(copy.data() + page * kPage, memory(page), kPage); };
  tracker.arm();
  std::mt19937_64 random(9);
  for (int burst = 0; burst < kBursts; ++burst) {
    std::atomic<int> writing{2};
    std::vector<std::uint64_t> pages(160);
    for (std::uint64_t& page : pages) page = random() % kPages;
    std::thread vcpu([&] {
      for (std::size_t i = 0; i < 80; ++i) rig.write(pages[i]);
      --writing;
    });
    std::thread device([&] {
      for (std::size_t i = 80; i < pages.size(); ++i) {
        memory(pages[i])[4000] = static_cast<std::byte>(burst + 1);
        rig.marks->mark({PageNumber{pages[i]}, 1});
      }
      --writing;
    });
    while (writing.load() > 0) {
      for (const std::uint64_t page : rig.collect(tracker)) send(page);
    }
    vcpu.join();
    device.join();
    for (const std::uint64_t page : rig.collect(tracker)) send(page);
    for (const std::uint64_t page : pages) {
      ASSERT_EQ(std::memcmp(copy.data() + page * kPage, memory(page), kPage), 0)
          << "page " << page << ", burst " << burst;
    }
  }
  EXPECT_EQ(rig.collect(tracker), PageSet{});
}

TEST_F(KvmLogTest, SeveralSlotsAndAliases) {
  const auto region = Region::allocate(200 * kPage);
  WritingVm vm;
  vm.map(0, kGuest, region->address(PageNumber{0}), 100 * kPage);
  vm.map(5, 0x4000000, region->address(PageNumber{100}), 100 * kPage);
  vm.map(6, 0x8000000, region->address(PageNumber{0}), 70 * kPage);  // once more, elsewhere
  const auto marks = std::make_shared<WriteMarks>(200);
  KvmLogTracker tracker(
      region,
      {vm.fd(), {{0, {PageNumber{0}, 100}}, {5, {PageNumber{100}, 100}}, {6, {PageNumber{0}, 70}}}, marks},
      nullptr);
  tracker.arm();
  vm.write(kGuest + 99 * kPage, 1);
  vm.write(0x4000000 + 99 * kPage, 2);
  vm.write(0x8000000 + 69 * kPage, 3);
  AtomicBitmap dirty(200);
  EXPECT_EQ(tracker.collect(dirty), 3U);
  for (const std::uint64_t page : {69U, 99U, 199U}) EXPECT_TRUE(dirty.test(PageNumber{page})) << page;
}

// Memory that uffd-wp-async refuses.
TEST_F(KvmLogTest, SharedMemory) {
  const UniqueFd memfd(static_cast<int>(::syscall(SYS_memfd_create, "ram", 1U)));
  ASSERT_EQ(::ftruncate(memfd.get(), static_cast<off_t>(16 * kPage)), 0);
  const Mapping memory = Mapping::shared(memfd.get(), 16 * kPage);
  const auto region = Region::adopt({{memory.start(), 16 * kPage}}, 16 * kPage);
  WritingVm vm;
  vm.map(0, kGuest, memory.start(), memory.size());
  KvmLogTracker tracker(region, {vm.fd(), {{0, {PageNumber{0}, 16}}}, std::make_shared<WriteMarks>(16)},
                        nullptr);
  tracker.arm();
  vm.write(kGuest + 5 * kPage, 1);
  AtomicBitmap dirty(16);
  EXPECT_EQ(tracker.collect(dirty), 1U);
  EXPECT_TRUE(dirty.test(PageNumber{5}));
}

TEST_P(KvmLogStepsTest, ASlotOfAnotherLengthIsAnErrorAndNeverOverflows) {
  for (const std::uint64_t pages : {64U, 100U, 128U, 4096U}) {
    Rig rig(5000);
    rig.vm.map(1, 0x40000000, rig.region->address(PageNumber{0}), pages * kPage);
    for (const std::uint64_t said : {1U, 63U, 64U, 65U, 99U, 101U, 127U, 128U, 129U, 4000U, 4095U}) {
      if (said == pages) continue;
      KvmLogTracker tracker(rig.region, {rig.vm.fd(), {{1, {PageNumber{0}, said}}}, rig.marks, GetParam()},
                            nullptr);
      EXPECT_EQ(error_of([&] { tracker.arm(); }), EINVAL) << said << " of " << pages;
      AtomicBitmap dirty(5000);
      EXPECT_THROW(tracker.collect(dirty), std::logic_error);
    }
  }
}

TEST_F(KvmLogTest, ASlotWithoutALogIsAnError) {
  Rig rig(64);
  rig.vm.map(1, 0x40000000, rig.region->address(PageNumber{0}), 64 * kPage, 0);
  const auto arm = [&](std::uint32_t slot) {
    KvmLogTracker(rig.region, {rig.vm.fd(), {{slot, {PageNumber{0}, 64}}}, rig.marks}, nullptr).arm();
  };
  EXPECT_EQ(error_of([&] { arm(1); }), ENOENT);
  EXPECT_EQ(error_of([&] { arm(2); }), ENOENT);
  EXPECT_NE(error_of([&] { arm(0xffffffff); }), 0);
}

// A log that goes away while it is read is never "nothing was written", and nothing that was taken is lost.
TEST_F(KvmLogTest, ALogThatEndsWhileArmedIsAnErrorAndLosesNothing) {
  const auto region = Region::allocate(128 * kPage);
  WritingVm vm;
  vm.map(0, kGuest, region->address(PageNumber{0}), 64 * kPage);
  vm.map(1, 0x4000000, region->address(PageNumber{64}), 64 * kPage);
  const auto marks = std::make_shared<WriteMarks>(128);
  KvmLogTracker tracker(region, {vm.fd(), {{0, {PageNumber{0}, 64}}, {1, {PageNumber{64}, 64}}}, marks},
                        nullptr);
  tracker.arm();
  vm.write(kGuest + 9 * kPage, 1);
  vm.write(0x4000000, 1);
  vm.map(1, 0x4000000, region->address(PageNumber{64}), 64 * kPage, 0);
  AtomicBitmap dirty(128);
  EXPECT_EQ(error_of([&] { tracker.collect(dirty); }), ENOENT);
  EXPECT_EQ(dirty.count(), 0U);
  vm.map(1, 0x4000000, region->address(PageNumber{64}), 64 * kPage);
  EXPECT_EQ(tracker.collect(dirty), 65U);  // slot 0's page, and all of slot 1
  EXPECT_TRUE(dirty.test(PageNumber{9}));
  EXPECT_TRUE(dirty.test(PageNumber{64}));
}

TEST_F(KvmLogTest, WhatIsNoVmIsRefused) {
  Rig rig(8);
  KvmLog log = rig.log();
  log.vm_fd = ::dup(1);
  const UniqueFd no_vm(log.vm_fd);
  EXPECT_EQ(error_of([&] { KvmLogTracker(rig.region, log, nullptr); }), ENOTTY);
  log.vm_fd = -1;
  EXPECT_EQ(error_of([&] { KvmLogTracker(rig.region, log, nullptr); }), EBADF);
  const UniqueFd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
  log.vm_fd = kvm.get();
  EXPECT_NE(error_of([&] { KvmLogTracker(rig.region, log, nullptr).arm(); }), 0);
}

TEST_F(KvmLogTest, AVmOfAnotherProcessIsAClearError) {
  Rig rig(8);
  KvmLogTracker tracker(rig.region, rig.log(), nullptr);
  const pid_t child = ::fork();
  if (child == 0) ::_exit(error_of([&] { tracker.arm(); }) == EIO ? 0 : 1);
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_F(KvmLogTest, SlotsThatDoNotFitTheRegionAreRefused) {
  Rig rig(64);
  const auto refused = [&](const std::vector<KvmSlot>& slots) {
    EXPECT_THROW(KvmLogTracker(rig.region, {rig.vm.fd(), slots, rig.marks}, nullptr), std::invalid_argument);
  };
  refused({});
  refused({{0, {PageNumber{0}, 0}}});
  refused({{0, {PageNumber{0}, 65}}});
  refused({{0, {PageNumber{64}, 1}}});
  refused({{0, {PageNumber{1}, ~0ULL}}});
  refused({{0, {PageNumber{~0ULL}, 2}}});
  refused({{0, {PageNumber{0}, 64}}, {0, {PageNumber{0}, 64}}});
  const Mapping memory = Mapping::anonymous(64 * kPage);
  const auto pieces =
      Region::adopt({{memory.start(), 8 * kPage}, {memory.start().plus(16 * kPage), 8 * kPage}}, 8 * kPage);
  EXPECT_THROW(
      KvmLogTracker(pieces, {rig.vm.fd(), {{0, {PageNumber{0}, 16}}}, std::make_shared<WriteMarks>(16)},
                    nullptr),
      std::invalid_argument);
  EXPECT_THROW(
      KvmLogTracker(rig.region, {rig.vm.fd(), {{0, {PageNumber{0}, 64}}}, std::make_shared<WriteMarks>(63)},
                    nullptr),
      std::invalid_argument);
}

TEST_F(KvmLogTest, HoldsTheVmAsLongAsItLives) {
  auto rig = std::make_unique<Rig>(8);
  const auto region = rig->region;
  KvmLogTracker tracker(region, rig->log(), nullptr);
  tracker.arm();
  rig->write(5);
  rig.reset();
  AtomicBitmap dirty(8);
  EXPECT_EQ(tracker.collect(dirty), 1U);
  EXPECT_TRUE(dirty.test(PageNumber{5}));
}

TEST(WriteMarksTest, AreTakenOnceAndBounded) {
  WriteMarks marks(200);
  AtomicBitmap into(200);
  marks.mark({PageNumber{60}, 100});
  marks.mark({PageNumber{199}, 1});
  marks.mark({PageNumber{200}, 0});
  marks.take(into);
  EXPECT_EQ(into.count(), 101U);
  EXPECT_EQ(into.count({PageNumber{60}, 100}), 100U);
  marks.take(into);
  EXPECT_EQ(into.count(), 101U);
  EXPECT_THROW(marks.mark({PageNumber{199}, 2}), std::out_of_range);
  EXPECT_THROW(marks.mark({PageNumber{~0ULL}, 2}), std::out_of_range);
  EXPECT_THROW(WriteMarks(0), std::invalid_argument);
  marks.mark({PageNumber{3}, 1});
  marks.clear();
  AtomicBitmap nothing(200);
  marks.take(nothing);
  EXPECT_EQ(nothing.count(), 0U);
}

}  // namespace
}  // namespace memferry
#endif
