// Trackers over the memory of another process.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "owner_process.h"
#include "page/owner_watch.h"
#include "page/page_starts.h"
#include "page/region_reader.h"
#include "track/dirty_tracker.h"
#include "transfer/send_queue.h"

namespace memferry {
namespace {

using Op = OwnerProcess::Op;

const std::uint64_t kAsync =
    abi::kUffdFeatureWpAsync | abi::kUffdFeatureWpUnpopulated | abi::kUffdFeatureWpHugetlbfsShmem;

struct Kind {
  TrackerKind tracker;
  bool shared;
  bool named = false;
};

class AttachTracker : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    if (const TrackerProbe probe = probe_tracker(GetParam().tracker); !probe.available)
      GTEST_SKIP() << probe.name << " does not work here: " << probe.reason << " (needs: " << probe.remedy
                   << ")";
    const auto offered = Userfaultfd::probe().features;
    if (GetParam().tracker == TrackerKind::kUffdWpAsync && (offered & kAsync) != kAsync)
      GTEST_SKIP() << "this kernel has no WP_ASYNC";
    owner_.emplace(options(offered & kAsync));
  }
  static OwnerProcess::Options options(std::uint64_t features) {
    return {.pages = kPages, .shared = GetParam().shared, .named = GetParam().named, .features = features};
  }
  static constexpr std::uint64_t kPages = 2000;
  std::optional<OwnerProcess> owner_;
};
INSTANTIATE_TEST_SUITE_P(
    Kinds, AttachTracker,
    testing::Values(Kind{TrackerKind::kUffdWpAsync, false}, Kind{TrackerKind::kUffdWpAsync, true},
                    Kind{TrackerKind::kUffdWpAsync, true, true}, Kind{TrackerKind::kHashDiff, false},
                    Kind{TrackerKind::kHashDiff, true}, Kind{TrackerKind::kSoftDirty, false}),
    [](const auto& of) {
      std::string name(tracker_name(of.param.tracker));
      std::erase(name, '-');
      return name + (of.param.named ? "Named" : of.param.shared ? "Shared" : "Private");
    });

TEST(AttachTrackerNeeds, PrivateMemoryForSoftDirtyAndOnesOwnForWaitingThreads) {
  const OwnerProcess shared({.pages = 4, .shared = true});
  EXPECT_TRUE(tracker_refusal(TrackerKind::kSoftDirty, *shared.attach()));
  const OwnerProcess owner({.pages = 4});
  EXPECT_FALSE(tracker_refusal(TrackerKind::kSoftDirty, *owner.attach()));
  EXPECT_TRUE(tracker_refusal(TrackerKind::kUffdWp, *owner.attach()));
  EXPECT_TRUE(tracker_refusal(TrackerKind::kUffdWpAsync, *owner.attach()));
  EXPECT_THROW(make_tracker(TrackerKind::kUffdWp, owner.attach())->arm(), SystemError);
}

// A process whose threads write all the time, and know nothing of us. A tracker that loses one write leaves a page that
// differs in the end.
class AttachWriters : public testing::TestWithParam<TrackerKind> {};
INSTANTIATE_TEST_SUITE_P(Kinds, AttachWriters,
                         testing::Values(TrackerKind::kSoftDirty, TrackerKind::kHashDiff),
                         [](const auto& of) {
                           std::string name(tracker_name(of.param));
                           std::erase(name, '-');
                           return name;
                         });

