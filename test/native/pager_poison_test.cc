// Pages that are lost fail and never read as zeros, on kernels that can poison pages and on those that cannot: then
// another mapping takes their place (native/os/failing_memory). Both are held to the same here; which one it is depends
// on the kernel that the test runs on.
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "failing_access.h"
#include "fault/pager.h"
#include "os/failing_memory.h"
#include "os/mapping.h"
#include "sanitized.h"

namespace memferry {
namespace {

const std::uint64_t kPage = system_page_size();

class PagerPoison : public testing::Test {
 protected:
  void SetUp() override {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.kernel_faults) GTEST_SKIP() << "no userfaultfd for faults of system calls here";
  }
  void start(std::shared_ptr<Region> region) {
    region_ = std::move(region);
    map_ = std::make_unique<ArrivalMap>(region_, true, false);
    pager_ = std::make_unique<Pager>(std::vector<ArrivalMap*>{map_.get()},
                                     [this](const std::string&, const std::string&) { ++broken_; });
    pager_->serve();
  }
  [[nodiscard]] std::byte* page(std::uint64_t number) const {
    return region_->address(PageNumber{number}).pointer();
  }
  Pager::Installed install(std::uint64_t number, std::uint64_t count = 1) {
    const std::vector<std::byte> content(count * kPage, content_of(number));
    return pager_->install(0, {PageNumber{number}, count}, content.data());
  }
  static std::byte content_of(std::uint64_t number) { return static_cast<std::byte>(1 + number % 200); }
  void expect_fails(std::uint64_t number) const {
    EXPECT_EQ(FailingAccess::load(page(number)), -SIGBUS) << "page " << number;
    EXPECT_EQ(FailingAccess::store(page(number) + kPage - 1, std::byte{1}), -SIGBUS) << "page " << number;
    EXPECT_EQ(FailingAccess::read_by_the_kernel(page(number)), -EFAULT) << "page " << number;
  }
  void expect_right(std::uint64_t number) const {
    EXPECT_EQ(FailingAccess::load(page(number) + 7), std::to_integer<int>(content_of(number)));
  }

  FailingAccess access_;
  std::shared_ptr<Region> region_;
  std::unique_ptr<ArrivalMap> map_;
  std::unique_ptr<Pager> pager_;
  std::atomic<int> broken_{0};
};

std::uint64_t areas_of_this_process() {
  std::ifstream maps("/proc/self/maps");
  return static_cast<std::uint64_t>(
      std::count(std::istreambuf_iterator<char>(maps), std::istreambuf_iterator<char>(), '\n'));
}

// Of userfaultfds, and of the file that is put over lost pages.
std::uint64_t descriptors_for_paging() {
  std::uint64_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const std::string target = std::filesystem::read_symlink(entry, gone).string();
    if (target == "anon_inode:[userfaultfd]" || target.starts_with("/memfd:memferry-failing")) ++count;
  }
  return count;
}

TEST_F(PagerPoison, MissingPagesFailWhenItLetsGoAndTheOthersStay) {
  start(Region::allocate(64 * kPage));
  ASSERT_TRUE(install(8, 8).intact);
  ASSERT_TRUE(pager_->install_zeros(0, {PageNumber{20}, 2}).intact);
  pager_->poison_missing();
  pager_->stop();
  for (std::uint64_t number = 0; number < 64; ++number) {
    if (number >= 8 && number < 16) {
      EXPECT_EQ(FailingAccess::load(page(number)), std::to_integer<int>(content_of(8)));
    } else if (number == 20 || number == 21) {
      EXPECT_EQ(FailingAccess::load(page(number)), 0);
    } else {
      expect_fails(number);
    }
  }
}

// A closed receiver may be kept for as long as a garbage collector likes, and a process has only so many descriptors.
TEST_F(PagerPoison, AStoppedPagerHoldsNothingToPageWith) {
  start(Region::allocate(8 * kPage));
  EXPECT_GT(descriptors_for_paging(), 0U);
  ASSERT_TRUE(install(3).intact);
  pager_->poison_missing();
  pager_->stop();
  EXPECT_EQ(descriptors_for_paging(), 0U);
  expect_right(3);
  expect_fails(4);
}

