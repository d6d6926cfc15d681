// A pager that serves from a file, and its successors.
#include <dirent.h>
#include <gtest/gtest.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>

#include "fake_source.h"
#include "fault/source_pager.h"
#include "owner_process.h"
#include "page/owner_watch.h"

namespace memferry::test {
namespace {

using Op = OwnerProcess::Op;
const std::uint64_t kPage = system_page_size();

// Where the kernel cannot make pages fail, an owner that would read one that is lost is ended (Linux 6.6).
bool kernel_poisons() { return (Userfaultfd::probe().features & abi::kUffdFeaturePoison) != 0; }

TEST(PageLedger, HasRoomForItsMarkWhateverItsLength) {
  for (const std::uint64_t pages :
       {1U, 64U, 383U * 64, 384U * 64, 384U * 64 + 1, 511U * 64, 512U * 64, 512U * 64 + 1, 8U * 512 * 64}) {
    EXPECT_GE(PageLedger::bytes_for(pages),
              PageLedger::kEvents * sizeof(uffd_msg) + ((pages + 63) / 64 + 1) * sizeof(std::uint64_t))
        << pages;
    const UniqueFd file(::memfd_create("ledger", MFD_CLOEXEC));
    PageLedger ledger(pages, file.get());
    EXPECT_EQ(ledger.set({PageNumber{0}, pages}), pages);
    EXPECT_FALSE(ledger.begun()) << pages;
    ledger.begin();
    EXPECT_TRUE(PageLedger(pages, file.get()).begun()) << pages;
  }
}

class AttachSourcePager : public testing::TestWithParam<bool> {
 protected:
  static constexpr std::uint64_t kPages = 4096;
  static constexpr std::uint64_t kOffset = 8192;  // of the pages in the file