TEST_P(AttachWriters, APreCopyOfThemEndsWithAnEqualCopy) {
  if (const TrackerProbe probe = probe_tracker(GetParam()); !probe.available)
    GTEST_SKIP() << probe.name << " does not work here: " << probe.reason << " (needs: " << probe.remedy
                 << ")";
  constexpr std::uint64_t kPages = 300;
  constexpr int kRounds = 80;
  const std::uint64_t page = system_page_size();
  const Mapping memory = Mapping::anonymous(kPages * page);

  const UniqueFd shared(::memfd_create("stop", MFD_CLOEXEC));
  ASSERT_EQ(::ftruncate(shared.get(), static_cast<off_t>(page)), 0);
  const Mapping stop = Mapping::shared(shared.get(), page);
  auto* const stopped = reinterpret_cast<std::atomic<int>*>(stop.data());
  const pid_t child = ::fork();
  if (child == 0) {
    const auto write = [&](std::uint64_t half) {
      std::mt19937_64 random(half);
      while (stopped->load(std::memory_order_relaxed) == 0)
        memory.data()[random() % kPages * page + half * page / 2 + random() % 4 * 64] =
            std::byte(random() % 3);
      stopped->fetch_add(1);
    };
    std::thread other([&] { write(1); });
    write(0);
    other.join();
    for (;;) ::pause();
  }
  ASSERT_GT(child, 0);
  const UniqueFd pidfd(static_cast<int>(::syscall(SYS_pidfd_open, child, 0U)));
  Region::Attachment attachment;
  attachment.owner = Process::open(pidfd.get());
  attachment.extents = {{OwnerAddress{memory.start().value}, kPages * page}};
  const auto region = Region::attach(std::move(attachment));
  const auto tracker = make_tracker(GetParam(), region);
  std::vector<std::byte> copy(kPages * page);
  RegionReader reader;
  const auto send = [&](std::uint64_t number) {
    reader.reset();
    const auto bytes = reader.read(*region, {PageNumber{number}, 1});
    std::copy(bytes.begin(), bytes.end(), copy.begin() + static_cast<std::ptrdiff_t>(number * page));
    if (tracker->wants_sent()) tracker->sent(PageNumber{number}, xxh3_64(bytes));
  };
  const auto round = [&] {
    AtomicBitmap dirty(kPages);
    tracker->collect(dirty);
    for (std::uint64_t number = 0; number < kPages; ++number) {
      if (dirty.test(PageNumber{number})) send(number);
    }
    return dirty.count();
  };
  tracker->arm();
  for (std::uint64_t number = 0; number < kPages; ++number) send(number);
  for (int i = 0; i < kRounds; ++i) round();
  stopped->store(1);
  while (stopped->load() != 3) std::this_thread::yield();
  round();
  std::vector<std::byte> truth(kPages * page);
  region->owner()->read(region->owner_address(PageNumber{0}), truth);
  EXPECT_EQ(truth, copy);
  EXPECT_EQ(round(), 0U);
  ::kill(child, SIGKILL);
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
}

TEST_P(AttachTracker, FindsWhatTheOwnerWroteAndNothingElse) {
  owner_->ask(Op::kWrite, 0, 500, 1);
  const auto region = owner_->attach();
  const auto tracker = make_tracker(GetParam().tracker, region);
  tracker->arm();
  if (const AtomicBitmap* populated = tracker->populated_when_armed()) {
    EXPECT_EQ(populated->count(), 500U);
  }
  std::mt19937_64 random(7);
  for (std::uint64_t round = 1; round <= 5; ++round) {
    AtomicBitmap expected(kPages);
    for (int i = 0; i < 60; ++i) {
      const PageNumber page{random() % kPages};
      owner_->ask(Op::kWrite, page.value, 1, 1000 * round + page.value);
      expected.set(page);
    }
    AtomicBitmap dirty(kPages);
    EXPECT_EQ(tracker->collect(dirty), expected.count());
    for (std::uint64_t page = 0; page < kPages; ++page) {
      ASSERT_EQ(dirty.test(PageNumber{page}), expected.test(PageNumber{page}))
          << "page " << page << ", round " << round;
    }
  }
}

TEST_P(AttachTracker, WhatItDiscardedCounts) {
  owner_->ask(Op::kWrite, 0, kPages, 1);
  const auto region = owner_->attach();
  const auto tracker = make_tracker(GetParam().tracker, region);
  tracker->arm();
  EXPECT_EQ(owner_->ask(Op::kDiscard, 100, 7), 0U);
  owner_->ask(Op::kWrite, 103, 1, 9);
  AtomicBitmap dirty(kPages);
  tracker->collect(dirty);
  for (std::uint64_t page = 100; page < 107; ++page) EXPECT_TRUE(dirty.test(PageNumber{page})) << page;
  EXPECT_EQ(dirty.count(), 7U);
}

// A hole that is read again is a page of zeros, which write protection takes for the page that was there.
TEST_P(AttachTracker, WhatItDiscardedAndReadAgainCounts) {
  owner_.emplace(options((Userfaultfd::probe().features & kAsync) | UFFD_FEATURE_EVENT_REMOVE));
  owner_->ask(Op::kWrite, 0, kPages, 1);
  const auto region = owner_->attach();
  const auto tracker = make_tracker(GetParam().tracker, region);
  tracker->arm();
  const OwnerWatch watch(region, nullptr);
  EXPECT_EQ(owner_->ask(Op::kDiscard, 100, 7), 0U);
  EXPECT_EQ(owner_->ask(Op::kRead, 102), 0U);
  AtomicBitmap dirty(kPages);
  tracker->collect(dirty);
  for (std::uint64_t page = 100; page < 107; ++page) EXPECT_TRUE(dirty.test(PageNumber{page})) << page;
  EXPECT_EQ(dirty.count(), 7U);
  dirty.clear_run({PageNumber{0}, kPages});
  tracker->collect(dirty);  // perhaps once more
  dirty.clear_run({PageNumber{0}, kPages});
  EXPECT_EQ(tracker->collect(dirty), 0U);
}