// The kernel does nothing at all where a range reaches over the border of two mappings.
TEST_F(PagerPoison, NothingIsSparedWhereAnAreaIsTwoMappings) {
  start(Region::allocate(32 * kPage));
  ASSERT_EQ(::mprotect(page(11), 5 * kPage, PROT_READ), 0);
  ASSERT_TRUE(install(2).intact);
  pager_->poison_missing();
  pager_->stop();
  ASSERT_EQ(::mprotect(page(11), 5 * kPage, PROT_READ | PROT_WRITE), 0);
  expect_right(2);
  for (const std::uint64_t number : {0U, 10U, 11U, 15U, 16U, 31U}) expect_fails(number);
}

TEST_F(PagerPoison, PagesArriveOverTheBorderOfTwoMappings) {
  start(Region::allocate(32 * kPage));
  ASSERT_EQ(::mprotect(page(11), 5 * kPage, PROT_READ), 0);
  ASSERT_TRUE(install(4, 20).intact);
  for (const std::uint64_t number : {4U, 10U, 11U, 15U, 16U, 23U})
    EXPECT_EQ(FailingAccess::load(page(number)), std::to_integer<int>(content_of(4)));
  EXPECT_EQ(broken_.load(), 0);
}

// As V8 does with a WebAssembly memory that grows, and others with theirs.
TEST_F(PagerPoison, ChangingTheProtectionOfTheWholeAreaBringsNothingBack) {
  start(Region::allocate(16 * kPage));
  ASSERT_TRUE(install(3).intact);
  pager_->poison_missing();
  pager_->stop();
  ASSERT_EQ(::mprotect(page(0), 16 * kPage, PROT_READ), 0);
  ASSERT_EQ(::mprotect(page(0), 16 * kPage, PROT_READ | PROT_WRITE), 0);
  expect_right(3);
  for (const std::uint64_t number : {0U, 2U, 4U, 15U}) expect_fails(number);
}

TEST_F(PagerPoison, WhoWaitsForAPageFailsToo) {
  start(Region::allocate(16 * kPage));
  std::vector<std::thread> waiting;
  std::atomic<int> failed{0};
  for (std::uint64_t number = 4; number < 8; ++number) {
    waiting.emplace_back([&, number] { failed += FailingAccess::load(page(number)) == -SIGBUS ? 1 : 0; });
  }
  // Time to get there; who comes later fails as well.
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  pager_->poison_missing();
  for (std::thread& thread : waiting) thread.join();
  EXPECT_EQ(failed.load(), 4);
  pager_->stop();
  expect_fails(4);
}

TEST_F(PagerPoison, LostPagesFailAndTheMemoryIsOrdinaryAfterwards) {
  start(Region::allocate(32 * kPage));
  ASSERT_TRUE(install(0, 8).intact);
  ASSERT_EQ(pager_->give_up(0, {PageNumber{4}, 8}), (std::vector<PageRun>{{PageNumber{8}, 4}}));
  pager_->poison_lost();
  expect_fails(8);
  // What was not lost still arrives on both sides of it.
  ASSERT_TRUE(install(12, 20).intact);
  EXPECT_EQ(FailingAccess::load(page(12)), std::to_integer<int>(content_of(12)));
  EXPECT_EQ(FailingAccess::load(page(31)), std::to_integer<int>(content_of(12)));
  pager_->finish();
  for (std::uint64_t number = 8; number < 12; ++number) expect_fails(number);
  EXPECT_EQ(FailingAccess::load(page(7)), std::to_integer<int>(content_of(0)));
  EXPECT_EQ(FailingAccess::store(page(30), std::byte{9}), 0);
  EXPECT_EQ(broken_.load(), 0);
}

TEST_F(PagerPoison, SharedMemoryFailsInThisMapping) {
  const int file = ::memfd_create("memferry-test", MFD_CLOEXEC);
  ASSERT_GE(file, 0);
  ASSERT_EQ(::ftruncate(file, static_cast<off_t>(16 * kPage)), 0);
  const Mapping mapping = Mapping::shared(file, 16 * kPage);
  ::close(file);
  start(Region::adopt({{mapping.start(), mapping.size()}}, mapping.size()));
  ASSERT_TRUE(install(5).intact);
  pager_->poison_missing();
  pager_->stop();
  expect_right(5);
  for (const std::uint64_t number : {0U, 4U, 6U, 15U}) expect_fails(number);
}