  void SetUp() override {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.kernel_faults) GTEST_SKIP() << "no full userfaultfd here: " << std::strerror(offer.error);
    content = random_bytes(kPages * kPage, 9);
    snapshot = UniqueFd(::memfd_create("snapshot", MFD_CLOEXEC));
    ledger = UniqueFd(::memfd_create("ledger", MFD_CLOEXEC));
    ASSERT_EQ(::pwrite(snapshot.get(), content.data(), content.size(), kOffset),
              static_cast<ssize_t>(content.size()));
    own(0);
  }
  void own(std::uint64_t events) {
    owner.emplace(
        OwnerProcess::Options{.pages = kPages,
                              .shared = GetParam(),
                              .features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_MISSING_SHMEM | events});
  }
  SourcePager::Config config(bool prepage) {
    SourcePager::Config made;
    made.region = last_region = owner->attach();
    made.source = std::make_unique<FilePageSource>(snapshot.get(), kOffset, kPage);
    made.ledger = ledger.get();
    made.prepage = prepage;
    made.on_event = [this](const SourcePager::Event& event) {
      if (event.kind == SourcePager::EventKind::kDone) done = true;
      if (event.kind == SourcePager::EventKind::kLost) {
        const std::lock_guard lock(reports_mutex);
        reports.push_back(event.lost);
        for (const PageRun& run : event.lost) lost += run.count;
      }
      if (event.kind == SourcePager::EventKind::kFailed) ++failed;
    };
    return made;
  }
  std::uint64_t hash(std::uint64_t first, std::uint64_t count) const {
    return xxh3_64(std::span(content).subspan(first * kPage, count * kPage));
  }
  void await_done() {
    for (int i = 0; i < 20'000 && !done; ++i) std::this_thread::sleep_for(1ms);
    EXPECT_TRUE(done);
  }

  std::vector<std::byte> content;
  UniqueFd snapshot;
  UniqueFd ledger;
  std::optional<OwnerProcess> owner;
  std::shared_ptr<Region> last_region;  // that config() has attached
  std::atomic<bool> done{false};
  std::atomic<std::uint64_t> lost{0};
  std::mutex reports_mutex;
  std::vector<std::vector<PageRun>> reports;
  std::atomic<int> failed{0};
};
INSTANTIATE_TEST_SUITE_P(Memory, AttachSourcePager, testing::Bool(),
                         [](const auto& of) { return of.param ? "Shared" : "Private"; });

TEST_P(AttachSourcePager, ServesFaultsAndBringsTheRest) {
  SourcePager pager(config(true));
  std::mt19937_64 random(3);
  for (int i = 0; i < 200; ++i) {
    const std::uint64_t page = random() % kPages;
    ASSERT_EQ(owner->ask(Op::kHash, page, 1), hash(page, 1)) << page;
  }
  await_done();
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
  EXPECT_EQ(pager.stats().settled, kPages);
  EXPECT_EQ(failed, 0);
}

TEST_P(AttachSourcePager, DiscardedPagesStayZerosForASuccessor) {
  {
    SourcePager first(config(false));
    EXPECT_EQ(owner->ask(Op::kHash, 0, 20), hash(0, 20));
    EXPECT_EQ(owner->ask(Op::kDiscard, 10, 20), 0U);
    EXPECT_EQ(owner->ask(Op::kRead, 25), 0U);
  }
  owner->tell(Op::kRead, 2000);
  EXPECT_EQ(owner->reply(50), std::nullopt);  // between two pagers whoever touches what is missing waits
  SourcePager second(config(true));
  std::uint64_t expected = 0;
  std::memcpy(&expected, content.data() + 2000 * kPage, sizeof expected);
  EXPECT_EQ(owner->reply(), expected);
  EXPECT_GE(second.stats().found, 30U);
  await_done();
  std::memset(content.data() + 10 * kPage, 0, 20 * kPage);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
}

// Every successor is killed while the owner reads all of its memory; the last one lives. The owner never notices.
TEST_P(AttachSourcePager, PagersThatAreKilledOneAfterTheOther) {
  // As whoever starts the first one does: what nobody has registered reads as zeros.
  owner->attach()->uffd()->register_missing(owner->address(), owner->bytes());
  owner->tell(Op::kHash, 0, kPages);
  for (int turn = 0; turn < 4; ++turn) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      try {
        SourcePager pager(config(turn % 2 == 1));
        ::pause();
      } catch (...) {
      }
      ::_exit(1);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(30 + 10 * turn));
    ::kill(pid, SIGKILL);
    int status = 0;
    ::waitpid(pid, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status)) << "the pager ended by itself";
  }
  SourcePager last(config(true));
  EXPECT_EQ(owner->reply(60'000), hash(0, kPages));
  await_done();
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
}

// The thread of this name, of another process, as soon as there is one; 0: there is none.
pid_t thread_of(pid_t pid, const std::string& name) {
  const std::string tasks = "/proc/" + std::to_string(pid) + "/task";
  for (int i = 0; i < 10'000; ++i) {
    std::vector<std::string> ids;
    if (DIR* const directory = ::opendir(tasks.c_str())) {
      while (const dirent* const entry = ::readdir(directory)) ids.emplace_back(entry->d_name);
      ::closedir(directory);
    }
    for (const std::string& id : ids) {
      std::ifstream file(tasks + "/" + id + "/comm");
      std::string comm;
      if (std::getline(file, comm) && comm == name) return std::stoi(id);
    }
    std::this_thread::sleep_for(1ms);
  }
  return 0;
}

// Lets a thread of another process run until it has read a REMOVE event, and stops it before it has done anything more.
bool stop_after_reading_a_discard(pid_t pid, pid_t thread) {
  __ptrace_syscall_info entry{};
  int status = 0;
  while (::waitpid(thread, &status, __WALL) == thread && WIFSTOPPED(status)) {
    __ptrace_syscall_info now{};
    if (WSTOPSIG(status) == (SIGTRAP | 0x80) &&
        ::ptrace(PTRACE_GET_SYSCALL_INFO, thread, sizeof now, &now) > 0) {
      if (now.op == PTRACE_SYSCALL_INFO_ENTRY) entry = now;
      if (now.op == PTRACE_SYSCALL_INFO_EXIT && entry.entry.nr == SYS_read && now.exit.rval > 0) {
        std::array<uffd_msg, 32> events{};
        const std::size_t bytes =
            std::min<std::size_t>(static_cast<std::size_t>(now.exit.rval), sizeof events);
        const iovec into{events.data(), bytes};
        const iovec from{reinterpret_cast<void*>(entry.entry.args[1]), bytes};
        if (::process_vm_readv(pid, &into, 1, &from, 1, 0) == static_cast<ssize_t>(bytes)) {
          for (const uffd_msg& event : events)
            if (event.event == UFFD_EVENT_REMOVE) return true;
        }
      }
    }
    if (::ptrace(PTRACE_SYSCALL, thread, nullptr, nullptr) != 0) return false;
  }
  return false;
}

// The owner goes on as soon as its event has been read, whatever becomes of the reader.
TEST_P(AttachSourcePager, ADeathBetweenAReadAndItsNote) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    try {
      SourcePager pager(config(false));
      ::pause();
    } catch (...) {
    }
    ::_exit(1);
  }
  const pid_t thread = thread_of(pid, "mf-faults");
  ASSERT_NE(thread, 0);
  if (::ptrace(PTRACE_SEIZE, thread, nullptr, PTRACE_O_TRACESYSGOOD) != 0) {
    const int error = errno;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    GTEST_SKIP() << "ptrace is not permitted here: " << std::strerror(error);
  }
  ASSERT_EQ(::ptrace(PTRACE_INTERRUPT, thread, nullptr, nullptr), 0);
  owner->tell(Op::kDiscard, 30, 10);
  EXPECT_TRUE(stop_after_reading_a_discard(pid, thread));
  ::kill(pid, SIGKILL);
  while (::waitpid(thread, nullptr, __WALL) == thread) {
  }
  ::waitpid(pid, nullptr, 0);
  EXPECT_EQ(owner->reply(), 0U) << "the discard is over, and nobody has noted it";

  SourcePager second(config(true));
  await_done();
  std::memset(content.data() + 30 * kPage, 0, 10 * kPage);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages)) << "zeros are to be read there";
}