// QEMU's way to discard shared memory, which no event tells of, and the guest reads on.
TEST_P(AttachTracker, WhatIsCutOutOfItsFileCounts) {
  if (!GetParam().shared) GTEST_SKIP() << "it has no file";
  const std::uint64_t page_size = system_page_size();
  const auto cut = [&](std::uint64_t first, std::uint64_t count) {
    ASSERT_EQ(::fallocate(owner_->memory(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                          static_cast<off_t>(first * page_size), static_cast<off_t>(count * page_size)),
              0);
  };
  owner_->ask(Op::kWrite, 0, kPages / 2, 1);
  const auto region = owner_->attach();
  const auto tracker = make_tracker(GetParam().tracker, region);
  tracker->arm();
  cut(900, 5);
  EXPECT_EQ(owner_->ask(Op::kRead, 902), 0U);
  std::mt19937_64 random(11);
  for (std::uint64_t round = 1; round <= 20; ++round) {
    AtomicBitmap expected(kPages);
    if (round == 1) expected.set_run({PageNumber{900}, 5});
    // Stores go on, to pages that are there and to new ones: they change the file's times as well.
    for (int i = 0; i < 10; ++i) {
      const PageNumber page{random() % kPages};
      if (page.value % 100 < 5) continue;  // is to be cut
      owner_->ask(Op::kWrite, page.value, 1, 1000 * round + page.value + 1);
      expected.set(page);
    }
    if (round % 3 == 0) {
      const PageNumber page{100 * (random() % 9) + random() % 5};
      owner_->ask(Op::kWrite, page.value, 1, 7);
      AtomicBitmap written(kPages);
      EXPECT_GE(tracker->collect(written), 1U);
      cut(page.value, 1);
      if (round % 2 == 0) {
        EXPECT_EQ(owner_->ask(Op::kRead, page.value), 0U);
      }
      expected.set(page);
      for (PageNumber each{0}; each.value < kPages; ++each.value) {
        if (written.test(each) && each.value != page.value) expected.clear(each);
      }
    }
    AtomicBitmap dirty(kPages);
    tracker->collect(dirty);
    for (PageNumber page{0}; page.value < kPages; ++page.value) {
      ASSERT_EQ(dirty.test(page), expected.test(page)) << "page " << page.value << ", round " << round;
    }
  }
}

TEST_P(AttachTracker, MemoryThatWasUnmappedOrMovedIsAnError) {
  owner_->ask(Op::kWrite, 0, kPages, 1);
  const auto region = owner_->attach();
  const auto tracker = make_tracker(GetParam().tracker, region);
  tracker->arm();
  AtomicBitmap dirty(kPages);
  EXPECT_EQ(tracker->collect(dirty), 0U);
  owner_->ask(GetParam().shared ? Op::kUnmap : Op::kRemap, 40, 2);
  // Of shared memory hash-diff looks at the file, which has not changed.
  EXPECT_THROW(tracker->collect(dirty), SystemError);
}

TEST_P(AttachTracker, ADeadOwnerIsNeverNothingWritten) {
  owner_->ask(Op::kWrite, 0, kPages, 1);
  const auto region = owner_->attach();
  const auto tracker = make_tracker(GetParam().tracker, region);
  tracker->arm();
  owner_->kill();
  AtomicBitmap dirty(kPages);
  EXPECT_THROW(tracker->collect(dirty), OwnerGone);
  tracker->disarm();
}

TEST_P(AttachTracker, ArmsAgainAndLetsGo) {
  owner_->ask(Op::kWrite, 0, 100, 1);
  const auto region = owner_->attach();
  for (int twice = 0; twice < 2; ++twice) {
    const auto tracker = make_tracker(GetParam().tracker, region);
    tracker->arm();
    owner_->ask(Op::kWrite, 5, 1, 100 + static_cast<std::uint64_t>(twice));
    AtomicBitmap dirty(kPages);
    EXPECT_EQ(tracker->collect(dirty), 1U);
    tracker->disarm();
  }
  EXPECT_EQ(owner_->ask(Op::kRead, 5), 101U);
}

TEST(AttachTrackerNeeds, AUserfaultfdWithAsynchronousWriteProtection) {
  const OwnerProcess none({.pages = 4, .hidden_uffd = true});
  EXPECT_THROW(make_tracker(TrackerKind::kUffdWpAsync, none.attach())->arm(), SystemError);
  const OwnerProcess lacking({.pages = 4});
  EXPECT_THROW(make_tracker(TrackerKind::kUffdWpAsync, lacking.attach())->arm(), SystemError);
}

void expect_refused(std::vector<std::shared_ptr<Region>> regions, int error, const std::string& words) {
  try {
    const SendQueue queue(std::move(regions));
    ADD_FAILURE() << "it would be sent";
  } catch (const SystemError& refused) {
    EXPECT_EQ(refused.error(), error) << refused.what();
    EXPECT_NE(std::string(refused.what()).find(words), std::string::npos) << refused.what();
  }
}

// What somebody else has the owner's faults for is not there yet, and looks like zeros.
class AttachPagedElsewhere : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Kinds, AttachPagedElsewhere, testing::Bool(),
                         [](const auto& of) { return of.param ? "Shared" : "Private"; });

