// The parts of fault handling that need no fault: windows, histogram, the list of who waits, discarding.
#include <gtest/gtest.h>

#include <sys/mman.h>
#include <algorithm>
#include <cstring>
#include <random>

#include "fault/discard.h"
#include "fault/latency_histogram.h"
#include "fault/sequential_detector.h"
#include "fault/waiting_faults.h"
#include "os/mapping.h"

namespace memferry {
namespace {

TEST(SequentialDetector, WindowsGrowWhileTheFaultsWalkForward) {
  SequentialDetector detector;
  std::uint64_t page = 100;
  for (const std::uint64_t window : {1U, 8U, 16U, 32U, 32U, 32U}) {
    const auto advice = detector.fault(0, PageNumber{page});
    EXPECT_EQ(advice.pages, window);
    EXPECT_FALSE(advice.expected);
    page += advice.pages;
  }
}

TEST(SequentialDetector, AWalkOverHolesStillGrows) {
  SequentialDetector detector;
  EXPECT_EQ(detector.fault(0, PageNumber{0}, 20).pages, 1U);
  EXPECT_EQ(detector.fault(0, PageNumber{1}, 5).pages, 5U);  // 6 is here already
  const auto behind = detector.fault(0, PageNumber{7}, 40);
  EXPECT_EQ(behind.pages, 16U);
  EXPECT_FALSE(behind.expected);
}

TEST(SequentialDetector, RandomFaultsAskForOnePage) {
  SequentialDetector detector;
  std::mt19937_64 random(1);
  int windows = 0;
  for (int i = 0; i < 10000; ++i)
    windows += detector.fault(0, PageNumber{random() % (1 << 20)}).pages > 1 ? 1 : 0;
  EXPECT_LT(windows, 10);
}

TEST(SequentialDetector, SeveralWalksAndRegions) {
  SequentialDetector detector;
  for (std::uint32_t region = 0; region < 2; ++region) {
    for (std::uint64_t walk = 0; walk < 3; ++walk)
      EXPECT_EQ(detector.fault(region, PageNumber{walk * 10000}).pages, 1U);
  }
  for (std::uint32_t region = 0; region < 2; ++region) {
    for (std::uint64_t walk = 0; walk < 3; ++walk)
      EXPECT_EQ(detector.fault(region, PageNumber{walk * 10000 + 1}).pages, 8U);
  }
  EXPECT_TRUE(detector.fault(1, PageNumber{4}).expected);   // inside the window 1..8
  EXPECT_FALSE(detector.fault(1, PageNumber{9}).expected);  // behind it
}

TEST(SequentialDetector, AWalkIsSureFromItsThirdFaultOn) {
  SequentialDetector detector;
  EXPECT_FALSE(detector.fault(0, PageNumber{100}).walks);
  const auto second = detector.fault(0, PageNumber{101});
  EXPECT_FALSE(second.walks || second.sure);
  EXPECT_FALSE(detector.fault(0, PageNumber{103}).walks);  // expected, and no further than before
  const auto third = detector.fault(0, PageNumber{109});
  EXPECT_TRUE(third.walks && third.sure);
  EXPECT_TRUE(detector.fault(0, PageNumber{111}).walks);
  const auto fourth = detector.fault(0, PageNumber{125});
  EXPECT_TRUE(fourth.walks);
  EXPECT_FALSE(fourth.sure);  // once
}

TEST(SequentialDetector, WhatIsHereIsSkippedAndNothingElse) {
  constexpr std::uint64_t lacking = SequentialDetector::kLargestWindow;
  SequentialDetector detector;
  (void)detector.fault(0, PageNumber{0});
  // Two may be neighbours of what was read ahead, by chance: not far.
  EXPECT_EQ(detector.fault(0, PageNumber{300}, lacking, 299).pages, 1U);
  EXPECT_EQ(detector.fault(0, PageNumber{340}, lacking, 39).pages, SequentialDetector::kFirstWindow);
  EXPECT_TRUE(detector.fault(0, PageNumber{1000}, lacking, 652).walks);
  EXPECT_FALSE(detector.fault(0, PageNumber{2000}, lacking, 983).walks);
  EXPECT_TRUE(detector.fault(0, PageNumber{3016}, lacking, 2000).walks);
}

TEST(LatencyHistogram, QuantilesAgainstASortedTwin) {
  LatencyHistogram histogram;
  EXPECT_EQ(histogram.quantile(0.5).count(), 0);
  std::mt19937_64 random(2);
  std::vector<std::int64_t> all;
  for (int i = 0; i < 20000; ++i) {
    all.push_back(static_cast<std::int64_t>(random() >> (24 + random() % 36)));
    histogram.record(std::chrono::nanoseconds{all.back()});
  }
  std::sort(all.begin(), all.end());
  for (const double fraction : {0.01, 0.5, 0.9, 0.99}) {
    const double exact = static_cast<double>(all[static_cast<std::size_t>(fraction * 20000) - 1]);
    const double got = static_cast<double>(histogram.quantile(fraction).count());
    EXPECT_GE(got, exact);
    EXPECT_LE(got, exact * 1.07 + 1);
  }
  EXPECT_EQ(histogram.quantile(1).count(), all.back());
  EXPECT_EQ(histogram.max().count(), all.back());
  EXPECT_EQ(histogram.count(), 20000U);
}

TEST(WaitingFaults, WhatIsOnItsWayIsAskedForAloneAndLater) {
  using State = WaitingFault::State;
  WaitingFaults faults;
  const auto now = WaitingFaults::Clock::now();
  faults.add({0, PageNumber{1}, 32, State::kRequested, true, now, {}});
  faults.add({0, PageNumber{2}, 32, State::kArriving, false, now, {}});
  for (const std::uint64_t page : {1U, 2U, 3U})
    faults.expect(0, PageNumber{page}, now + std::chrono::hours(1));
  EXPECT_EQ(faults.next_due(), now + std::chrono::hours(1));
  const auto none = [](const WaitingFault& fault, bool) { FAIL() << fault.page.value; };
  faults.request_due(now, none);
  std::size_t sent = 0;
  faults.request_due(now + std::chrono::hours(2), [&](const WaitingFault& fault, bool overdue) {
    ++sent;
    EXPECT_TRUE(overdue);
    EXPECT_EQ(fault.page.value, 1U);
    EXPECT_EQ(fault.window, 1U);
  });
  EXPECT_EQ(sent, 1U);
}

TEST(WaitingFaults, WhatWasSentIsSentAgainAfterACut) {
  using State = WaitingFault::State;
  WaitingFaults faults;
  const auto now = WaitingFaults::Clock::now();
  std::uint64_t page = 0;
  for (const State state : {State::kRequested, State::kDeferred, State::kExpected, State::kArriving}) {
    faults.add(
        {0, PageNumber{page++}, 1, state, state == State::kRequested, now, now + std::chrono::hours(1)});
  }
  std::vector<std::uint64_t> sent;
  const auto collect = [&](const WaitingFault& fault, bool) { sent.push_back(fault.page.value); };
  faults.request_due(now, collect);
  EXPECT_EQ(sent, (std::vector<std::uint64_t>{1}));
  EXPECT_TRUE(faults.next_due().has_value());
  faults.request_due(now + std::chrono::hours(2), collect);
  EXPECT_EQ(sent, (std::vector<std::uint64_t>{1, 2}));
  sent.clear();
  faults.defer_all();
  faults.request_due(now, collect);
  std::sort(sent.begin(), sent.end());
  EXPECT_EQ(sent, (std::vector<std::uint64_t>{0, 1, 2}));
  std::size_t taken = 0;
  faults.take(0, {PageNumber{1}, 3}, [&](const WaitingFault&) { ++taken; });
  EXPECT_EQ(taken, 3U);
  EXPECT_TRUE(faults.contains(0, PageNumber{0}));
  EXPECT_FALSE(faults.contains(1, PageNumber{0}));
}

TEST(WaitingFaults, WhatWasTriedIsPutOffOnceForAThreadThatDidNotRun) {
  using State = WaitingFault::State;
  WaitingFaults faults;
  const auto now = WaitingFaults::Clock::now();
  const auto later = [&](int ms) { return now + std::chrono::milliseconds(ms); };
  for (const std::uint64_t page : {1U, 2U}) {
    faults.add({0, PageNumber{page}, 1, State::kRequested, true, now, {}});
  }
  faults.try_until(0, PageNumber{1}, later(20));
  faults.expect(0, PageNumber{2}, later(20));  // not tried: asked for at once
  faults.put_off_tried(later(10), later(15));  // not due
  EXPECT_EQ(faults.next_due(), later(20));
  faults.put_off_tried(later(50), later(55));
  std::vector<std::uint64_t> sent;
  const auto collect = [&](const WaitingFault& fault, bool) { sent.push_back(fault.page.value); };
  faults.request_due(later(50), collect);
  EXPECT_EQ(sent, (std::vector<std::uint64_t>{2}));
  EXPECT_EQ(faults.next_due(), later(55));
  faults.put_off_tried(later(90), later(95));
  faults.request_due(later(90), collect);
  EXPECT_EQ(sent, (std::vector<std::uint64_t>{2, 1}));
}

// What it is waited for since is no matter: it may have been cut off for long, or somebody else was asked first.
TEST(WaitingFaults, TheSourceOwesAnAnswerFromWhenItIsAsked) {
  using State = WaitingFault::State;
  WaitingFaults faults;
  const auto seen = WaitingFaults::Clock::now() - std::chrono::hours(1);
  faults.add({0, PageNumber{1}, 1, State::kDeferred, false, seen, {}});
  const auto before = WaitingFaults::Clock::now();
  faults.set_at_source(0, PageNumber{1}, true);
  const auto after = WaitingFaults::Clock::now();
  const auto far = after + std::chrono::hours(1);
  EXPECT_GE(faults.oldest_at_source(far, false), before);
  EXPECT_LE(faults.oldest_at_source(far, false), after);
  const auto asked = faults.oldest_at_source(far, false);
  faults.set_at_source(0, PageNumber{1}, true);
  EXPECT_EQ(faults.oldest_at_source(far, false), asked) << "asked once";
  faults.set_at_source(0, PageNumber{1}, false);
  EXPECT_EQ(faults.oldest_at_source(far, false), far);
}

TEST(Discarder, DropsExactlyWhatWasNamed) {
  const std::uint64_t page_size = system_page_size();
  const std::uint64_t pages = 8192;
  auto region = Region::allocate(pages * page_size);
  std::byte* const memory = region->address(PageNumber{0}).pointer();
  EXPECT_EQ(backing_of(*region), Backing::kPrivate);
  ::madvise(memory, pages * page_size, MADV_NOHUGEPAGE);
  std::memset(memory, 0x42, pages * page_size);
  Discarder discarder(Backing::kPrivate);
  const auto dropped = [](std::uint64_t page) { return page % 3 == 1 || (page >= 500 && page < 600); };
  for (std::uint64_t page = 0; page < pages; ++page) {
    if (dropped(page)) discarder.add(Address::of(memory + page * page_size), page_size);
  }
  discarder.flush();
  for (std::uint64_t page = 0; page < pages; ++page) {
    ASSERT_EQ(memory[page * page_size], dropped(page) ? std::byte{0} : std::byte{0x42}) << page;
  }
}

TEST(Discarder, PunchesHolesIntoSharedMemory) {
  const std::uint64_t page_size = system_page_size();
  void* memory = ::mmap(nullptr, 16 * page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* const bytes = static_cast<std::byte*>(memory);
  auto region = Region::adopt({Extent{Address::of(memory), 16 * page_size}}, 16 * page_size);
  EXPECT_EQ(backing_of(*region), Backing::kShared);
  std::memset(memory, 0x42, 16 * page_size);
  Discarder discarder(Backing::kShared);
  discarder.add(Address::of(bytes + 4 * page_size), 2 * page_size);
  discarder.flush();
  EXPECT_EQ(bytes[4 * page_size], std::byte{0});
  EXPECT_EQ(bytes[3 * page_size], std::byte{0x42});
  EXPECT_EQ(bytes[6 * page_size], std::byte{0x42});
  region->retire();
  ::munmap(memory, 16 * page_size);
}

}  // namespace
}  // namespace memferry