// Its process looks after the owner's events from the moment at which it attaches, and knows no ledger yet.
TEST_P(AttachSourcePager, ADiscardBetweenTwoPagersWaitsForTheSecond) {
  {
    SourcePager first(config(false));
    const OwnerWatch watch(last_region, nullptr);
    EXPECT_EQ(owner->ask(Op::kHash, 0, 20), hash(0, 20));
    first.leave();
    owner->tell(Op::kDiscard, 30, 10);
    EXPECT_EQ(owner->reply(100), std::nullopt) << "read after the last pager, by nobody who notes it";
  }
  last_region.reset();
  SourcePager::Config made = config(true);
  {
    const OwnerWatch watch(made.region, nullptr);
    EXPECT_EQ(owner->reply(300), std::nullopt) << "read before the next pager";
    last_region.reset();
    SourcePager second(std::move(made));
    EXPECT_EQ(owner->reply(), 0U);
    await_done();
  }
  std::memset(content.data() + 30 * kPage, 0, 10 * kPage);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
}

// Whoever ends it leaves nobody waiting for a successor.
TEST_P(AttachSourcePager, ADiscardAfterTheEndGoesOn) {
  if (!kernel_poisons()) GTEST_SKIP() << "no UFFDIO_POISON: its owner is ended";
  SourcePager pager(config(false));
  const OwnerWatch watch(last_region, nullptr);
  pager.end();
  EXPECT_EQ(owner->ask(Op::kDiscard, 30, 10), 0U);
}

TEST_P(AttachSourcePager, WhatTheFileHasNotFailsToBeRead) {
  ASSERT_EQ(::ftruncate(snapshot.get(), static_cast<off_t>(kOffset + 100 * kPage)), 0);
  SourcePager pager(config(false));
  EXPECT_EQ(owner->ask(Op::kHash, 0, 100), hash(0, 100));
  owner->tell(Op::kRead, 200);
  int status = 0;
  EXPECT_EQ(::waitpid(owner->pid(), &status, 0), owner->pid());
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), kernel_poisons() ? SIGBUS : SIGKILL);
  EXPECT_GE(lost, 1U);
}