TEST_P(AttachPagedElsewhere, MayNeitherBeTrackedNorSent) {
  const auto offered = Userfaultfd::probe().features;
  if ((offered & kAsync) != kAsync) GTEST_SKIP() << "this kernel has no WP_ASYNC";
  OwnerProcess owner({.pages = 16, .shared = GetParam(), .features = kAsync});
  owner.ask(Op::kWrite, 0, 8, 1);
  const auto region = owner.attach();
  Userfaultfd pager = Userfaultfd::adopt(owner.uffd(), 0);
  pager.register_missing(owner.address(), owner.bytes());
  EXPECT_THROW(make_tracker(TrackerKind::kUffdWpAsync, region)->arm(), SystemError);
  expect_refused({region}, EBUSY, "pages 8-15 (8 of 16)");
  // And it is the pager's still.
  owner.tell(Op::kRead, 9);
  EXPECT_FALSE(owner.reply(100));
  (void)pager.zeropage(owner.address().plus(9 * system_page_size()), system_page_size(), true);
  EXPECT_EQ(owner.reply(), 0U);
  (void)pager.unregister(owner.address(), owner.bytes());
  make_tracker(TrackerKind::kUffdWpAsync, region)->arm();
  EXPECT_NO_THROW(SendQueue({region}));
}

// A pager that has brought everything may have left it registered: nothing is missing.
TEST_P(AttachPagedElsewhere, ButAllOfItThereMayBeSent) {
  const auto offered = Userfaultfd::probe().features;
  if ((offered & kAsync) != kAsync) GTEST_SKIP() << "this kernel has no WP_ASYNC";
  OwnerProcess owner({.pages = 16, .shared = GetParam(), .features = kAsync});
  owner.ask(Op::kWrite, 0, 15, 1);
  owner.ask(Op::kRead, 15);
  const auto region = owner.attach();
  Userfaultfd pager = Userfaultfd::adopt(owner.uffd(), 0);
  pager.register_missing_and_wp(owner.address(), owner.bytes());
  EXPECT_NO_THROW(SendQueue({region}));
  const auto tracker = make_tracker(TrackerKind::kUffdWpAsync, region);
  tracker->arm();
  // Nobody serves it any more, and nobody waits.
  EXPECT_EQ(owner.ask(Op::kDiscard, 3, 1), 0U);
  EXPECT_EQ(owner.ask(Op::kRead, 3), 0U);
}

// A mark of write protection where there is no page looks swapped out.
TEST_P(AttachPagedElsewhere, MarksOfWriteProtectionAreNoPages) {
  const auto offered = Userfaultfd::probe().features;
  if ((offered & kAsync) != kAsync) GTEST_SKIP() << "this kernel has no WP_ASYNC";
  OwnerProcess owner({.pages = 16, .shared = GetParam(), .features = kAsync});
  owner.ask(Op::kWrite, 0, 8, 1);
  const auto region = owner.attach();
  Userfaultfd pager = Userfaultfd::adopt(owner.uffd(), 0);
  pager.register_missing_and_wp(owner.address(), owner.bytes());
  (void)pager.write_protect(owner.address(), owner.bytes(), true);
  expect_refused({region}, EBUSY, "pages 8-15");
  (void)pager.unregister(owner.address(), owner.bytes());
  pager.register_wp(owner.address(), owner.bytes());
  (void)pager.write_protect(owner.address(), owner.bytes(), true);
  EXPECT_NO_THROW(SendQueue({region})) << "marks are no lost pages";
}

