// Stopping threads for a moment. Soft-dirty tracking rests on it, on kernels that have soft-dirty; it works on all.
#include "os/thread_freezer.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <ctime>
#include <thread>
#include <vector>

#include "os/mapping.h"
#include "os/process.h"
#include "os/sys_error.h"
#include "os/userfaultfd.h"
#include "sanitized.h"

namespace memferry {
namespace {

using namespace std::chrono_literals;

std::string refusal() {
  try {
    ThreadFreezer::run_alone([](void*) {}, nullptr);
  } catch (const SystemError& error) {
    return error.what();
  }
  return {};
}

class ThreadFreezerTest : public testing::Test {
 protected:
  // A thread that gets no CPU is not stopped in time: nothing has run then, and it is asked for again.
  template <typename Stop>
  static bool stop_in_the_end(Stop stop) {
    const auto until = std::chrono::steady_clock::now() + 20s;
    for (;;) {
      try {
        return stop();
      } catch (const SystemError& error) {
        if (error.error() != ETIMEDOUT || std::chrono::steady_clock::now() > until) throw;
      }
    }
  }
  void SetUp() override {
    if (const std::string why = refusal(); !why.empty()) GTEST_SKIP() << "ptrace does not work here: " << why;
  }
};

constexpr std::size_t kCounters = 6;
struct Counters {
  std::array<std::atomic<std::uint64_t>, kCounters> count{};
  std::atomic<bool> stop{false};
};

// What runs while all stand still: it looks twice, with time between.
struct Look {
  Counters* counters;
  std::uint64_t moved = 0;
  int runs = 0;
  long nap_ns = 2'000'000;
};
MEMFERRY_TEST_BARE void look(void* argument) {
  Look& look = *static_cast<Look*>(argument);
  const auto* const counts = reinterpret_cast<const std::uint64_t*>(look.counters);
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free && offsetof(Counters, count) == 0);
  ++look.runs;
  std::uint64_t before[kCounters];
  for (std::size_t i = 0; i < kCounters; ++i) before[i] = __atomic_load_n(counts + i, __ATOMIC_SEQ_CST);
  const timespec nap{0, look.nap_ns};
  ::syscall(SYS_nanosleep, &nap, nullptr);
  for (std::size_t i = 0; i < kCounters; ++i)
    look.moved += __atomic_load_n(counts + i, __ATOMIC_SEQ_CST) - before[i];
}

// In user mode, in system calls that return at once, asleep, creating threads: nobody moves.
TEST_F(ThreadFreezerTest, NobodyElseRunsMeanwhile) {
  Counters counters;
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kCounters; ++i) {
    threads.emplace_back([&, i] {
      while (!counters.stop.load(std::memory_order_relaxed)) {
        counters.count[i].fetch_add(1);
        if (i == 1) (void)::syscall(SYS_getppid);
        if (i == 2) std::this_thread::sleep_for(50us);
        if (i == 3) std::thread([&] { counters.count[i].fetch_add(1); }).join();
        if (i == 4) {
          std::array<pollfd, 1> nothing{{{-1, 0, 0}}};
          (void)::poll(nothing.data(), 1, 1);
        }
      }
    });
  }
  for (int turn = 0; turn < 60; ++turn) {
    Look one{&counters};
    ASSERT_TRUE(stop_in_the_end([&] { return ThreadFreezer::run_alone(&look, &one); }));
    ASSERT_EQ(one.runs, 1);
    ASSERT_EQ(one.moved, 0U) << "turn " << turn;
  }
  // And all go on.
  for (auto& count : counters.count) {
    const std::uint64_t before = count.load();
    for (int i = 0; i < 20'000 && count.load() == before; ++i) std::this_thread::sleep_for(1ms);
    EXPECT_NE(count.load(), before);
  }
  counters.stop = true;
  for (std::thread& thread : threads) thread.join();
}

std::atomic<int> signals_seen{0};

// One that is about to be delivered when its thread is stopped arrives all the same, once.
TEST_F(ThreadFreezerTest, SignalsAreNeitherLostNorDoubled) {
  struct sigaction action {};
  struct sigaction former {};
  action.sa_handler = [](int) { signals_seen.fetch_add(1); };
  ASSERT_EQ(::sigaction(SIGUSR2, &action, &former), 0);
  signals_seen = 0;
  std::atomic<bool> stop{false};
  std::atomic<bool> all_seen{false};  // a signal to a thread that ends is dropped with it
  std::thread receiver([&] {
    while (!all_seen.load()) {
    }
  });
  std::atomic<int> sent{0};
  std::thread sender([&] {
    while (!stop.load()) {
      const int before = signals_seen.load();
      ::pthread_kill(receiver.native_handle(), SIGUSR2);
      sent.fetch_add(1);
      while (signals_seen.load() == before && !stop.load()) std::this_thread::yield();
    }
  });
  Counters none;
  for (int turn = 0; turn < 60; ++turn) {
    Look one{&none, 0, 0, 100'000};
    ASSERT_TRUE(stop_in_the_end([&] { return ThreadFreezer::run_alone(&look, &one); }));
    ASSERT_EQ(one.runs, 1);
  }
  stop = true;
  sender.join();
  for (int i = 0; i < 10'000 && signals_seen.load() < sent.load(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  all_seen = true;
  receiver.join();
  EXPECT_EQ(signals_seen.load(), sent.load());
  ::sigaction(SIGUSR2, &former, nullptr);
}

// Nobody's children or descriptors are touched: the helper is no child that wait() meets.
TEST_F(ThreadFreezerTest, LeavesNothingBehind) {
  const auto descriptors = [] {
    int count = 0;
    for (int fd = 0; fd < 1024; ++fd) count += ::fcntl(fd, F_GETFD) >= 0 ? 1 : 0;
    return count;
  };
  const int before = descriptors();
  Counters none;
  for (int turn = 0; turn < 5; ++turn) {
    Look one{&none, 0, 0, 1000};
    ASSERT_TRUE(stop_in_the_end([&] { return ThreadFreezer::run_alone(&look, &one); }));
    ASSERT_EQ(one.runs, 1);
  }
  EXPECT_EQ(descriptors(), before);
  EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG | __WALL), -1);
  EXPECT_EQ(errno, ECHILD);
}

// The helper ends with its process, however that ends in the middle: else the process could not even be killed, and its
// descriptors stayed open. What is held by nobody any more shows at the other end of a pipe.
class ThreadFreezerEnds : public ThreadFreezerTest, public testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Signals, ThreadFreezerEnds, testing::Values(SIGKILL, SIGSEGV));
TEST_P(ThreadFreezerEnds, TheHelperGoesWithItsProcess) {
  int signal = GetParam();
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::signal(SIGSEGV, SIG_DFL);
    const rlimit no_core{0, 0};
    ::setrlimit(RLIMIT_CORE, &no_core);
    ::close(ends[0]);
    std::thread([] {
      for (;;) ::pause();
    }).detach();
    ThreadFreezer::run_alone(
        [](void* which) {
          sigset_t none;
          sigemptyset(&none);
          ::sigprocmask(SIG_SETMASK, &none, nullptr);
          ::kill(::getpid(), *static_cast<int*>(which));
          for (;;) ::pause();
        },
        &signal);
    ::_exit(9);
  }
  ASSERT_GT(child, 0);
  ::close(ends[1]);
  pollfd look{ends[0], POLLIN, 0};
  EXPECT_EQ(::poll(&look, 1, 30'000), 1) << "the helper has outlived its process";
  EXPECT_NE(look.revents & POLLHUP, 0);
  int status = 0;
  pid_t waited = 0;
  for (int i = 0; i < 3000 && waited == 0; ++i) {
    waited = ::waitpid(child, &status, WNOHANG);
    if (waited == 0) std::this_thread::sleep_for(10ms);
  }
  ASSERT_EQ(waited, child);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), signal);
  ::close(ends[0]);
}