// A file that was cut off: its pages fail one by one, and are a few reports; each page is named once.
TEST_P(AttachSourcePager, ManyLostPagesAreAFewReports) {
  if (!kernel_poisons()) GTEST_SKIP() << "no UFFDIO_POISON: its owner is ended";
  ASSERT_EQ(::ftruncate(snapshot.get(), static_cast<off_t>(kOffset + 100 * kPage)), 0);
  const auto began = std::chrono::steady_clock::now();
  SourcePager pager(config(true));
  await_done();
  // One at first, and one after each loss_grace; what came since the last one is in the next.
  const auto most = 2 + (std::chrono::steady_clock::now() - began) / SourcePager::Config{}.loss_grace;
  EXPECT_EQ(owner->ask(Op::kHash, 0, 100), hash(0, 100));
  EXPECT_EQ(lost, kPages - 100);
  EXPECT_EQ(pager.stats().lost, kPages - 100);
  std::vector<bool> named(kPages);
  {
    const std::lock_guard lock(reports_mutex);
    EXPECT_LE(reports.size(), static_cast<std::size_t>(most)) << "a report for each page, nearly";
    for (const auto& runs : reports) {
      for (const PageRun& run : runs) {
        for (PageNumber page = run.first; page < run.end(); ++page.value) {
          EXPECT_FALSE(named[page.value]) << "told twice: " << page.value;
          named[page.value] = true;
        }
      }
    }
  }
  for (std::uint64_t page = 0; page < kPages; ++page) EXPECT_EQ(named[page], page >= 100) << page;
  owner->tell(Op::kRead, kPages - 1);
  int status = 0;
  EXPECT_EQ(::waitpid(owner->pid(), &status, 0), owner->pid());
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
}