// What was lost fails at its owner's, and is a hole in the file for everybody else.
TEST(AttachLost, PagesOfAFileAreNotSentAsZeros) {
  if ((Userfaultfd::probe().features & abi::kUffdFeaturePoison) == 0) GTEST_SKIP() << "no UFFDIO_POISON";
  OwnerProcess owner({.pages = 16, .shared = true, .features = UFFD_FEATURE_MISSING_SHMEM});
  owner.ask(Op::kWrite, 0, 4, 1);
  const auto region = owner.attach();
  EXPECT_NO_THROW(SendQueue({region}));
  Userfaultfd pager = Userfaultfd::adopt(owner.uffd(), 0);
  pager.register_missing(owner.address(), owner.bytes());
  (void)pager.poison(owner.address().plus(9 * system_page_size()), 2 * system_page_size(), true);
  (void)pager.poison(owner.address().plus(12 * system_page_size()), system_page_size(), true);
  (void)pager.unregister(owner.address(), owner.bytes());
  expect_refused({region}, EIO, "9-10, 12 (3 of 16)");
}

// Each event of a userfaultfd goes to one reader: of all processes one has it attached.
TEST(AttachEvents, OneProcessHasItAttached) {
  OwnerProcess owner({.pages = 8});
  const auto attach_elsewhere = [&](bool stay) {
    const pid_t pid = ::fork();
    if (pid != 0) return pid;
    try {
      const auto region = owner.attach();
      if (stay) ::raise(SIGSTOP);
      ::_exit(0);
    } catch (const SystemError& error) {
      ::_exit(error.error() == EBUSY ? 1 : 2);
    }
  };
  const auto exit_of = [](pid_t pid) {
    int status = 0;
    ::waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  };
  EXPECT_EQ(exit_of(attach_elsewhere(false)), 0);
  {
    const auto region = owner.attach();
    EXPECT_EQ(exit_of(attach_elsewhere(false)), 1);
    EXPECT_NO_THROW((void)owner.attach());  // by one reader, here
    region->retire();
    EXPECT_EQ(exit_of(attach_elsewhere(false)), 0) << "it is not used here any more";
    EXPECT_FALSE(region->begin_events());
  }
  const pid_t holder = attach_elsewhere(true);
  int status = 0;
  ASSERT_EQ(::waitpid(holder, &status, WUNTRACED), holder);
  EXPECT_THROW((void)owner.attach(), SystemError);
  ::kill(holder, SIGKILL);
  (void)exit_of(holder);
  EXPECT_NO_THROW((void)owner.attach());
}

