// The small owners of the os layer: descriptors, mappings, threads; and what /proc says about memory.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <fstream>
#include <functional>
#include <semaphore>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "lonely_mapping.h"
#include "os/mapping.h"
#include "os/pagemap.h"
#include "os/process_maps.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"
#include "os/worker_thread.h"
#include "page_of_zeros.h"

namespace memferry {
namespace {

const std::uint64_t kPage = system_page_size();

bool is_open(int fd) { return ::fcntl(fd, F_GETFD) >= 0; }

TEST(UniqueFdTest, ClosesOnceAndMoves) {
  int pipe_fds[2];
  ASSERT_EQ(::pipe2(pipe_fds, O_CLOEXEC), 0);
  UniqueFd reader(pipe_fds[0]);
  {
    UniqueFd writer(pipe_fds[1]);
    const UniqueFd moved = std::move(writer);
    EXPECT_FALSE(writer.valid());
    EXPECT_TRUE(is_open(pipe_fds[1]));
  }
  EXPECT_FALSE(is_open(pipe_fds[1]));
  const int released = reader.release();
  EXPECT_EQ(released, pipe_fds[0]);
  EXPECT_TRUE(is_open(released));
  reader.reset(released);
  reader.reset();
  EXPECT_FALSE(is_open(released));
}

TEST(MappingTest, UnmapsWhenItsOwnerGoes) {
  Address start;
  {
    Mapping mapping = Mapping::anonymous(1024 * kPage);
    const Mapping moved = std::move(mapping);
    EXPECT_FALSE(mapping);
    start = moved.start();
    EXPECT_EQ(mapped_extent(start, 1024 * kPage), 1024 * kPage);
    moved.bytes()[1024 * kPage - 1] = std::byte{1};
  }
  EXPECT_NE(::msync(start.pointer(), 1024 * kPage, MS_ASYNC), 0);
  EXPECT_THROW((void)Mapping::anonymous(~0ULL << 13), SystemError);
}

TEST(WorkerThreadTest, WakesAndStops) {
  std::atomic<int> woken{0};
  std::counting_semaphore<> done(0);
  WorkerThread thread("a-name-longer-than-15", [&](WorkerThread& self) {
    char name[16] = {};
    ASSERT_EQ(pthread_getname_np(pthread_self(), name, sizeof name), 0);
    EXPECT_STREQ(name, "a-name-longer-t");
    while (!self.stopping()) {
      if (self.wait(-1) && !self.stopping()) {
        ++woken;
        done.release();
      }
    }
  });
  for (int i = 1; i <= 3; ++i) {
    thread.wake();
    done.acquire();
    EXPECT_EQ(woken.load(), i);
  }
  thread.stop();
  EXPECT_FALSE(thread.started());
  thread.stop();
}

// A wake that comes before the body waits must not be lost.
TEST(WorkerThreadTest, AWakeIsRemembered) {
  std::binary_semaphore wake_sent(0);
  std::atomic<bool> saw_wake{false};
  WorkerThread thread("remembers", [&](WorkerThread& self) {
    wake_sent.acquire();
    saw_wake = self.wait(10000);
  });
  thread.wake();
  wake_sent.release();
  while (!saw_wake) std::this_thread::yield();
}

TEST(WorkerThreadTest, BlocksTheHostsSignals) {
  sigset_t seen;
  sigemptyset(&seen);
  {
    WorkerThread thread("signals", [&](WorkerThread&) { pthread_sigmask(SIG_SETMASK, nullptr, &seen); });
  }
  EXPECT_EQ(sigismember(&seen, SIGINT), 1);
  EXPECT_EQ(sigismember(&seen, SIGTERM), 1);
  EXPECT_EQ(sigismember(&seen, SIGSEGV), 0);
  EXPECT_EQ(sigismember(&seen, SIGBUS), 0);
  sigset_t own;
  pthread_sigmask(SIG_SETMASK, nullptr, &own);
  EXPECT_EQ(sigismember(&own, SIGINT), 0);
}

TEST(WorkerThreadTest, SchedulingConcernsTheCallingThreadOnly) {
  const int before = ::getpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)));
  WorkerThread thread("nice", [&](WorkerThread&) {
    ASSERT_TRUE(set_this_thread_nice(before + 3));
    EXPECT_EQ(::getpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid))), before + 3);
    ASSERT_TRUE(set_this_thread_idle());
    EXPECT_EQ(::sched_getscheduler(0), SCHED_IDLE);
  });
  thread.stop();
  EXPECT_EQ(::getpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid))), before);
  EXPECT_NE(::sched_getscheduler(0), SCHED_IDLE);
}

