// Trackers over the memory of another process.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "owner_process.h"
#include "track/dirty_tracker.h"

namespace memferry {
namespace {

using Op = OwnerProcess::Op;

const std::uint64_t kAsync =
    abi::kUffdFeatureWpAsync | abi::kUffdFeatureWpUnpopulated | abi::kUffdFeatureWpHugetlbfsShmem;

struct Kind {
  TrackerKind tracker;
  bool shared;
};

class AttachTracker : public testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    const auto offered = Userfaultfd::probe().features;
    if (GetParam().tracker == TrackerKind::kUffdWpAsync && (offered & kAsync) != kAsync)
      GTEST_SKIP() << "this kernel has no WP_ASYNC";
    owner_.emplace(
        OwnerProcess::Options{.pages = kPages, .shared = GetParam().shared, .features = offered & kAsync});
  }
  static constexpr std::uint64_t kPages = 2000;
  std::optional<OwnerProcess> owner_;
};
INSTANTIATE_TEST_SUITE_P(
    Kinds, AttachTracker,
    testing::Values(Kind{TrackerKind::kUffdWpAsync, false}, Kind{TrackerKind::kUffdWpAsync, true},
                    Kind{TrackerKind::kHashDiff, false}, Kind{TrackerKind::kHashDiff, true}),
    [](const auto& of) {
      return std::string(of.param.tracker == TrackerKind::kHashDiff ? "HashDiff" : "UffdWpAsync") +
             (of.param.shared ? "Shared" : "Private");
    });

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

TEST_P(AttachTracker, MemoryThatWasUnmappedOrMovedIsAnError) {
  owner_->ask(Op::kWrite, 0, kPages, 1);
  const auto region = owner_->attach();
  const auto tracker = make_tracker(GetParam().tracker, region);
  tracker->arm();
  AtomicBitmap dirty(kPages);
  EXPECT_EQ(tracker->collect(dirty), 0U);
  owner_->ask(GetParam().shared ? Op::kUnmap : Op::kRemap, 40, 2);
  if (GetParam().tracker == TrackerKind::kHashDiff && GetParam().shared) {
    EXPECT_EQ(tracker->collect(dirty), 0U);  // it looks at the file, which has not changed
  } else {
    EXPECT_THROW(tracker->collect(dirty), SystemError);
  }
}

TEST_P(AttachTracker, ADeadOwnerIsNeverNothingWritten) {
  owner_->ask(Op::kWrite, 0, kPages, 1);
  const auto region = owner_->attach();
  const auto tracker = make_tracker(GetParam().tracker, region);
  tracker->arm();
  owner_->kill();
  AtomicBitmap dirty(kPages);
  if (GetParam().tracker == TrackerKind::kHashDiff && GetParam().shared) return;  // the file outlives it
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

}  // namespace
}  // namespace memferry