// A second reader of a userfaultfd leaves nobody waiting: a fault that it has read is raised again.
TEST(AttachEvents, AFaultThatWasDrainedIsRaisedAgain) {
  OwnerProcess owner({.pages = 8, .features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_FORK});
  const auto region = owner.attach();
  Userfaultfd pager = Userfaultfd::adopt(owner.uffd(), 0);
  pager.register_missing(owner.address(), owner.bytes());
  owner.tell(Op::kRead, 3);
  pollfd look{pager.fd(), POLLIN, 0};
  ASSERT_EQ(::poll(&look, 1, 10'000), 1);
  EXPECT_FALSE(region->drain_events());
  ASSERT_EQ(::poll(&look, 1, 10'000), 1) << "the fault is lost";
  uffd_msg event{};
  ASSERT_EQ(pager.read_events({&event, 1}), 1U);
  EXPECT_EQ(event.event, UFFD_EVENT_PAGEFAULT);
  (void)pager.zeropage(owner.address().plus(3 * system_page_size()), system_page_size(), true);
  EXPECT_EQ(owner.reply(), 0U);
}

// A child of an owner that somebody pages never reads zeros for what has not come.
TEST(AttachEvents, AChildThatIsDrainedNeverReadsZeros) {
  if ((Userfaultfd::probe().features & abi::kUffdFeaturePoison) == 0) GTEST_SKIP() << "no UFFDIO_POISON";
  OwnerProcess owner({.pages = 8, .features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_FORK});
  const auto region = owner.attach();
  EXPECT_TRUE(region->drain_events());  // nothing was missing then: no pager is waited for
  Userfaultfd pager = Userfaultfd::adopt(owner.uffd(), 0);
  pager.register_missing(owner.address(), owner.bytes());
  const OwnerWatch watch(region, nullptr);
  EXPECT_EQ(owner.ask(Op::kFork, 3), 0xdeadU);
}

TEST(AttachEvents, TwoRegionsOfOneUserfaultfdHaveOneReader) {
  OwnerProcess owner({.pages = 8, .features = UFFD_FEATURE_EVENT_REMOVE});
  Region::Attachment low = owner.attachment();
  Region::Attachment high = owner.attachment();
  const std::uint64_t half = owner.bytes() / 2;
  low.extents = {{owner.address(), half}};
  high.extents = {{owner.address().plus(half), half}};
  const auto first = Region::attach(std::move(low));
  const auto second = Region::attach(std::move(high));
  const auto again = owner.attach();
  EXPECT_TRUE(first->begin_events());
  EXPECT_FALSE(second->drain_events());
  EXPECT_FALSE(again->begin_events());  // the same memory
  EXPECT_TRUE(second->begin_events());  // the same reader's
  first->end_events(Region::Missing::kNone);
  EXPECT_FALSE(again->drain_events());
  second->end_events(Region::Missing::kNone);
  // What one has read is told to whom it concerns.
  pollfd look{owner.uffd(), POLLIN, 0};
  Userfaultfd::adopt(owner.uffd(), 0).register_wp(owner.address(), owner.bytes());
  owner.tell(Op::kDiscard, 5, 2);
  ASSERT_EQ(::poll(&look, 1, 10'000), 1);
  EXPECT_TRUE(first->drain_events());
  EXPECT_EQ(owner.reply(), 0U);
  AtomicBitmap removed(4);
  second->take_removed(removed);
  EXPECT_EQ(removed.count(), 2U);
  EXPECT_TRUE(removed.test(PageNumber{1}));
}

// Pages that may be zeros, told by how they begin, wherever the memory has to be copied to be read.
TEST(AttachMemory, PagesThatBeginWithZerosAreTold) {
  constexpr std::uint64_t kPages = PageStarts::kAtOnce;
  for (const bool shared : {false, true}) {
    OwnerProcess owner({.pages = kPages, .shared = shared});
    owner.ask(Op::kWrite, 0, kPages, 5);
    EXPECT_EQ(owner.ask(Op::kDiscard, 3, 2), 0U);
    EXPECT_EQ(owner.ask(Op::kDiscard, kPages - 1, 1), 0U);
    const auto region = owner.attach();
    PageStarts starts;
    std::vector<std::uint64_t> found;
    const auto note = [&](PageNumber page) { found.push_back(page.value); };
    starts.visit_zero(*region, {PageNumber{0}, kPages}, note);
    EXPECT_EQ(found, (std::vector<std::uint64_t>{3, 4, kPages - 1}));
    found.clear();
    starts.visit_zero(*region, {PageNumber{4}, 3}, note);
    EXPECT_EQ(found, std::vector<std::uint64_t>{4});
    // What cannot be read is left to who reads it whole.
    owner.ask(Op::kUnmap, 6, 2);
    found.clear();
    starts.visit_zero(*region, {PageNumber{0}, 10}, note);
    EXPECT_EQ(found, (std::vector<std::uint64_t>{3, 4, 6, 7}));
    owner.kill();
    EXPECT_THROW(starts.visit_zero(*region, {PageNumber{0}, 10}, note), OwnerGone);
  }
}

// A file that its owner cuts off is an error for who reads it, and no SIGBUS.
TEST(AttachMemory, AFileThatBecomesShorterIsAnError) {
  OwnerProcess owner({.pages = 8, .shared = true});
  owner.ask(Op::kWrite, 0, 8, 5);
  const auto region = owner.attach();
  RegionReader reader;
  EXPECT_EQ(reader.read(*region, {PageNumber{6}, 2})[0], std::byte{11});
  ASSERT_EQ(::ftruncate(owner.memory(), static_cast<off_t>(4 * system_page_size())), 0);
  EXPECT_THROW(reader.read(*region, {PageNumber{6}, 2}), SystemError);
  EXPECT_EQ(reader.read(*region, {PageNumber{1}, 1})[0], std::byte{6});
}

}  // namespace
}  // namespace memferry