// The twin of what is measured: how long the calling thread has waited for a CPU so far.
double waited_ns() {
  std::uint64_t run_ns = 0;
  std::uint64_t waited_ns = 0;
  std::ifstream("/proc/thread-self/schedstat") >> run_ns >> waited_ns;
  return static_cast<double>(waited_ns);
}

struct Share {
  double told = 0;
  double least = 0;  // by the twin, which is read before and after
  double most = 0;
};
Share share_while(const std::function<void(RunDelay::Clock::time_point)>& pass_time) {
  RunDelay delay;
  const auto began = RunDelay::Clock::now();
  const double before = waited_ns();
  EXPECT_EQ(delay.share(began), 0);
  const double after_first = waited_ns();
  pass_time(began + 2 * RunDelay::kWindow);
  const auto ended = RunDelay::Clock::now();
  const double before_last = waited_ns();
  Share share{.told = delay.share(ended)};
  const double after = waited_ns();
  EXPECT_EQ(delay.share(ended + RunDelay::kWindow / 2), share.told) << "of the window that ended";
  const double window_ns = std::chrono::duration<double, std::nano>(ended - began).count();
  share.least = std::min(1.0, (before_last - after_first) / window_ns);
  share.most = std::min(1.0, (after - before) / window_ns);
  return share;
}

TEST(WorkerThreadTest, ARunDelayIsTheTimeThatAThreadWaitsForACpu) {
  std::uint64_t run_ns = 0;
  std::ifstream("/proc/thread-self/schedstat") >> run_ns;
  if (run_ns == 0) GTEST_SKIP() << "this kernel does not tell";
  const auto in_a_corner = [] {
    cpu_set_t one{};
    CPU_SET(::sched_getcpu(), &one);
    ASSERT_EQ(::sched_setaffinity(0, sizeof one, &one), 0);
  };
  const auto burn_until = [](RunDelay::Clock::time_point end) {
    while (RunDelay::Clock::now() < end) continue;
  };
  Share sleeping;
  WorkerThread asleep("asleep", [&](WorkerThread&) {
    sleeping = share_while([](auto end) { std::this_thread::sleep_until(end); });
  });
  asleep.stop();
  // Four on one CPU: each waits for three quarters of its time.
  Share crowded;
  WorkerThread crowd("crowd", [&](WorkerThread&) {
    in_a_corner();
    std::vector<std::jthread> others;
    const auto end = RunDelay::Clock::now() + 4 * RunDelay::kWindow;
    for (int i = 0; i < 3; ++i) others.emplace_back([&] { burn_until(end); });
    crowded = share_while(burn_until);
  });
  crowd.stop();
  for (const Share& each : {sleeping, crowded}) {
    EXPECT_GE(each.told, each.least - 1e-9);
    EXPECT_LE(each.told, each.most + 1e-9);
  }
  // By far more, unless others on this machine make both of them wait.
  if (crowded.least > sleeping.most + 0.2) {
    EXPECT_GT(crowded.told, sleeping.told + 0.2);
  }
}

TEST(WorkerThreadTest, AShorterSliceChangesNothingElse) {
  if (::sched_getscheduler(0) != SCHED_OTHER) GTEST_SKIP() << "slices are of the fair class";
  WorkerThread thread("slice", [&](WorkerThread&) {
    const int nice = ::getpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)));
    ASSERT_TRUE(set_this_thread_nice(nice + 2));
    ASSERT_TRUE(set_this_thread_slice(std::chrono::milliseconds(2)));
    EXPECT_EQ(::sched_getscheduler(0), SCHED_OTHER);
    EXPECT_EQ(::getpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid))), nice + 2);
    ASSERT_TRUE(set_this_thread_idle());
    EXPECT_FALSE(set_this_thread_slice(std::chrono::milliseconds(2))) << "the idle class has none";
    EXPECT_EQ(::sched_getscheduler(0), SCHED_IDLE);
  });
  thread.stop();
}