// As a receiver that is closed does, and one whose pages were lost before: what fails goes on failing in the same way, and
// what is here stays. Counted again each time, so many runs would be more than may have a mapping of their own; where the
// kernel poisons pages none needs one.
TEST_F(PagerPoison, PoisoningAgainChangesNothing) {
  const bool poisons = (Userfaultfd::probe().features & abi::kUffdFeaturePoison) != 0;
  const std::uint64_t pages = poisons ? 20'000 : 8'000;
  for (const bool shared : {true, false}) {
    std::optional<Mapping> mapping;
    if (shared) {
      const int file = ::memfd_create("memferry-test", MFD_CLOEXEC);
      ASSERT_GE(file, 0);
      ASSERT_EQ(::ftruncate(file, static_cast<off_t>(pages * kPage)), 0);
      mapping = Mapping::shared(file, pages * kPage);
      ::close(file);
      start(Region::adopt({{mapping->start(), mapping->size()}}, mapping->size()));
    } else {
      start(Region::allocate(pages * kPage));
    }
    for (std::uint64_t number = 1; number < pages; number += 2) ASSERT_TRUE(install(number).intact);
    std::uint64_t areas = areas_of_this_process();
    for (int times = 0; times < 3; ++times) {
      pager_->poison_missing();
      if (times == 0 && !poisons) areas = areas_of_this_process();
      EXPECT_EQ(areas_of_this_process(), areas);
    }
    pager_->stop();
    for (const std::uint64_t number : {std::uint64_t{0}, pages / 2, pages - 2}) expect_fails(number);
    for (std::uint64_t number = 1; number < pages; number += 2) {
      ASSERT_EQ(FailingAccess::load(page(number)), std::to_integer<int>(content_of(number))) << number;
    }
  }
}

// What has come in full stays, though it was missing when poisoning began.
TEST_F(PagerPoison, WhatIsInstalledMeanwhileIsNotPoisoned) {
  constexpr std::uint64_t kPages = 32'768;
  const int rounds = test::kSanitized ? 2 : 6;
  for (int round = 0; round < rounds; ++round) {
    start(Region::allocate(kPages * kPage));
    std::vector<std::uint64_t> installed;
    std::atomic<bool> go{false};
    std::thread installer([&] {
      while (!go) std::this_thread::yield();
      for (std::uint64_t number = kPages - 8; number > kPages / 2; number -= 8) {
        if (!install(number, 8).intact) break;
        installed.push_back(number);
      }
    });
    std::thread reader([&] {
      while (!go) std::this_thread::yield();
      const int got = FailingAccess::load(page(kPages - 1));
      EXPECT_TRUE(got == -SIGBUS || got == std::to_integer<int>(content_of(kPages - 8))) << got;
    });
    go = true;
    pager_->poison_missing();
    installer.join();
    reader.join();
    for (const std::uint64_t number : installed) {
      for (std::uint64_t at = number; at < number + 8; ++at)
        ASSERT_EQ(FailingAccess::load(page(at)), std::to_integer<int>(content_of(number))) << "page " << at;
    }
    pager_->poison_missing();
    pager_->stop();
    for (const std::uint64_t number : installed)
      ASSERT_EQ(FailingAccess::load(page(number)), std::to_integer<int>(content_of(number))) << number;
    expect_fails(0);
  }
}

// A guest discards a page at the moment at which it has come, before its installer has noted that: it waits for zeros, not
// for ever.
TEST_F(PagerPoison, WhoDiscardsAPageThatHasJustComeReadsZeros) {
  constexpr std::uint64_t kPages = 4096;
  start(Region::allocate(kPages * kPage));
  const auto on_one_cpu = [] {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    ::sched_setaffinity(0, sizeof one, &one);
  };
  std::atomic<bool> done{false};
  std::atomic<bool> installed{false};
  std::atomic<std::uint64_t> at{0};
  std::thread guest([&] {
    on_one_cpu();
    for (std::uint64_t number = 0; number < kPages && FailingAccess::load(page(number)) >= 0; ++number) {
      at = number;
      ::madvise(page(number), kPage, MADV_DONTNEED);
      const int got = FailingAccess::load(page(number));
      if (got < 0) break;
      EXPECT_EQ(got, 0) << "page " << number;
    }
    done = true;
  });
  std::thread installer([&] {
    on_one_cpu();
    // Whom its install wakes runs at once, and it goes on when that waits again.
    const sched_param idle{};
    ::sched_setscheduler(0, SCHED_IDLE, &idle);
    for (std::uint64_t number = 0; number < kPages; ++number) install(number);
    installed = true;
  });
  for (int looks = 0; !installed && looks < 1000; ++looks)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  // Others on that CPU may leave it next to none: the rest without the guest's going first.
  const sched_param normal{};
  if (!installed) ::pthread_setschedparam(installer.native_handle(), SCHED_OTHER, &normal);
  installer.join();
  for (int looks = 0; !done && looks < 2000; ++looks)
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_TRUE(done) << "waits at page " << at;
  pager_->poison_missing();  // whoever waits for ever in vain
  pager_->stop();
  guest.join();
}

