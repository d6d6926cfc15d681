// userfaultfd as the pager needs it: every outcome of installing pages, short counts, events, poison.
#include "os/userfaultfd.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csetjmp>
#include <csignal>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "lonely_mapping.h"
#include "os/mapping.h"
#include "os/sys_error.h"

namespace memferry {
namespace {

const std::uint64_t kPage = system_page_size();

class UserfaultfdTest : public testing::Test {
 protected:
  void SetUp() override {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.user_faults) GTEST_SKIP() << "no userfaultfd here: " << std::strerror(offer.error);
    features_ = offer.features;
  }
  // Skips by name when the kernel lacks a feature.
  [[nodiscard]] bool lacks(std::uint64_t feature) const { return (features_ & feature) == 0; }
  static std::vector<std::byte> filled(std::uint64_t pages, int value) {
    return std::vector<std::byte>(pages * kPage, static_cast<std::byte>(value));
  }
  static std::byte read(Address address) {
    const std::byte value = *static_cast<volatile std::byte*>(address.pointer());
    return value;
  }
  // Waits for an event, at most ten seconds.
  static bool next_event(Userfaultfd& uffd, uffd_msg& message) {
    pollfd waiting{uffd.fd(), POLLIN, 0};
    if (::poll(&waiting, 1, 10000) != 1) return false;
    return uffd.read_events({&message, 1}) == 1;
  }

  std::uint64_t features_ = 0;
};

TEST_F(UserfaultfdTest, ServesAMissingPage) {
  auto uffd = Userfaultfd::open(0);
  const Mapping memory = Mapping::anonymous(4 * kPage);
  const std::uint64_t ioctls = uffd.register_missing(memory.start(), memory.size());
  EXPECT_NE(ioctls & (1ULL << _UFFDIO_COPY), 0U);
  uffd_msg message{};
  EXPECT_EQ(uffd.read_events({&message, 1}), 0U);
  std::atomic<int> value{-1};
  std::thread toucher([&] { value = std::to_integer<int>(read(memory.start().plus(2 * kPage + 8))); });
  const bool got = next_event(uffd, message);
  const auto content = filled(1, 7);
  const auto result = uffd.copy(memory.start().plus(2 * kPage), content.data(), kPage, true);
  toucher.join();
  ASSERT_TRUE(got);
  EXPECT_EQ(message.event, UFFD_EVENT_PAGEFAULT);
  EXPECT_EQ(message.arg.pagefault.address & ~(kPage - 1), memory.start().plus(2 * kPage).value);
  EXPECT_EQ(result.outcome, PageOutcome::kOk);
  EXPECT_EQ(result.bytes_done, kPage);
  EXPECT_EQ(value.load(), 7);
}

TEST_F(UserfaultfdTest, AWaiterIsWokenSeparately) {
  auto uffd = Userfaultfd::open(0);
  const Mapping memory = Mapping::anonymous(kPage);
  uffd.register_missing(memory.start(), memory.size());
  std::thread toucher([&] { EXPECT_EQ(read(memory.start()), std::byte{9}); });
  uffd_msg message{};
  EXPECT_TRUE(next_event(uffd, message));
  const auto content = filled(1, 9);
  EXPECT_EQ(uffd.copy(memory.start(), content.data(), kPage, false).outcome, PageOutcome::kOk);
  uffd.wake(memory.start(), kPage);
  toucher.join();
}

TEST_F(UserfaultfdTest, NeverOverwritesAndSaysHowFarItCame) {
  auto uffd = Userfaultfd::open(0);
  const Mapping memory = Mapping::anonymous(8 * kPage);
  uffd.register_missing(memory.start(), memory.size());
  const auto first = filled(8, 1);
  ASSERT_EQ(uffd.copy(memory.start().plus(3 * kPage), first.data(), kPage, true).outcome, PageOutcome::kOk);
  const auto second = filled(8, 2);
  const auto result = uffd.copy(memory.start(), second.data(), 8 * kPage, true);
  EXPECT_EQ(result.outcome, PageOutcome::kExists);
  EXPECT_EQ(result.bytes_done, 3 * kPage);
  EXPECT_EQ(read(memory.start().plus(2 * kPage)), std::byte{2});
  EXPECT_EQ(read(memory.start().plus(3 * kPage)), std::byte{1});
  const auto rest = uffd.zeropage(memory.start().plus(4 * kPage), 4 * kPage, true);
  EXPECT_EQ(rest.outcome, PageOutcome::kOk);
  EXPECT_EQ(rest.bytes_done, 4 * kPage);
  EXPECT_EQ(read(memory.start().plus(7 * kPage)), std::byte{0});
  EXPECT_EQ(uffd.zeropage(memory.start(), kPage, true).outcome, PageOutcome::kExists);
}

TEST_F(UserfaultfdTest, MemoryThatWasUnmappedIsGone) {
  auto uffd = Userfaultfd::open(0);
  const LonelyMapping memory(8 * kPage);
  uffd.register_missing(memory.start(), memory.size());
  ASSERT_EQ(::munmap(memory.start().plus(2 * kPage).pointer(), 6 * kPage), 0);
  const auto content = filled(4, 1);
  const auto result = uffd.copy(memory.start(), content.data(), 4 * kPage, true);
  EXPECT_EQ(result.outcome, PageOutcome::kGone);
  EXPECT_LE(result.bytes_done, 2 * kPage);
  const Address start = memory.start();
  ASSERT_EQ(::munmap(memory.data(), memory.size()), 0);
  EXPECT_EQ(uffd.copy(start, content.data(), kPage, true).outcome, PageOutcome::kGone);
  EXPECT_EQ(uffd.zeropage(start, kPage, true).outcome, PageOutcome::kGone);
  EXPECT_FALSE(uffd.unregister(start, 8 * kPage));
}

TEST_F(UserfaultfdTest, AnUnalignedRangeIsABug) {
  auto uffd = Userfaultfd::open(0);
  const Mapping memory = Mapping::anonymous(kPage);
  uffd.register_missing(memory.start(), memory.size());
  const auto content = filled(1, 1);
  EXPECT_THROW((void)uffd.copy(memory.start().plus(1), content.data(), kPage, true), SystemError);
  EXPECT_THROW((void)uffd.register_missing(memory.start().plus(1), kPage), SystemError);
}

// While an event (here: a discard) waits to be read, the layout counts as changing: kAgain until it is
// drained.
TEST_F(UserfaultfdTest, UnreadEventsMakeInstallingWait) {
  if (lacks(UFFD_FEATURE_EVENT_REMOVE))
    GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_EVENT_REMOVE (Linux 4.11)";
  auto uffd = Userfaultfd::open(UFFD_FEATURE_EVENT_REMOVE);
  const Mapping memory = Mapping::anonymous(4 * kPage);
  uffd.register_missing(memory.start(), memory.size());
  const auto content = filled(4, 1);
  ASSERT_EQ(uffd.copy(memory.start(), content.data(), kPage, true).outcome, PageOutcome::kOk);
  std::thread discarder([&] { EXPECT_EQ(::madvise(memory.data(), kPage, MADV_DONTNEED), 0); });
  pollfd waiting{uffd.fd(), POLLIN, 0};
  const int ready = ::poll(&waiting, 1, 10000);
  const auto result = uffd.copy(memory.start().plus(kPage), content.data(), kPage, true);
  uffd_msg message{};
  const std::size_t events = uffd.read_events({&message, 1});
  discarder.join();
  ASSERT_EQ(ready, 1);
  EXPECT_EQ(result.outcome, PageOutcome::kAgain);
  EXPECT_EQ(result.bytes_done, 0U);
  ASSERT_EQ(events, 1U);
  EXPECT_EQ(message.event, UFFD_EVENT_REMOVE);
  EXPECT_EQ(uffd.copy(memory.start().plus(kPage), content.data(), kPage, true).outcome, PageOutcome::kOk);
}

sigjmp_buf g_bus_return;
void on_sigbus(int) { siglongjmp(g_bus_return, 1); }

// Reads a byte; true when that raised SIGBUS.
bool raises_sigbus(Address address) {
  struct sigaction action {};
  struct sigaction former {};
  action.sa_handler = on_sigbus;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGBUS, &action, &former);
  volatile bool raised = true;  // volatile: it must survive the jump
  if (sigsetjmp(g_bus_return, 1) == 0) {
    [[maybe_unused]] const std::byte value = *static_cast<volatile std::byte*>(address.pointer());
    raised = false;
  }
  ::sigaction(SIGBUS, &former, nullptr);
  return raised;
}