// A thread that cannot be stopped: in a system call that waits for a page. All others go on, and the error says so.
TEST_F(ThreadFreezerTest, AThreadThatCannotBeStoppedIsAnErrorWithinABound) {
  if (!Userfaultfd::probe().kernel_faults) GTEST_SKIP() << "no userfaultfd for the faults of system calls";
  const Mapping page = Mapping::anonymous(system_page_size());
  Userfaultfd uffd = Userfaultfd::open(0, false);
  uffd.register_missing(page.start(), page.size());
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ASSERT_EQ(::write(ends[1], "x", 1), 1);
  std::thread stuck([&] { (void)!::read(ends[0], page.data(), 1); });
  uffd_msg message{};
  while (uffd.read_events({&message, 1}) == 0) std::this_thread::sleep_for(1ms);
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> count{0};
  std::thread other([&] {
    while (!stop.load()) count.fetch_add(1);
  });
  Counters none;
  Look one{&none};
  int error = 0;
  try {
    ThreadFreezer::run_alone(&look, &one);
  } catch (const SystemError& failed) {
    error = failed.error();
  }
  EXPECT_EQ(error, ETIMEDOUT);
  EXPECT_EQ(one.runs, 0);
  const std::uint64_t before = count.load();
  for (int i = 0; i < 20'000 && count.load() == before; ++i) std::this_thread::sleep_for(1ms);
  EXPECT_NE(count.load(), before);
  stop = true;
  other.join();
  (void)uffd.zeropage(page.start(), page.size(), true);
  stuck.join();
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST_F(ThreadFreezerTest, StopsAnotherProcess) {
  int report[2];
  ASSERT_EQ(::pipe(report), 0);
  auto* const count = static_cast<std::atomic<std::uint64_t>*>(
      ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  const pid_t child = ::fork();
  if (child == 0) {
    std::thread beside([&] {
      for (;;) count[1].fetch_add(1);
    });
    for (;;) count[0].fetch_add(1);
  }
  ASSERT_GT(child, 0);
  while (count[0].load() == 0 || count[1].load() == 0) std::this_thread::sleep_for(1ms);
  const std::string path = "/proc/" + std::to_string(child) + "/task";
  const UniqueFd tasks(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  struct Watched {
    std::atomic<std::uint64_t>* count;
    std::uint64_t moved = 0;
    int runs = 0;
  } watched{count};
  for (int turn = 0; turn < 30; ++turn) {
    ASSERT_TRUE(stop_in_the_end([&] {
      return ThreadFreezer::run_while_stopped(
          tasks.get(),
          [](void* argument) {
            Watched& each = *static_cast<Watched*>(argument);
            ++each.runs;
            const std::uint64_t before = each.count[0].load() + each.count[1].load();
            const timespec nap{0, 2'000'000};
            ::nanosleep(&nap, nullptr);
            each.moved += each.count[0].load() + each.count[1].load() - before;
          },
          &watched);
    }));
    ASSERT_EQ(watched.runs, turn + 1);
  }
  EXPECT_EQ(watched.moved, 0U);
  const std::uint64_t before = count[0].load();
  for (int i = 0; i < 20'000 && count[0].load() == before; ++i) std::this_thread::sleep_for(1ms);
  EXPECT_NE(count[0].load(), before);
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  EXPECT_THROW(ThreadFreezer::run_while_stopped(
                   tasks.get(), [](void*) {}, nullptr),
               SystemError);
  ::munmap(count, 4096);
  ::close(report[0]);
  ::close(report[1]);
}

// Under a debugger there is a tracer already.
TEST_F(ThreadFreezerTest, ATracedProcessIsAnError) {
  const pid_t child = ::fork();
  if (child == 0) {
    for (;;) ::pause();
  }
  ASSERT_EQ(::ptrace(PTRACE_SEIZE, child, 0, 0), 0);
  const std::string path = "/proc/" + std::to_string(child) + "/task";
  const UniqueFd tasks(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  int error = 0;
  try {
    ThreadFreezer::run_while_stopped(
        tasks.get(), [](void*) {}, nullptr);
  } catch (const SystemError& failed) {
    error = failed.error();
  }
  EXPECT_EQ(error, EPERM);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

}  // namespace
}  // namespace memferry