TEST(ProcessMapsTest, MeasuresHowFarMemoryReaches) {
  const LonelyMapping mapping(16 * kPage);
  ASSERT_EQ(::mprotect(mapping.start().plus(10 * kPage).pointer(), 6 * kPage, PROT_NONE), 0);
  EXPECT_EQ(writable_extent(mapping.start(), 16 * kPage), 10 * kPage);
  EXPECT_EQ(writable_extent(mapping.start().plus(3 * kPage), 4 * kPage), 4 * kPage);
  EXPECT_EQ(writable_extent(mapping.start().plus(12 * kPage), 4 * kPage), 0U);
  EXPECT_EQ(mapped_extent(mapping.start(), 16 * kPage), 16 * kPage);
  // A change of protection in the middle splits the kernel's areas; the extent spans them.
  ASSERT_EQ(::madvise(mapping.start().plus(2 * kPage).pointer(), kPage, MADV_DONTDUMP), 0);
  EXPECT_EQ(writable_extent(mapping.start(), 16 * kPage), 10 * kPage);
  ASSERT_EQ(::munmap(mapping.start().plus(5 * kPage).pointer(), kPage), 0);
  EXPECT_EQ(writable_extent(mapping.start(), 16 * kPage), 5 * kPage);
  EXPECT_EQ(mapped_extent(mapping.start().plus(5 * kPage), kPage), 0U);
}

TEST(ProcessMapsTest, SaysTheSameFromAnAddressOnAsOfAll) {
  const UniqueFd memfd(static_cast<int>(::syscall(SYS_memfd_create, "test", 1U)));
  ASSERT_TRUE(memfd.valid());
  ASSERT_EQ(::ftruncate(memfd.get(), static_cast<off_t>(8 * kPage)), 0);
  const Mapping shared = Mapping::shared(memfd.get(), 4 * kPage, 3 * kPage, PROT_READ);
  const Mapping reserved = Mapping::anonymous(6 * kPage, PROT_NONE);
  ASSERT_EQ(::mprotect(reserved.data() + kPage, kPage, PROT_READ | PROT_WRITE), 0);
  const auto told = [](const MappedArea& area) {
    return std::tuple(area.start.value, area.end.value, area.readable, area.writable, area.shared, area.file,
                      area.offset, area.inode, area.device);
  };
  for (const Address from : {shared.start(), shared.start().plus(kPage + 1), reserved.start().plus(kPage)}) {
    using Told = decltype(told(MappedArea{}));
    std::vector<Told> one_by_one;
    for_each_mapped_area_from(OwnerAddress{from.value}, [&](const MappedArea& area) {
      one_by_one.push_back(told(area));
      return one_by_one.size() < 3;
    });
    std::vector<Told> all;
    for_each_mapped_area([&](const MappedArea& area) {
      if (area.end.value > from.value) all.push_back(told(area));
      return all.size() < 3;
    });
    EXPECT_EQ(one_by_one, all);
    ASSERT_FALSE(all.empty());
  }
}

TEST(ProcessMapsTest, EndsBehindTheLastArea) {
  int visits = 0;
  for_each_mapped_area_from(OwnerAddress{~std::uint64_t{0} - kPage}, [&](const MappedArea&) {
    ++visits;
    return true;
  });
  EXPECT_LE(visits, 1);  // where the kernel's own page is told of at the very end
}

TEST(ProcessMapsTest, TellsPrivateAnonymousMemory) {
  const Mapping anonymous = Mapping::anonymous(2 * kPage);
  EXPECT_TRUE(is_private_anonymous(anonymous.start(), 2 * kPage));
  const UniqueFd memfd(static_cast<int>(::syscall(SYS_memfd_create, "test", 1U)));
  ASSERT_TRUE(memfd.valid());
  ASSERT_EQ(::ftruncate(memfd.get(), static_cast<off_t>(2 * kPage)), 0);
  const Mapping shared = Mapping::shared(memfd.get(), 2 * kPage);
  EXPECT_FALSE(is_private_anonymous(shared.start(), 2 * kPage));
}

TEST(ProcessMapsTest, ReadsEveryArea) {
  bool heap_or_stack = false;
  std::uint64_t last_end = 0;
  for_each_mapped_area([&](const MappedArea& area) {
    EXPECT_LE(last_end, area.start.value);
    EXPECT_LT(area.start, area.end);
    last_end = area.end.value;
    heap_or_stack = heap_or_stack || area.name == "[stack]";
    return true;
  });
  EXPECT_TRUE(heap_or_stack);
}

