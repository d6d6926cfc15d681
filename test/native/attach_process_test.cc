// Another process by pidfd, its memory and its userfaultfd: what is refused, what ends with it, what is read of it.
#include <gtest/gtest.h>

#include <sched.h>
#include <sys/eventfd.h>
#include <sys/ptrace.h>

#include <array>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "os/process_maps.h"
#include "owner_process.h"
#include "page/contents.h"
#include "page/owner_watch.h"
#include "page/region_reader.h"

namespace memferry {
namespace {

using Op = OwnerProcess::Op;
const std::uint64_t kPage = system_page_size();

void await_end(const Process& process) {
  for (int i = 0; i < 20'000 && process.alive(); ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

TEST(AttachProcess, DescriptorsThatAreSomethingElse) {
  const UniqueFd event(::eventfd(0, EFD_CLOEXEC));
  const OwnerProcess owner({.pages = 1});
  EXPECT_THROW((void)Process::open(event.get()), SystemError);
  EXPECT_THROW((void)Process::open(12345), SystemError);
  EXPECT_THROW((void)Process::open(owner.uffd()), SystemError);
  EXPECT_THROW((void)Userfaultfd::adopt(event.get(), 0), SystemError);
  EXPECT_THROW((void)Userfaultfd::adopt(owner.pidfd(), 0), SystemError);
  EXPECT_THROW((void)Userfaultfd::adopt(-1, 0), SystemError);
  EXPECT_EQ(Process::open(owner.pidfd())->pid(), owner.pid());
}

TEST(AttachProcess, FeaturesOfAUserfaultfdAreThoseThatItsMakerAskedFor) {
  const OwnerProcess asked({.pages = 1, .features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_MISSING_SHMEM});
  const Userfaultfd theirs = Userfaultfd::adopt(asked.uffd(), UFFD_FEATURE_EVENT_FORK);
  EXPECT_EQ(theirs.enabled(), UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_MISSING_SHMEM);
  EXPECT_TRUE(theirs.adopted());
  const OwnerProcess left({.pages = 1, .api = false});
  const Userfaultfd ours = Userfaultfd::adopt(left.uffd(), UFFD_FEATURE_MISSING_SHMEM);
  EXPECT_EQ(ours.enabled(), UFFD_FEATURE_MISSING_SHMEM);
  EXPECT_EQ(Userfaultfd::adopt(left.uffd(), 0).enabled(), UFFD_FEATURE_MISSING_SHMEM);
}

TEST(AttachProcess, MappingsThatAreNotSo) {
  OwnerProcess owner({.pages = 8, .shared = true});
  const auto with = [&](auto change) {
    Region::Attachment attachment = owner.attachment();
    change(attachment);
    return Region::attach(std::move(attachment));
  };
  EXPECT_NE(with([](auto&) {}), nullptr);
  EXPECT_THROW(with([](auto& a) { a.extents.clear(), a.offsets.clear(); }), std::invalid_argument);
  EXPECT_THROW(with([](auto& a) { a.extents[0].bytes += 100; }), std::invalid_argument);
  EXPECT_THROW(with([](auto& a) { a.extents[0].bytes = 0; }), std::invalid_argument);
  EXPECT_THROW(with([](auto& a) { a.extents[0].start = a.extents[0].start.plus(1); }), std::invalid_argument);
  EXPECT_THROW(with([](auto& a) { a.extents[0].bytes += kPage; }), std::invalid_argument);  // beyond the file
  EXPECT_THROW(with([](auto& a) { a.offsets[0] = 1; }), std::invalid_argument);
  EXPECT_THROW(with([](auto& a) { a.offsets[0] = ~std::uint64_t{0} - kPage + 1; }), std::invalid_argument);
  EXPECT_THROW(with([](auto& a) { a.offsets.clear(); }), std::invalid_argument);
  EXPECT_THROW(with([](auto& a) {
                 a.extents.push_back(a.extents[0]);
                 a.offsets.push_back(0);
               }),
               std::invalid_argument);
  // Another place of the file than what is mapped there, no file at all, another file.
  EXPECT_THROW(with([](auto& a) {
                 a.extents[0].bytes -= kPage;
                 a.offsets[0] = kPage;
               }),
               SystemError);
  EXPECT_THROW(with([](auto& a) { a.memory.reset(); }), SystemError);
  EXPECT_THROW(with([&](auto& a) {
                 a.memory.reset(::memfd_create("other", MFD_CLOEXEC));
                 ASSERT_EQ(::ftruncate(a.memory.get(), static_cast<off_t>(owner.bytes())), 0);
               }),
               SystemError);
  EXPECT_THROW(with([&](auto& a) { a.memory.reset(::eventfd(0, EFD_CLOEXEC)); }), std::invalid_argument);
  owner.ask(Op::kUnmap, 3, 1);
  EXPECT_THROW((void)owner.attach(), SystemError);
}

TEST(AttachProcess, OneThatHasEnded) {
  OwnerProcess owner({.pages = 2});
  const auto before = owner.attach();
  owner.kill();
  EXPECT_THROW((void)Process::open(owner.pidfd()), OwnerGone);
  EXPECT_EQ(before->owner()->life(), Process::Life::kEnded);
  RegionReader reader;
  EXPECT_THROW((void)reader.read(*before, {PageNumber{0}, 1}), OwnerGone);
  EXPECT_THROW(before->check_attached("test"), OwnerGone);
  EXPECT_THROW(Contents().visit(*before, {PageNumber{0}, 2}, [](PageRun) {}), OwnerGone);
}

// A pid that goes to somebody else: whoever has it, nothing of it is read for the one that is meant.
TEST(AttachProcess, APidThatWasReused) {
  std::optional<OwnerProcess> owner(std::in_place, OwnerProcess::Options{.pages = 2});
  owner->ask(Op::kWrite, 0, 2, 7);
  const auto region = owner->attach();
  const pid_t pid = owner->pid();
  owner->kill();
  // The next pid that the kernel gives is settable where this is root's to write.
  const UniqueFd last(::open("/proc/sys/kernel/ns_last_pid", O_WRONLY | O_CLOEXEC));
  pid_t again = 0;
  for (int tries = 0; tries < 100 && again != pid; ++tries) {
    const std::string text = std::to_string(pid - 1);
    if (!last || ::write(last.get(), text.data(), text.size()) < 0) GTEST_SKIP() << "no ns_last_pid here";
    again = ::fork();
    if (again == 0) {
      ::pause();
      ::_exit(0);
    }
    if (again == pid) break;
    ::kill(again, SIGKILL);
    ::waitpid(again, nullptr, 0);
  }
  if (again != pid) GTEST_SKIP() << "the pid went to somebody else";
  EXPECT_EQ(region->owner()->life(), Process::Life::kEnded);
  EXPECT_THROW((void)region->owner()->open_file("maps", O_RDONLY), OwnerGone);
  std::vector<std::byte> bytes(kPage);
  EXPECT_THROW(region->owner()->read(region->owner_address(PageNumber{0}), bytes), OwnerGone);
  region->owner()->end();  // nobody
  EXPECT_EQ(::kill(pid, 0), 0);
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
}

TEST(AttachProcess, OneThatRunsAnotherProgram) {
  OwnerProcess owner({.pages = 2});
  owner.ask(Op::kWrite, 0, 2, 7);
  const auto region = owner.attach();
  owner.tell(Op::kExec);
  await_end(*region->owner());
  EXPECT_EQ(region->owner()->life(), Process::Life::kReplaced);
  RegionReader reader;
  EXPECT_THROW((void)reader.read(*region, {PageNumber{0}, 1}), OwnerGone);
  try {
    region->check_attached("test");
    FAIL();
  } catch (const OwnerGone& error) {
    EXPECT_NE(std::string(error.what()).find("another program"), std::string::npos) << error.what();
  }
}

std::string first_word(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

// The thread of this folder in /proc (a process's own: its first one) has let go of the memory: it ended, whatever
// the others do.
bool await_no_memory(const std::string& folder) {
  for (int i = 0; i < 10'000; ++i) {
    // A thread that is no more has none.
    if (const std::string pages = first_word(folder + "/statm"); pages == "0" || pages.empty()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

// Between letting go of its memory and the word of its pidfd a process can take long, and the memory may be held by
// others all the while: by whoever reads it just then. Here a reader waits for a page that is missing; and the process
// is the first of a pid namespace, which ends only when all others there were waited for.
TEST(AttachProcess, OneThatIsEndingWhileItsMemoryIsHeld) {
  const UniqueFd own_ids(::open("/proc/self/ns/pid_for_children", O_RDONLY | O_CLOEXEC));
  if (::unshare(CLONE_NEWPID) != 0) GTEST_SKIP() << "no pid namespaces here";
  OwnerProcess owner({.pages = 1});
  ASSERT_EQ(::setns(own_ids.get(), CLONE_NEWPID), 0);
  owner.ask(Op::kIdleChild);
  const std::string pid = std::to_string(owner.pid());
  const pid_t child = std::stoi(first_word("/proc/" + pid + "/task/" + pid + "/children"));
  // It stays, ended, until it was waited for here.
  ASSERT_EQ(::ptrace(PTRACE_SEIZE, child, nullptr, nullptr), 0);
  const auto process = Process::open(owner.pidfd());
  Userfaultfd uffd = Userfaultfd::adopt(owner.uffd(), 0);
  uffd.register_missing(owner.address(), owner.bytes());
  std::thread reader([&] {
    std::array<std::byte, 1> byte{};
    EXPECT_THROW(process->read(owner.address(), byte), OwnerGone);
  });
  pollfd faulted{owner.uffd(), POLLIN, 0};
  EXPECT_EQ(::poll(&faulted, 1, 10'000), 1);
  EXPECT_TRUE(process->alive());
  EXPECT_EQ(::kill(owner.pid(), SIGKILL), 0);
  // Each of its threads lets go by itself, and a sanitizer adds one.
  for (const auto& task : std::filesystem::directory_iterator("/proc/" + pid + "/task"))
    EXPECT_TRUE(await_no_memory(task.path()));
  pollfd ended{owner.pidfd(), POLLIN, 0};
  EXPECT_EQ(::poll(&ended, 1, 0), 0);

  EXPECT_EQ(process->life(), Process::Life::kEnded);
  EXPECT_THROW((void)process->open_file("maps", O_RDONLY), OwnerGone);
  EXPECT_THROW(for_each_mapped_area([](const MappedArea&) { return true; }, process.get()), OwnerGone);
  EXPECT_THROW((void)Process::open(owner.pidfd()), OwnerGone);

  uffd.zeropage(owner.address(), owner.bytes(), true);
  reader.join();
  EXPECT_EQ(::waitpid(child, nullptr, __WALL), child);
}

TEST(AttachProcess, OneWhoseFirstThreadHasEndedLives) {
  static std::array<std::byte, 64> told;
  told.fill(std::byte{42});
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    told.fill(std::byte{43});
    std::thread([] {
      for (;;) ::pause();
    }).detach();
    (void)::syscall(SYS_exit, 0);
  }
  const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0U)));
  EXPECT_TRUE(await_no_memory("/proc/" + std::to_string(pid)));
  const auto process = Process::open(pidfd.get());
  EXPECT_EQ(process->life(), Process::Life::kAlive);
  const OwnerAddress at{reinterpret_cast<std::uintptr_t>(told.data())};
  EXPECT_EQ(mapped_extent(at, told.size(), process.get()), told.size());
  std::array<std::byte, 64> bytes{};
  process->read(at, bytes);
  EXPECT_EQ(bytes[0], std::byte{43});
  EXPECT_EQ(bytes[63], std::byte{43});
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
  EXPECT_EQ(process->life(), Process::Life::kEnded);
}

class AttachKinds : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Memory, AttachKinds, testing::Bool(),
                         [](const auto& of) { return of.param ? "Shared" : "Private"; });

TEST_P(AttachKinds, BytesAreReadAsTheOwnerHasThem) {
  OwnerProcess owner({.pages = 700, .shared = GetParam()});
  owner.ask(Op::kWrite, 100, 300, 5000);
  const auto region = owner.attach();
  EXPECT_EQ(region->remote(), !GetParam());
  EXPECT_EQ(region->pages(), 700U);
  RegionReader reader;
  const auto bytes = reader.read(*region, {PageNumber{90}, 400});
  ASSERT_EQ(bytes.size(), 400 * kPage);
  for (std::uint64_t page = 90; page < 490; ++page) {
    std::uint64_t value = 0;
    std::memcpy(&value, bytes.data() + (page - 90) * kPage, sizeof value);
    ASSERT_EQ(value, page >= 100 && page < 400 ? 5000 + page - 100 : 0) << page;
  }
  EXPECT_EQ(xxh3_64(bytes), owner.ask(Op::kHash, 90, 400));
  EXPECT_EQ(region->page_at(owner.address().plus(3 * kPage + 17)), PageNumber{3});
  EXPECT_EQ(region->page_at(owner.address().plus(700 * kPage)), std::nullopt);
}

TEST_P(AttachKinds, WhatWasNeverTouchedIsKnownWithoutTouchingIt) {
  OwnerProcess owner({.pages = 256, .shared = GetParam()});
  owner.ask(Op::kWrite, 10, 5, 1);
  owner.ask(Op::kWrite, 200, 56, 1);
  const auto region = owner.attach();
  std::vector<PageRun> runs;
  Contents contents;
  for (int twice = 0; twice < 2; ++twice) {
    runs.clear();
    contents.visit(*region, {PageNumber{0}, 256}, [&](PageRun run) { runs.push_back(run); });
    ASSERT_EQ(runs.size(), 2U);
    EXPECT_EQ(runs[0], (PageRun{PageNumber{10}, 5}));
    EXPECT_EQ(runs[1], (PageRun{PageNumber{200}, 56}));
  }
  runs.clear();
  contents.visit(*region, {PageNumber{12}, 190}, [&](PageRun run) { runs.push_back(run); });
  ASSERT_EQ(runs.size(), 2U);
  EXPECT_EQ(runs[0], (PageRun{PageNumber{12}, 3}));
  EXPECT_EQ(runs[1], (PageRun{PageNumber{200}, 2}));
}

TEST_P(AttachKinds, ItsDeathIsNoticedAtOnce) {
  OwnerProcess owner({.pages = 4, .shared = GetParam()});
  const auto region = owner.attach();
  std::atomic<bool> stopped{false};
  std::atomic<bool> told{false};
  const auto user = region->enlist([&] { stopped = true; });
  // Only its pidfd can tell.
  const OwnerWatch watch(
      region,
      [&](const std::string& message) {
        EXPECT_NE(message.find("has ended"), std::string::npos) << message;
        told = true;
      },
      std::chrono::hours(1));
  ::kill(owner.pid(), SIGKILL);
  for (int i = 0; i < 10'000 && !told; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(told);
  EXPECT_TRUE(stopped);
  EXPECT_TRUE(region->retired());
}

TEST_P(AttachKinds, SoIsAnExec) {
  OwnerProcess owner({.pages = 4, .shared = GetParam()});
  const auto region = owner.attach();
  std::atomic<bool> told{false};
  const OwnerWatch watch(region, [&](const std::string& message) {
    EXPECT_NE(message.find("another program"), std::string::npos) << message;
    told = true;
  });
  owner.tell(Op::kExec);
  for (int i = 0; i < 10'000 && !told; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(told);
  EXPECT_TRUE(region->retired());
}

// With nobody else to read the events of its userfaultfd, its madvise() would wait for ever.
TEST(AttachProcess, ItsSystemCallsGoOnWhileNobodyPages) {
  OwnerProcess owner({.pages = 8, .features = UFFD_FEATURE_EVENT_REMOVE});
  owner.ask(Op::kWrite, 0, 8, 1);
  const auto region = owner.attach();
  region->uffd()->register_wp(owner.address(), owner.bytes());
  const OwnerWatch watch(region, nullptr);
  owner.tell(Op::kDiscard, 2, 2);
  EXPECT_EQ(owner.reply(), 0U);
  EXPECT_EQ(owner.ask(Op::kRead, 2), 0U);
}

}  // namespace
}  // namespace memferry