// Whatever the order in which a page is installed and given up by two threads: it has its content or it fails.
TEST_F(PagerPoison, InstallingRacesWithPoisoning) {
  constexpr std::uint64_t kPages = 512;
  const int rounds = test::kSanitized ? 3 : 10;
  for (int round = 0; round < rounds; ++round) {
    start(Region::allocate(kPages * kPage));
    std::atomic<bool> go{false};
    std::vector<std::thread> installers;
    for (std::uint64_t half = 0; half < 2; ++half) {
      installers.emplace_back([&, half] {
        while (!go) std::this_thread::yield();
        for (std::uint64_t number = half; number < kPages; number += 2) install(number);
      });
    }
    go = true;
    std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
    pager_->poison_missing();
    for (std::thread& thread : installers) thread.join();
    pager_->stop();
    for (std::uint64_t number = 0; number < kPages; ++number) {
      const int got = FailingAccess::load(page(number));
      EXPECT_TRUE(got == -SIGBUS || got == std::to_integer<int>(content_of(number)))
          << "page " << number << " reads as " << got;
    }
  }
}

// A mapping for each lost page would take all that a process may have: its next allocation would fail, whosever it is.
TEST_F(PagerPoison, ManyScatteredLossesLeaveMappingsForOthers) {
  constexpr std::uint64_t kPages = 80'000;
  start(Region::allocate(kPages * kPage));
  const std::uint64_t before = areas_of_this_process();
  for (std::uint64_t number = 0; number < kPages; number += 2) {
    map_->received.set(PageNumber{number + 1});  // its content does not matter here
    map_->zero.set(PageNumber{number + 1});
  }
  pager_->poison_missing();
  EXPECT_LT(areas_of_this_process(), before + 20'000);
  pager_->stop();
  for (std::uint64_t number = 0; number < kPages; number += 2) {
    ASSERT_EQ(FailingAccess::load(page(number)), -SIGBUS) << "page " << number;
  }
  EXPECT_NO_THROW((void)Mapping::anonymous(kPage));
}

TEST(FailingMemoryTest, FailsWhoeverTouchesItAndTakesOneMapping) {
  const FailingAccess access;
  const Mapping memory = Mapping::anonymous(64 * kPage);
  std::fill(memory.bytes().begin(), memory.bytes().end(), std::byte{3});
  const FailingMemory failing;
  const std::uint64_t before = areas_of_this_process();
  // In pieces and in any order, and some of it twice.
  for (const std::uint64_t number : {12U, 10U, 11U, 13U, 11U}) {
    ASSERT_TRUE(failing.put_over(memory.start().plus(number * kPage), kPage));
  }
  EXPECT_LE(areas_of_this_process(), before + 2);
  for (std::uint64_t number = 10; number < 14; ++number) {
    std::byte* const page = memory.data() + number * kPage;
    EXPECT_EQ(FailingAccess::load(page), -SIGBUS);
    EXPECT_EQ(FailingAccess::store(page, std::byte{1}), -SIGBUS);
    EXPECT_EQ(FailingAccess::read_by_the_kernel(page), -EFAULT);
  }
  EXPECT_EQ(FailingAccess::load(memory.data() + 9 * kPage), 3);
  EXPECT_EQ(FailingAccess::load(memory.data() + 14 * kPage), 3);
  EXPECT_EQ(::madvise(memory.data(), memory.size(), MADV_DONTNEED), 0);
  EXPECT_EQ(FailingAccess::load(memory.data() + 11 * kPage), -SIGBUS);
}

}  // namespace
}  // namespace memferry