class PagemapTest : public testing::Test {
 protected:
  using Pages = std::vector<std::pair<std::uint64_t, std::uint64_t>>;  // [first, end)
  std::function<void(AddressRange)> collect_into(Pages& pages, const Mapping& memory) {
    return [&pages, start = memory.start().value](AddressRange range) {
      pages.emplace_back((range.start.value - start) / kPage, (range.end.value - start) / kPage);
    };
  }
  static void touch(const Mapping& memory, std::uint64_t page) {
    static_cast<volatile std::byte*>(memory.data())[page * kPage] = std::byte{1};
  }
};

TEST_F(PagemapTest, FindsPopulatedPagesInBothWays) {
  const Mapping memory = Mapping::anonymous(20000 * kPage);
  ASSERT_EQ(::madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE), 0);
  Pages expected;
  // Single pages, a run, and the last page; far more than one buffer of the reading way.
  for (const std::uint64_t page : {0U, 7U, 8U, 9U, 8191U, 8192U, 15000U, 19999U}) {
    touch(memory, page);
    if (!expected.empty() && expected.back().second == page) {
      ++expected.back().second;
    } else {
      expected.emplace_back(page, page + 1);
    }
  }
  Pagemap pagemap;
  Pages read;
  pagemap.populated_by_reading(memory.start(), memory.size(), collect_into(read, memory));
  EXPECT_EQ(read, expected);
  Pages found;
  pagemap.populated(memory.start(), memory.size(), collect_into(found, memory));
  EXPECT_EQ(found, expected);
}

TEST_F(PagemapTest, AScanGoesOnWhenItsBufferIsFull) {
  Pagemap pagemap;
  if (!pagemap.can_scan()) GTEST_SKIP() << "this kernel lacks PAGEMAP_SCAN (Linux 6.7)";
  constexpr std::uint64_t kPages = 2 * 70000;  // every other page: more runs than the buffer's 65536
  const Mapping memory = Mapping::anonymous(kPages * kPage);
  ASSERT_EQ(::madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE), 0);
  for (std::uint64_t page = 0; page < kPages; page += 2) touch(memory, page);
  std::uint64_t runs = 0;
  std::uint64_t wrong = 0;
  pagemap.populated(memory.start(), memory.size(), [&](AddressRange range) {
    const Address expected = memory.start().plus(runs * 2 * kPage);
    if (range != AddressRange{expected, expected.plus(kPage)}) ++wrong;
    ++runs;
  });
  EXPECT_EQ(runs, kPages / 2);
  EXPECT_EQ(wrong, 0U);
}

TEST_F(PagemapTest, ThePageOfZerosIsNotPopulated) {
  Pagemap pagemap;
  if (!pagemap.can_scan()) GTEST_SKIP() << "this kernel lacks PAGEMAP_SCAN (Linux 6.7)";
  if (!reads_share_the_page_of_zeros()) {
    GTEST_SKIP() << "this kernel gives a read of untouched memory a page of its own";
  }
  const Mapping memory = Mapping::anonymous(8 * kPage);
  ASSERT_EQ(::madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE), 0);
  const std::byte value = static_cast<volatile std::byte*>(memory.data())[3 * kPage];
  EXPECT_EQ(value, std::byte{0});
  Pages found;
  pagemap.populated(memory.start(), memory.size(), collect_into(found, memory));
  EXPECT_TRUE(found.empty());
}

TEST_F(PagemapTest, ScanningUnregisteredMemoryForWritesIsRefused) {
  Pagemap pagemap;
  if (!pagemap.can_scan()) GTEST_SKIP() << "this kernel lacks PAGEMAP_SCAN (Linux 6.7)";
  const Mapping memory = Mapping::anonymous(8 * kPage);
  Pagemap::Query query;
  query.flags = abi::kScanWpMatching | abi::kScanCheckWpAsync;
  query.category_mask = query.return_mask = abi::kPageIsWritten;
  try {
    pagemap.scan(memory.start(), memory.size(), query, [](const abi::PageRegion&) {});
    FAIL() << "no error";
  } catch (const SystemError& error) {
    EXPECT_EQ(error.error(), EPERM);
  }
}

}  // namespace
}  // namespace memferry