// Reported, and not poisoned yet: what its owner drops then reads as zeros, for good.
TEST_P(AttachSourcePager, ALossThatIsDiscardedIsZeros) {
  if (!kernel_poisons()) GTEST_SKIP() << "no UFFDIO_POISON: its owner is ended";
  ASSERT_EQ(::ftruncate(snapshot.get(), static_cast<off_t>(kOffset + 100 * kPage)), 0);
  SourcePager::Config made = config(true);
  made.loss_grace = 5s;
  SourcePager pager(std::move(made));
  for (int i = 0; i < 20'000 && lost == 0; ++i) std::this_thread::sleep_for(1ms);
  {
    const std::lock_guard lock(reports_mutex);
    ASSERT_FALSE(reports.empty());
    EXPECT_EQ(reports.front().front().first, PageNumber{100});
  }
  owner->ask(Op::kDiscard, 100, 1);
  owner->ask(Op::kDiscard, 200, 1);
  await_done();  // the rest is poisoned by now
  EXPECT_EQ(owner->ask(Op::kRead, 100), 0U);
  EXPECT_EQ(owner->ask(Op::kRead, 200), 0U);
  EXPECT_LE(pager.stats().lost, kPages - 102);
}

TEST_P(AttachSourcePager, EndingMakesWhatIsMissingFail) {
  SourcePager pager(config(false));
  EXPECT_EQ(owner->ask(Op::kHash, 0, 10), hash(0, 10));
  pager.end();
  if (kernel_poisons()) {
    EXPECT_EQ(owner->ask(Op::kHash, 0, 10), hash(0, 10));
    owner->tell(Op::kRead, 3000);
  }
  int status = 0;
  EXPECT_EQ(::waitpid(owner->pid(), &status, 0), owner->pid());
  EXPECT_TRUE(WIFSIGNALED(status));
}

// What is there when the first pager begins would count as brought.
TEST_P(AttachSourcePager, TheFirstOneRefusesMemoryThatWasTouched) {
  EXPECT_EQ(owner->ask(Op::kRead, 7), 0U);
  try {
    const SourcePager pager(config(false));
    ADD_FAILURE() << "page 7 would stay zeros";
  } catch (const SystemError& refused) {
    EXPECT_EQ(refused.error(), EEXIST) << refused.what();
    EXPECT_NE(std::string(refused.what()).find("page 7 first"), std::string::npos) << refused.what();
  }
  EXPECT_EQ(owner->ask(Op::kRead, 8), 0U) << "nobody serves it, so nobody waits";
}

TEST_P(AttachSourcePager, MemoryThatIsOnlyReservedCountsAsUntouched) {
  if (!GetParam()) GTEST_SKIP() << "it is a file that is reserved";
  ASSERT_EQ(::fallocate(owner->memory(), 0, 0, static_cast<off_t>(kPages * kPage)), 0);
  const SourcePager pager(config(false));
  EXPECT_EQ(owner->ask(Op::kHash, 100, 1), hash(100, 1));
}

// A pager that died as it finished has let go of the memory already.
TEST_P(AttachSourcePager, ASuccessorOfOneThatWasDone) {
  {
    const SourcePager first(config(true));
    await_done();
  }
  done = false;
  const SourcePager second(config(true));
  await_done();
  EXPECT_EQ(second.stats().found, kPages);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
}

TEST_P(AttachSourcePager, AChildNeverReadsZerosForWhatIsMissing) {
  if (!kernel_poisons()) GTEST_SKIP() << "no UFFDIO_POISON";
  own(UFFD_FEATURE_EVENT_FORK);
  {
    const SourcePager pager(config(false));
    EXPECT_EQ(owner->ask(Op::kHash, 0, 100), hash(0, 100));
    EXPECT_EQ(owner->ask(Op::kFork, 50), 11U);
    EXPECT_EQ(owner->ask(Op::kFork, 500), 0xdeadU);
    EXPECT_EQ(owner->ask(Op::kGrandchild, 50), 11U);
    EXPECT_EQ(owner->ask(Op::kGrandchild, 500), 0xdeadU);
    EXPECT_EQ(owner->ask(Op::kDiscard, 60, 1), 0U);
    EXPECT_EQ(owner->ask(Op::kFork, 60), 10U) << "discarded: zeros, and nobody waits";
    EXPECT_EQ(owner->ask(Op::kGrandchild, 60), 10U);
    EXPECT_EQ(owner->ask(Op::kHash, 500, 1), hash(500, 1));
  }
  const SourcePager second(config(true));
  await_done();
  std::memset(content.data() + 60 * kPage, 0, kPage);
  EXPECT_EQ(owner->ask(Op::kHash, 0, kPages), hash(0, kPages));
  EXPECT_EQ(failed, 0);
}

// By another mapping of the file, say: what else belongs into that page is lost.
TEST_P(AttachSourcePager, APageThatAStrangerHasPopulatedIsTheOwnersEnd) {
  if (!GetParam()) GTEST_SKIP() << "nobody else can";
  const SourcePager pager(config(false));
  const auto process = Process::open(owner->pidfd());
  ASSERT_EQ(::pwrite(owner->memory(), "x", 1, static_cast<off_t>(40 * kPage)), 1);
  owner->tell(Op::kHash, 0, 200);  // in order, so that pages are brought ahead of it
  for (int i = 0; i < 10'000 && process->alive(); ++i) std::this_thread::sleep_for(1ms);
  EXPECT_FALSE(process->alive());
  for (int i = 0; i < 20'000 && failed == 0; ++i) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(failed, 1);
}

TEST_P(AttachSourcePager, WhatIsUnmappedIsMissedByNobody) {
  own(UFFD_FEATURE_EVENT_UNMAP);
  SourcePager pager(config(false));
  EXPECT_EQ(owner->ask(Op::kHash, 0, 10), hash(0, 10));
  EXPECT_EQ(owner->ask(Op::kUnmap, 1000, 2000), 0U);
  for (int i = 0; i < 5000 && pager.stats().settled < 2000; ++i) std::this_thread::sleep_for(1ms);
  EXPECT_GE(pager.stats().settled, 2010U);
  EXPECT_EQ(owner->ask(Op::kHash, 3000, 100), hash(3000, 100));
  EXPECT_EQ(failed, 0);
}

TEST_P(AttachSourcePager, AnOwnerThatDiesWhileItIsServed) {
  SourcePager pager(config(true));
  owner->tell(Op::kHash, 0, kPages);
  std::this_thread::sleep_for(5ms);
  owner->kill();
  pager.leave();
  pager.end();
}

}  // namespace
}  // namespace memferry::test