TEST_F(UserfaultfdTest, APoisonedPageRaisesSigbusAlsoAfterClosing) {
  if (lacks(abi::kUffdFeaturePoison)) GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_POISON (Linux 6.6)";
  auto uffd = Userfaultfd::open(abi::kUffdFeaturePoison);
  const Mapping memory = Mapping::anonymous(6 * kPage);
  uffd.register_missing(memory.start(), memory.size());
  const auto content = filled(1, 5);
  ASSERT_EQ(uffd.copy(memory.start().plus(4 * kPage), content.data(), kPage, true).outcome, PageOutcome::kOk);
  const auto result = uffd.poison(memory.start(), 6 * kPage, true);
  EXPECT_EQ(result.outcome, PageOutcome::kExists);
  EXPECT_EQ(result.bytes_done, 4 * kPage);
  EXPECT_EQ(uffd.poison(memory.start().plus(5 * kPage), kPage, true).outcome, PageOutcome::kOk);
  EXPECT_TRUE(raises_sigbus(memory.start()));
  uffd.close();
  EXPECT_TRUE(raises_sigbus(memory.start().plus(3 * kPage)));
  EXPECT_FALSE(raises_sigbus(memory.start().plus(4 * kPage)));
  EXPECT_TRUE(raises_sigbus(memory.start().plus(5 * kPage)));
}

