// Restoring another process's memory lazily: every byte against the snapshot, removals against zeros, and ends of all
// kinds. The owner is a forked process; what it finds it says by its exit code.
#include "restore/snapshot_pager.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>

#include "os/fd_channel.h"
#include "os/sys_error.h"
#include "restore/snapshot_file.h"

namespace memferry {
namespace {

using std::chrono::milliseconds;
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kHugePage = 2ULL << 20U;

// Byte `i` of the snapshot, never zero.
std::uint8_t oracle(std::uint64_t i) {
  return static_cast<std::uint8_t>(1 + ((i / kPage * 2654435761U + i % kPage * 31U) >> 3U) % 255);
}

UniqueFd memory_file(std::uint64_t bytes) {
  UniqueFd fd(static_cast<int>(::syscall(SYS_memfd_create, "snapshot", 1)));
  std::vector<std::uint8_t> content(bytes);
  for (std::uint64_t i = 0; i < bytes; ++i) content[i] = oracle(i);
  EXPECT_EQ(::write(fd.get(), content.data(), bytes), static_cast<ssize_t>(bytes));
  return fd;
}

// What ends an owner that reads what is lost: it fails to be read, or its owner is ended where the kernel cannot do that
// (Linux 6.6).
int signal_of_a_loss() {
  return (Userfaultfd::probe().features & abi::kUffdFeaturePoison) != 0 ? SIGBUS : SIGKILL;
}

struct OwnerMade {
  std::uint64_t address;
  bool with_huge_pages;
};

// What the owner's process does: maps, registers, hands over, runs `body`, and exits with what it gives.
struct OwnerSetup {
  std::uint64_t bytes = 64 * kPage;
  std::uint64_t features = UFFD_FEATURE_EVENT_REMOVE;
  std::uint64_t mode = UFFDIO_REGISTER_MODE_MISSING;
  bool huge = false;
  std::function<int(volatile std::uint8_t*)> body;
};

[[noreturn]] void be_owner(const OwnerSetup& setup, int channel) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  (void)std::signal(SIGBUS, SIG_DFL);  // a sanitizer's handler would make an exit of it
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (setup.huge ? MAP_HUGETLB | (21 << MAP_HUGE_SHIFT) : 0);
  void* memory = ::mmap(nullptr, setup.bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) ::_exit(101);
  const int uffd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = setup.features;
  if (uffd < 0 || ::ioctl(uffd, UFFDIO_API, &api) != 0) ::_exit(102);
  uffdio_register reg{};
  reg.range = {reinterpret_cast<std::uint64_t>(memory), setup.bytes};
  reg.mode = setup.mode;
  if (::ioctl(uffd, UFFDIO_REGISTER, &reg) != 0) ::_exit(103);
  FdConnection connection{UniqueFd(channel)};
  const OwnerMade made{reinterpret_cast<std::uint64_t>(memory), setup.huge};
  const std::array<int, 1> handed{uffd};
  if (connection.send(std::as_bytes(std::span(&made, 1)), handed, milliseconds(5000)) != FdOutcome::kOk)
    ::_exit(104);
  if (connection.receive(1, 0, milliseconds(20'000)).bytes.empty()) ::_exit(105);  // it is served
  ::_exit(setup.body(static_cast<volatile std::uint8_t*>(memory)));
}

class SnapshotPagerTest : public ::testing::Test {
 protected:
  void TearDown() override {
    if (child_ > 0) {
      ::kill(child_, SIGKILL);
      ::waitpid(child_, nullptr, 0);
    }
    pager_.reset();
  }

  // False: there are no huge pages here.
  bool start_owner(const OwnerSetup& setup) {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    child_ = ::fork();
    if (child_ == 0) {
      ::close(ends[0]);
      be_owner(setup, ends[1]);
    }
    ::close(ends[1]);
    channel_ = std::make_unique<FdConnection>(UniqueFd(ends[0]));
    FdConnection::Received got = channel_->receive(sizeof(OwnerMade), 1, milliseconds(5000));
    if (got.bytes.size() != sizeof(OwnerMade)) return false;
    OwnerMade made{};
    std::memcpy(&made, got.bytes.data(), sizeof made);
    at_ = OwnerAddress(made.address);
    uffd_ = std::move(got.descriptors.at(0));
    pidfd_.reset(static_cast<int>(::syscall(SYS_pidfd_open, child_, 0)));
    bytes_ = setup.bytes;
    page_size_ = setup.huge ? kHugePage : kPage;
    return true;
  }

  SnapshotPager::Config config(PrePaging pre_paging = PrePaging::kSequential) {
    SnapshotPager::Config config{.uffd = Userfaultfd::adopt(uffd_.get(), 0),
                                 .owner = Process::open(pidfd_.get()),
                                 .spans = {},
                                 .page_size = page_size_,
                                 .pre_paging = pre_paging,
                                 .loss_grace = milliseconds(10),
                                 .on_event = [this](const RestoreEvent& event) { note(event); },
                                 .source = nullptr,
                                 .read_now = nullptr};
    if (!snapshot_) {
      file_ = memory_file(bytes_);
      snapshot_ = Mapping::shared(file_.get(), bytes_, 0, PROT_READ);
    }
    config.spans = {{at_, bytes_, snapshot_.data()}};
    return config;
  }
  void serve(SnapshotPager::Config made) {
    pager_ = std::make_unique<SnapshotPager>(std::move(made));
    go();
  }
  void go() {
    const std::byte go{1};
    ASSERT_EQ(channel_->send(std::span(&go, 1), {}, milliseconds(5000)), FdOutcome::kOk);
  }
  // Its exit code; 128 + the signal that ended it; -1: it hangs.
  int wait_for_owner(milliseconds most = milliseconds(20'000)) {
    const auto deadline = std::chrono::steady_clock::now() + most;
    while (std::chrono::steady_clock::now() < deadline) {
      int status = 0;
      if (::waitpid(child_, &status, WNOHANG) == child_) {
        child_ = 0;
        return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      }
      std::this_thread::sleep_for(milliseconds(1));
    }
    return -1;
  }
  void note(const RestoreEvent& event) {
    const std::lock_guard lock(mutex_);
    events_.push_back(event);
    changed_.notify_all();
  }
  bool told(RestoreEvent::Kind kind) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, milliseconds(20'000), [&] {
      return std::any_of(events_.begin(), events_.end(),
                         [&](const RestoreEvent& e) { return e.kind == kind; });
    });
  }

  pid_t child_ = 0;
  std::unique_ptr<FdConnection> channel_;
  UniqueFd uffd_;
  UniqueFd pidfd_;
  UniqueFd file_;
  OwnerAddress at_;
  std::uint64_t bytes_ = 0;
  std::uint64_t page_size_ = kPage;
  Mapping snapshot_;
  std::mutex mutex_;  // guards events_
  std::condition_variable changed_;
  std::vector<RestoreEvent> events_;
  std::unique_ptr<SnapshotPager> pager_;
};

bool page_is(volatile const std::uint8_t* memory, std::uint64_t page, bool zeros) {
  for (std::uint64_t i = page * kPage; i < (page + 1) * kPage; ++i)
    if (memory[i] != (zeros ? 0 : oracle(i))) return false;
  return true;
}

int all_right(volatile const std::uint8_t* memory, std::uint64_t pages, bool sequential) {
  std::vector<std::uint64_t> order(pages);
  for (std::uint64_t i = 0; i < pages; ++i) order[i] = i;
  if (!sequential) std::shuffle(order.begin(), order.end(), std::mt19937(7));
  for (const std::uint64_t page : order)
    if (!page_is(memory, page, false)) return 1;
  return 0;
}

TEST_F(SnapshotPagerTest, EveryByteInAnyOrder) {
  for (const bool sequential : {true, false}) {
    for (const PrePaging pre_paging : {PrePaging::kNone, PrePaging::kSequential, PrePaging::kAll}) {
      ASSERT_TRUE(start_owner({.bytes = 2000 * kPage,
                               .body = [=](auto* memory) { return all_right(memory, 2000, sequential); }}));
      serve(config(pre_paging));
      EXPECT_EQ(wait_for_owner(), 0);
      EXPECT_TRUE(told(RestoreEvent::Kind::kOwnerGone));
      pager_->close();  // a page counts once it is in, and its owner may be done by then
      const RestoreStats stats = pager_->stats();
      EXPECT_EQ(stats.installed, 2000U);
      EXPECT_EQ(stats.lost, 0U);
      if (sequential && pre_paging == PrePaging::kSequential) {
        EXPECT_LT(stats.faults, 200U);
      }
      pager_.reset();
      events_.clear();
    }
  }
}

TEST_F(SnapshotPagerTest, AFileIsReadWithoutWaitingWhereItCanBe) {
  const std::string path = ::testing::TempDir() + "snapshot-" + std::to_string(::getpid());
  {
    std::ofstream file(path, std::ios::binary);
    for (std::uint64_t i = 0; i < 256 * kPage; ++i) file.put(static_cast<char>(oracle(i)));
  }
  const auto file = SnapshotFile::open(path);
  EXPECT_EQ(file->bytes(), 256 * kPage);
  EXPECT_THROW((void)file->at(255 * kPage, 2 * kPage), std::out_of_range);
  EXPECT_THROW((void)SnapshotFile::open("/"), std::invalid_argument);
  EXPECT_THROW((void)SnapshotFile::open("/dev/null"), std::invalid_argument);
  ASSERT_TRUE(start_owner(
      {.bytes = 256 * kPage, .body = [](auto* memory) { return all_right(memory, 200, false); }}));
  SnapshotPager::Config made = config(PrePaging::kSequential);
  made.spans = {{at_, bytes_, file->at(0, bytes_)}};
  made.source = file;
  made.read_now = [file](const std::byte* from, std::span<std::byte> into) {
    return file->read_now(from, into);
  };
  ASSERT_EQ(::truncate(path.c_str(), 250 * kPage), 0);
  std::vector<std::byte> page(kPage);
  EXPECT_FALSE(file->read_now(file->at(252 * kPage, kPage), page));
  serve(std::move(made));
  EXPECT_EQ(wait_for_owner(), 0);
  EXPECT_EQ(pager_->stats().lost, 0U);
  std::remove(path.c_str());
}

TEST_F(SnapshotPagerTest, EverythingIsBroughtAndTheMemoryLetGoOf) {
  ASSERT_TRUE(start_owner({.bytes = 1024 * kPage, .body = [](auto* memory) {
                             ::usleep(300'000);
                             return all_right(memory, 1024, false);
                           }}));
  serve(config(PrePaging::kAll));
  EXPECT_TRUE(told(RestoreEvent::Kind::kComplete));
  pager_->close();
  EXPECT_EQ(wait_for_owner(), 0);
}

// A balloon, with the guest's threads faulting all the while: what was removed is zeros whenever it is read again.
TEST_F(SnapshotPagerTest, RemovedPagesAreZeros) {
  ASSERT_TRUE(start_owner({.bytes = 4096 * kPage, .body = [](auto* memory) {
                             constexpr std::uint64_t pages = 4096;
                             std::atomic<bool> stop{false};
                             std::atomic<int> wrong{0};
                             // The upper half is never removed, and read all along.
                             std::thread reader([&] {
                               std::mt19937 random(3);
                               while (!stop)
                                 if (!page_is(memory, pages / 2 + random() % (pages / 2), false)) wrong = 2;
                             });
                             std::mt19937 random(5);
                             std::vector<bool> removed(pages / 2);
                             for (int i = 0; i < 3000 && wrong == 0; ++i) {
                               const std::uint64_t first = random() % (pages / 2 - 16);
                               const std::uint64_t count = 1 + random() % 16;
                               if (random() % 2 == 0) {
                                 if (::madvise(const_cast<std::uint8_t*>(memory) + first * kPage,
                                               count * kPage, MADV_DONTNEED) != 0)
                                   wrong = 3;
                                 std::fill_n(removed.begin() + static_cast<std::ptrdiff_t>(first), count,
                                             true);
                               }
                               for (std::uint64_t page = first; page < first + count; ++page)
                                 if (!page_is(memory, page, removed[page])) wrong = 1;
                             }
                             stop = true;
                             reader.join();
                             return wrong.load();
                           }}));
  serve(config(PrePaging::kSequential));
  EXPECT_EQ(wait_for_owner(), 0);
  EXPECT_GT(pager_->stats().remove_events, 1000U);
}

// Pages are removed right where they are being brought.
TEST_F(SnapshotPagerTest, RemoveWhereItIsBrought) {
  for (unsigned round = 0; round < 3; ++round) {
    ASSERT_TRUE(start_owner({.bytes = 8192 * kPage, .body = [round](auto* memory) {
                               constexpr std::uint64_t pages = 8192;
                               std::mt19937 random(round);
                               std::vector<bool> removed(pages);
                               for (std::uint64_t first = 0; first + 8 <= pages; first += 8 + random() % 24) {
                                 if (::madvise(const_cast<std::uint8_t*>(memory) + first * kPage, 8 * kPage,
                                               MADV_DONTNEED) != 0)
                                   return 3;
                                 std::fill_n(removed.begin() + static_cast<std::ptrdiff_t>(first), 8, true);
                               }
                               for (std::uint64_t page = 0; page < pages; ++page)
                                 if (!page_is(memory, page, removed[page])) return 1;
                               return 0;
                             }}));
    serve(config(PrePaging::kAll));
    ASSERT_EQ(wait_for_owner(), 0) << "round " << round;
    pager_.reset();
    events_.clear();
  }
}

// The interleaving of snapshot_pager.h, made to happen: a source whose page is missing while UFFDIO_COPY reads it holds the
// copy right in its middle, and there the owner removes the page. What tells touching the source from copying it: touching
// has passed page 5 when it stops at page 31, so page 5 is taken away then.
TEST_F(SnapshotPagerTest, RemoveDuringPrePaging) {
  constexpr std::uint64_t pages = 32;
  void* const shared = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  auto* stage = static_cast<std::atomic<int>*>(shared);
  ASSERT_TRUE(
      start_owner({.bytes = pages * kPage, .body = [stage](auto* memory) {
                     while (stage->load() < 1) ::usleep(100);
                     if (::madvise(const_cast<std::uint8_t*>(memory) + 5 * kPage, kPage, MADV_DONTNEED) != 0)
                       return 3;
                     stage->store(2);
                     while (stage->load() < 3) ::usleep(100);
                     ::usleep(20'000);
                     if (!page_is(memory, 5, true)) return 1;
                     return page_is(memory, 4, false) && page_is(memory, 6, false) ? 0 : 2;
                   }}));
  Mapping source = Mapping::anonymous(pages * kPage);
  for (std::uint64_t i = 0; i < pages * kPage; ++i) source.data()[i] = static_cast<std::byte>(oracle(i));
  Userfaultfd local = Userfaultfd::open(0, false);
  local.register_missing(source.start(), source.size());
  std::vector<std::byte> kept(source.data(), source.data() + source.size());
  const auto take_away = [&](std::uint64_t page) {
    ASSERT_EQ(::madvise(source.data() + page * kPage, kPage, MADV_DONTNEED), 0);
  };
  const auto next_fault = [&]() -> std::uint64_t {
    pollfd waiting{local.fd(), POLLIN, 0};
    uffd_msg event{};
    if (::poll(&waiting, 1, 5000) != 1 || local.read_events(std::span(&event, 1)) != 1) return ~0ULL;
    return (event.arg.pagefault.address - source.start().value) / kPage;
  };
  const auto give = [&](std::uint64_t page) {
    (void)local.copy(source.start().plus(page * kPage), kept.data() + page * kPage, kPage, true);
  };
  take_away(31);
  SnapshotPager::Config made = config(PrePaging::kAll);
  made.spans = {{at_, bytes_, source.data()}};
  serve(std::move(made));
  ASSERT_EQ(next_fault(), 31U);  // touching
  take_away(5);
  give(31);
  ASSERT_EQ(next_fault(), 5U);  // copying
  stage->store(1);
  std::this_thread::sleep_for(milliseconds(100));
  EXPECT_EQ(stage->load(), 1) << "the removal was read in the middle of a copy";
  give(5);
  for (int i = 0; i < 20'000 && stage->load() < 2; ++i) ::usleep(1000);
  EXPECT_EQ(stage->load(), 2);
  stage->store(3);
  EXPECT_EQ(wait_for_owner(), 0);
  ::munmap(shared, kPage);
}

TEST_F(SnapshotPagerTest, AnOwnerThatDoesNotTellOfItsDiscardsGetsZeros) {
  ASSERT_TRUE(start_owner({.bytes = 16 * kPage, .features = 0, .body = [](auto* memory) {
                             if (!page_is(memory, 3, false)) return 1;
                             ::madvise(const_cast<std::uint8_t*>(memory) + 3 * kPage, kPage, MADV_DONTNEED);
                             return page_is(memory, 3, true) && page_is(memory, 4, false) ? 0 : 2;
                           }}));
  serve(config(PrePaging::kNone));
  EXPECT_EQ(wait_for_owner(), 0);
}

// Closed in the middle: what is missing fails to be read, what is there stays, what was removed is zeros.
TEST_F(SnapshotPagerTest, ClosingPoisonsWhatIsMissing) {
  void* const shared = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  auto* stage = static_cast<std::atomic<int>*>(shared);
  ASSERT_TRUE(start_owner({.bytes = 64 * kPage, .body = [stage](auto* memory) {
                             if (!page_is(memory, 0, false)) return 1;
                             ::madvise(const_cast<std::uint8_t*>(memory) + 5 * kPage, kPage, MADV_DONTNEED);
                             stage->store(1);
                             while (stage->load() < 2) ::usleep(100);
                             if (!page_is(memory, 0, false)) return 2;
                             if (!page_is(memory, 5, true)) return 3;
                             return static_cast<int>(memory[9 * kPage]);  // SIGBUS
                           }}));
  serve(config(PrePaging::kNone));
  for (int i = 0; i < 10'000 && stage->load() < 1; ++i) ::usleep(1000);
  ASSERT_EQ(stage->load(), 1);
  pager_->close();
  pager_->close();
  stage->store(2);
  EXPECT_EQ(wait_for_owner(), 128 + signal_of_a_loss());
  ::munmap(shared, kPage);
}

TEST_F(SnapshotPagerTest, ClosingWakesWhoWaits) {
  ASSERT_TRUE(start_owner(
      {.bytes = 64 * kPage, .body = [](auto* memory) { return static_cast<int>(memory[9 * kPage]); }}));
  // Never served: it waits before there is a pager.
  go();
  std::this_thread::sleep_for(milliseconds(50));
  pager_ = std::make_unique<SnapshotPager>(config(PrePaging::kNone));
  EXPECT_EQ(wait_for_owner(), oracle(9 * kPage));
}

TEST_F(SnapshotPagerTest, ASnapshotThatShrankIsALossAndNeverZeros) {
  ASSERT_TRUE(start_owner({.bytes = 64 * kPage, .body = [](auto* memory) {
                             if (!page_is(memory, 0, false)) return 1;
                             return static_cast<int>(memory[40 * kPage]);
                           }}));
  SnapshotPager::Config made = config(PrePaging::kNone);
  ASSERT_EQ(::ftruncate(file_.get(), 20 * kPage), 0);
  serve(std::move(made));
  EXPECT_EQ(wait_for_owner(), 128 + signal_of_a_loss());
  ASSERT_TRUE(told(RestoreEvent::Kind::kLost));
  const std::lock_guard lock(mutex_);  // more is told: the owner has ended
  EXPECT_EQ(events_.front().lost, (std::vector<PageRun>{{PageNumber{40}, 1}}));
}

TEST_F(SnapshotPagerTest, AGreatLossIsToldInAFewReports) {
  if (signal_of_a_loss() != SIGBUS) GTEST_SKIP() << "no UFFDIO_POISON: its owner is ended";
  constexpr std::uint64_t kPages = 4096;
  constexpr std::uint64_t kLeft = 20;
  ASSERT_TRUE(start_owner({.bytes = kPages * kPage, .body = [](auto* memory) {
                             if (!page_is(memory, 0, false)) return 1;
                             ::pause();
                             return 0;
                           }}));
  SnapshotPager::Config made = config(PrePaging::kAll);
  made.loss_grace = std::chrono::hours(1);
  ASSERT_EQ(::ftruncate(file_.get(), kLeft * kPage), 0);
  serve(std::move(made));
  for (int i = 0; i < 10'000 && pager_->stats().lost < kPages - kLeft; ++i) ::usleep(1000);
  ASSERT_EQ(pager_->stats().lost, kPages - kLeft);
  const auto reports = [this] {
    const std::lock_guard lock(mutex_);
    return events_;
  };
  EXPECT_EQ(reports().size(), 1U);
  pager_->acknowledge_loss();
  for (int i = 0; i < 10'000 && reports().size() < 2; ++i) ::usleep(1000);
  std::vector<int> times(kPages);
  for (const RestoreEvent& event : reports()) {
    EXPECT_EQ(event.kind, RestoreEvent::Kind::kLost);
    for (const PageRun run : event.lost)
      for (PageNumber page = run.first; page < run.end(); ++page.value) ++times[page.value];
  }
  EXPECT_EQ(reports().size(), 2U);
  for (std::uint64_t page = 0; page < kPages; ++page) ASSERT_EQ(times[page], page < kLeft ? 0 : 1) << page;
}

TEST_F(SnapshotPagerTest, TheOwnersDeathIsNoticedAtOnce) {
  ASSERT_TRUE(start_owner({.bytes = 64 * kPage, .body = [](auto*) {
                             ::pause();
                             return 0;
                           }}));
  SnapshotPager::Config made = config();
  // Only its pidfd can tell.
  made.look_after_owner = std::chrono::hours(1);
  serve(std::move(made));
  ::kill(child_, SIGKILL);
  EXPECT_TRUE(told(RestoreEvent::Kind::kOwnerGone));
}

TEST_F(SnapshotPagerTest, AnOwnerThatRunsAnotherProgram) {
  ASSERT_TRUE(start_owner({.bytes = 64 * kPage, .body = [](auto* memory) {
                             if (!page_is(memory, 0, false)) return 1;
                             ::execl("/bin/sleep", "sleep", "30", nullptr);
                             return 2;
                           }}));
  serve(config());
  EXPECT_TRUE(told(RestoreEvent::Kind::kOwnerGone));
}

TEST_F(SnapshotPagerTest, WritesAreTrackedThroughTheSameDescriptor) {
  const Userfaultfd::Offer offer = Userfaultfd::probe();
  if ((offer.features & abi::kUffdFeatureWpAsync) == 0) GTEST_SKIP() << "no WP_ASYNC (Linux 6.7)";
  void* const shared = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(shared, MAP_FAILED);
  auto* written = static_cast<std::atomic<int>*>(shared);
  ASSERT_TRUE(start_owner({.bytes = 64 * kPage,
                           .features = UFFD_FEATURE_EVENT_REMOVE | abi::kUffdFeatureWpAsync,
                           .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
                           .body = [written](auto* memory) {
                             if (!page_is(memory, 1, false)) return 1;
                             memory[7 * kPage] = 9;
                             memory[1 * kPage] = oracle(kPage);
                             if (!page_is(memory, 2, false)) return 2;
                             written->store(1);
                             ::pause();
                             return 0;
                           }}));
  serve(config(PrePaging::kNone));
  EXPECT_TRUE(pager_->write_protects());
  for (int i = 0; i < 10'000 && written->load() == 0; ++i) std::this_thread::sleep_for(milliseconds(1));
  ASSERT_EQ(written->load(), 1);
  const UniqueFd pagemap(
      ::open(("/proc/" + std::to_string(child_) + "/pagemap").c_str(), O_RDONLY | O_CLOEXEC));
  std::array<abi::PageRegion, 8> found{};
  abi::PmScanArg scan{};
  scan.size = sizeof scan;
  scan.start = at_.value;
  scan.end = at_.value + bytes_;
  scan.vec = reinterpret_cast<std::uint64_t>(found.data());
  scan.vec_len = found.size();
  scan.category_mask = abi::kPageIsWritten | abi::kPageIsPresent;
  scan.return_mask = abi::kPageIsWritten;
  ASSERT_EQ(::ioctl(pagemap.get(), abi::kPagemapScan, &scan), 2);
  EXPECT_EQ(found[0].start, at_.value + kPage);
  EXPECT_EQ(found[1].start, at_.value + 7 * kPage);
  ::munmap(shared, kPage);
}

TEST_F(SnapshotPagerTest, WhatMakesNoSenseIsRefused) {
  ASSERT_TRUE(start_owner({.bytes = 64 * kPage, .body = [](auto*) { return 0; }}));
  const auto refused = [&](std::vector<RestoreSpan> spans, std::uint64_t page_size) {
    SnapshotPager::Config made = config();
    made.spans = std::move(spans);
    made.page_size = page_size;
    try {
      const SnapshotPager pager(std::move(made));
      return false;
    } catch (const std::invalid_argument&) {
      return true;
    } catch (const SystemError&) {
      return true;
    }
  };
  const std::byte* from = config().spans[0].from;
  EXPECT_TRUE(refused({}, kPage));
  EXPECT_TRUE(refused({{at_, 0, from}}, kPage));
  EXPECT_TRUE(refused({{at_, kPage + 1, from}}, kPage));
  EXPECT_TRUE(refused({{at_.plus(1), kPage, from}}, kPage));
  EXPECT_TRUE(refused({{at_, 2 * kPage, from}, {at_.plus(kPage), kPage, from}}, kPage));
  EXPECT_TRUE(refused({{at_, bytes_, from}}, 3 * kPage));
  EXPECT_TRUE(refused({{at_, bytes_, from}}, 512));
  EXPECT_TRUE(refused({{at_, bytes_ + kPage, from}}, kPage));  // more than is registered
  EXPECT_TRUE(refused({{OwnerAddress(~0ULL - kPage + 1), 2 * kPage, from}}, kPage));
  EXPECT_FALSE(refused({{at_, bytes_, from}}, kPage));
}

TEST_F(SnapshotPagerTest, HugePagesAreServedWhole) {
  std::ifstream free("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
  long former = 0;
  free >> former;
  const auto set = [](long count) {
    std::ofstream("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages") << count << std::flush;
  };
  set(std::max(former, 8L));
  const bool ready =
      start_owner({.bytes = 4 * kHugePage, .huge = true, .body = [](auto* memory) {
                     if (all_right(memory, kHugePage / kPage, true) != 0) return 1;
                     ::madvise(const_cast<std::uint8_t*>(memory) + kHugePage, kHugePage, MADV_DONTNEED);
                     if (!page_is(memory, 512 + 17, true)) return 2;
                     return page_is(memory, 2 * 512 + 17, false) ? 0 : 3;
                   }});
  if (!ready) {
    set(former);
    GTEST_SKIP() << "no huge pages of 2 MiB to be had (vm.nr_hugepages)";
  }
  serve(config(PrePaging::kNone));
  EXPECT_EQ(wait_for_owner(), 0);
  for (int i = 0; i < 10'000 && pager_->stats().installed < 2; ++i) ::usleep(1000);  // counted once it is in
  EXPECT_EQ(pager_->stats().installed, 2U);
  set(former);
}

TEST(CopyingTest, SaysWhichPagesWhileItLasts) {
  Copying copying;
  EXPECT_EQ(copying.now().count, 0U);
  EXPECT_FALSE(copying.has(PageNumber{0}));
  {
    const Copying::Held held(copying, {PageNumber{1ULL << 40U}, 1024});
    EXPECT_FALSE(copying.has(PageNumber{(1ULL << 40U) - 1}));
    EXPECT_TRUE(copying.has(PageNumber{1ULL << 40U}));
    EXPECT_TRUE(copying.has(PageNumber{(1ULL << 40U) + 1023}));
    EXPECT_FALSE(copying.has(PageNumber{(1ULL << 40U) + 1024}));
  }
  EXPECT_FALSE(copying.has(PageNumber{1ULL << 40U}));
}

// Several threads walk through it in step with what is brought ahead of them, and what is in front of them is removed:
// whoever waits for a copy that is under way is woken, and no copy brings back what is gone.
TEST_F(SnapshotPagerTest, WalksInStepWithWhatIsBroughtAheadOfThem) {
  constexpr std::uint64_t pages = 16384;
  ASSERT_TRUE(start_owner({.bytes = pages * kPage, .body = [](auto* memory) {
                             std::atomic<int> wrong{0};
                             std::vector<std::thread> walkers;
                             for (std::uint64_t part = 0; part < 4; ++part) {
                               walkers.emplace_back([&wrong, memory, part] {
                                 for (std::uint64_t i = 0; i < pages / 4; ++i) {
                                   const std::uint64_t page = part * pages / 4 + i;
                                   // Some pages ahead, and looked at when the walk is there.
                                   if (i % 64 == 0 && i + 40 < pages / 4 &&
                                       ::madvise(const_cast<std::uint8_t*>(memory) + (page + 37) * kPage,
                                                 kPage, MADV_DONTNEED) != 0)
                                     wrong = 3;
                                   const bool removed = i % 64 == 37 && i + 3 < pages / 4;
                                   if (!page_is(memory, page, removed)) wrong = 1;
                                 }
                               });
                             }
                             for (std::thread& walker : walkers) walker.join();
                             return wrong.load();
                           }}));
  serve(config());
  EXPECT_EQ(wait_for_owner(), 0);
  EXPECT_EQ(pager_->stats().lost, 0U);
  EXPECT_GT(pager_->stats().ahead, pages / 2);
}

TEST(ReadAheadTest, RandomFaultsBringNothingAndWalksGrow) {
  ReadAhead random(kPage, 100'000);
  for (const std::uint64_t page : {5U, 900U, 17'000U, 3U, 44'000U}) {
    const ReadAhead::Advice advice = random.fault(PageNumber{page});
    EXPECT_EQ(advice.at_once, 1U);
    EXPECT_EQ(advice.later.count, 0U);
  }
  ReadAhead walk(kPage, 100'000);
  std::uint64_t page = 10;
  std::uint64_t largest = 0;
  for (int i = 0; i < 12; ++i) {
    const ReadAhead::Advice advice = walk.fault(PageNumber{page});
    EXPECT_LE(advice.at_once, ReadAhead::kAtOnceBytes / kPage);
    if (advice.later.count > 0) {
      EXPECT_EQ(advice.later.first.value, page + advice.at_once);
    }
    const std::uint64_t total = advice.at_once + advice.later.count;
    EXPECT_GE(total, largest);
    largest = total;
    page += total;
  }
  EXPECT_EQ(largest, ReadAhead::kMostBytes / kPage);
  // Never beyond the end.
  ReadAhead last(kPage, 20);
  (void)last.fault(PageNumber{17});
  const ReadAhead::Advice advice = last.fault(PageNumber{18});
  EXPECT_EQ(advice.at_once + advice.later.count, 2U);
}

TEST(GuestLayoutTest, PagesAreNumberedInTheOrderOfTheMappings) {
  const auto* from = reinterpret_cast<const std::byte*>(0x10000);
  const GuestLayout layout(
      {{OwnerAddress(0x8000'0000), 2 * kPage, from}, {OwnerAddress(0x1000'0000), 3 * kPage, from}}, kPage);
  EXPECT_EQ(layout.pages(), 5U);
  EXPECT_EQ(layout.page_at(OwnerAddress(0x8000'1fff)), PageNumber{1});
  EXPECT_EQ(layout.page_at(OwnerAddress(0x1000'0000)), PageNumber{2});
  EXPECT_FALSE(layout.page_at(OwnerAddress(0x1000'3000)).has_value());
  EXPECT_FALSE(layout.page_at(OwnerAddress(0xfff)).has_value());
  EXPECT_FALSE(layout.page_at(OwnerAddress(0x8000'2000)).has_value());
  const GuestLayout::Piece piece = layout.piece({PageNumber{1}, 4});
  EXPECT_EQ(piece.run.count, 1U);
  EXPECT_EQ(piece.at.value, 0x8000'1000U);
  std::vector<PageRun> runs;
  layout.for_each_run(OwnerAddress(0x1000'1001), OwnerAddress(0x8000'1001),
                      [&](PageRun run) { runs.push_back(run); });
  EXPECT_EQ(runs, (std::vector<PageRun>{{PageNumber{0}, 1}, {PageNumber{4}, 1}}));
}

}  // namespace
}  // namespace memferry