TEST_F(UserfaultfdTest, MovesPages) {
  if (lacks(abi::kUffdFeatureMove)) GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_MOVE (Linux 6.8)";
  auto uffd = Userfaultfd::open(abi::kUffdFeatureMove);
  const Mapping memory = Mapping::anonymous(2 * kPage);
  const Mapping pool = Mapping::anonymous(2 * kPage);
  ASSERT_EQ(::madvise(pool.data(), pool.size(), MADV_NOHUGEPAGE), 0);
  std::memset(pool.data(), 6, pool.size());
  uffd.register_missing(memory.start(), memory.size());
  const auto result = uffd.move(memory.start(), pool.start(), 2 * kPage, true);
  ASSERT_EQ(result.outcome, PageOutcome::kOk);
  EXPECT_EQ(result.bytes_done, 2 * kPage);
  EXPECT_EQ(read(memory.start().plus(kPage)), std::byte{6});
  EXPECT_EQ(read(pool.start()), std::byte{0});
}

TEST_F(UserfaultfdTest, WriteProtectionStopsAWriterUntilItIsLifted) {
  if (lacks(UFFD_FEATURE_PAGEFAULT_FLAG_WP))
    GTEST_SKIP() << "this kernel lacks UFFD_FEATURE_PAGEFAULT_FLAG_WP (5.7)";
  auto uffd = Userfaultfd::open(UFFD_FEATURE_PAGEFAULT_FLAG_WP);
  const Mapping memory = Mapping::anonymous(2 * kPage);
  std::memset(memory.data(), 1, memory.size());
  uffd.register_wp(memory.start(), memory.size());
  ASSERT_EQ(uffd.write_protect(memory.start(), 2 * kPage, true).outcome, PageOutcome::kOk);
  std::atomic<bool> written{false};
  std::thread writer([&] {
    *static_cast<volatile std::byte*>(memory.data()) = std::byte{2};
    written = true;
  });
  uffd_msg message{};
  const bool got = next_event(uffd, message);
  EXPECT_FALSE(written.load());
  const auto result = uffd.write_protect(memory.start(), kPage, false);
  writer.join();
  ASSERT_TRUE(got);
  EXPECT_EQ(result.bytes_done, kPage);
  EXPECT_NE(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP, 0U);
}

TEST_F(UserfaultfdTest, TwoDescriptorsCannotShareARange) {
  auto first = Userfaultfd::open(0);
  auto second = Userfaultfd::open(0);
  const Mapping memory = Mapping::anonymous(2 * kPage);
  first.register_missing(memory.start(), memory.size());
  try {
    second.register_missing(memory.start(), memory.size());
    FAIL() << "no error";
  } catch (const SystemError& error) {
    EXPECT_EQ(error.error(), EBUSY);
  }
  EXPECT_TRUE(first.unregister(memory.start(), memory.size()));
  second.register_missing(memory.start(), memory.size());
}

TEST_F(UserfaultfdTest, FeaturesThatNoKernelHasAreRefused) {
  try {
    (void)Userfaultfd::open(1ULL << 60);
    FAIL() << "no error";
  } catch (const SystemError& error) {
    EXPECT_EQ(error.error(), EINVAL);
  }
}

bool runnable(pid_t tid) {
  std::ifstream file("/proc/self/task/" + std::to_string(tid) + "/stat");
  std::string stat;
  std::getline(file, stat);
  const std::size_t name = stat.rfind(") ");
  return name != std::string::npos && stat[name + 2] == 'R';
}

// While the descriptor stays open, as an owner's does that somebody else pages. Without a wake afterwards one in twenty
// of these sleeps for good on Linux 6.18.
TEST_F(UserfaultfdTest, AFaultThatBeginsAsItsMemoryIsLetGoOfIsWoken) {
  auto uffd = Userfaultfd::open(0);
  const Mapping memory = Mapping::anonymous(64 * kPage);
  std::atomic<int> round{0};
  std::atomic<int> done{0};
  std::atomic<pid_t> tid{0};
  constexpr int kRounds = 1000;
  std::thread toucher([&] {
    tid = static_cast<pid_t>(::syscall(SYS_gettid));
    for (int mine = 1; mine <= kRounds; ++mine) {
      while (round.load() < mine) {
      }
      (void)read(memory.start().plus(static_cast<std::uint64_t>(mine % 64) * kPage));
      done = mine;
    }
  });
  int slept = 0;
  for (int mine = 1; mine <= kRounds; ++mine) {
    ASSERT_EQ(::madvise(memory.data(), memory.size(), MADV_DONTNEED), 0);
    uffd.register_missing(memory.start(), memory.size());
    round = mine;
    for (std::atomic<int> spin{0}; spin < mine % 400;) ++spin;
    EXPECT_TRUE(uffd.unregister(memory.start(), memory.size()));
    for (auto since = std::chrono::steady_clock::now(); done.load() < mine;) {
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() - since < std::chrono::seconds(5)) continue;
      since = std::chrono::steady_clock::now();
      if (runnable(tid)) continue;  // it gets no CPU
      ++slept;
      uffd.wake(memory.start(), memory.size());
    }
    if (slept > 0) {
      round = kRounds;  // the rest of them faults in nothing
      break;
    }
  }
  toucher.join();
  EXPECT_EQ(slept, 0) << "a fault that nobody would have woken";
}

}  // namespace
}  // namespace memferry
