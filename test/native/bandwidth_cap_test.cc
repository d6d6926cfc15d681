// A host's bandwidth: who waits for it, and in which order they get it.
#include "wire/bandwidth_cap.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace memferry::wire {
namespace {

using namespace std::chrono_literals;
using Turn = BandwidthCap::Turn;
using Clock = std::chrono::steady_clock;

TEST(BandwidthCap, WithoutALimitNobodyWaits) {
  BandwidthCap cap;
  WorkerThread self;
  EXPECT_TRUE(cap.wait_and_debit(1ULL << 40U, self));
  EXPECT_TRUE(cap.wait_and_debit(1, self));
}

TEST(BandwidthCap, ABoundedWaitDebitsNothingWhenItIsOver) {
  BandwidthCap cap(1000);
  WorkerThread self("self", [](WorkerThread&) {});
  cap.debit(100'000);
  BandwidthCap::Place place(cap);
  EXPECT_EQ(BandwidthCap::wait_and_debit(1ULL << 40U, self, 5ms, place), Turn::kLater);
  EXPECT_LT(cap.delay(), 101s);
  cap.set_rate(0);
  EXPECT_EQ(BandwidthCap::wait_and_debit(1, self, 5ms, place), Turn::kNow);
  self.request_stop();
  EXPECT_EQ(BandwidthCap::wait_and_debit(1, self, 5ms, place), Turn::kStopped);
}

// Both look while nothing may go, and then in the other order.
TEST(BandwidthCap, WhoCameFirstGoesFirst) {
  WorkerThread self("self", [](WorkerThread&) {});
  bool in_time = false;
  // Who has not looked for a while is passed over, and this thread may be stopped for as long.
  for (int times = 0; times < 100 && !in_time; ++times) {
    BandwidthCap cap(100'000);
    const auto looks = [&](BandwidthCap::Place& place) {
      return BandwidthCap::wait_and_debit(0, self, Duration::zero(), place);
    };
    cap.debit(5000);
    BandwidthCap::Place first(cap);
    BandwidthCap::Place second(cap);
    const auto began = Clock::now();
    const Turn one = looks(first);
    const Turn two = looks(second);
    if (one != Turn::kLater || two != Turn::kLater) continue;  // the debt was paid meanwhile
    while (cap.delay() > Duration::zero()) std::this_thread::sleep_for(100us);
    const Turn too_early = looks(second);
    const Turn now = looks(first);
    const Turn then = looks(second);
    // Where half a burst has come together meanwhile nobody waits for anybody.
    in_time = Clock::now() - began < 55ms;
    if (!in_time) continue;
    EXPECT_EQ(too_early, Turn::kLater);
    EXPECT_EQ(now, Turn::kNow);
    EXPECT_EQ(then, Turn::kNow);
  }
  EXPECT_TRUE(in_time);
}

TEST(BandwidthCap, NobodyWaitsForOneThatDoesNotLook) {
  BandwidthCap cap(100'000);
  WorkerThread self("self", [](WorkerThread&) {});
  cap.debit(20'000);
  BandwidthCap::Place absent(cap);
  ASSERT_EQ(BandwidthCap::wait_and_debit(1, self, Duration::zero(), absent), Turn::kLater);
  EXPECT_TRUE(cap.wait_and_debit(1, self));
  // Nor for one that has gone.
  cap.debit(5000);
  {
    BandwidthCap::Place gone(cap);
    (void)BandwidthCap::wait_and_debit(1, self, Duration::zero(), gone);
  }
  EXPECT_TRUE(cap.wait_and_debit(1, self));
}

TEST(BandwidthCap, AnUrgentAnswerWaitsOnlyWhenTheyAreAheadOfTheRate) {
  BandwidthCap cap(1'000'000);
  cap.debit(100'000);
  EXPECT_GT(cap.delay(), Duration::zero());
  EXPECT_EQ(cap.urgent_delay(), Duration::zero());
  cap.debit(1'000'000);
  EXPECT_GT(cap.urgent_delay(), 500ms);
  EXPECT_LT(cap.urgent_delay(), 900ms);
  EXPECT_EQ(BandwidthCap().urgent_delay(), Duration::zero());
}

// Urgent ones take all that there is, for ever.
TEST(BandwidthCap, WhoHasWaitedLongGoesWithTheUrgentOnes) {
  BandwidthCap cap(1'000'000);
  WorkerThread urgent("urgent", [&](WorkerThread& self) {
    while (!self.stopping()) {
      if (cap.urgent_delay() == Duration::zero()) {
        cap.debit(4096);
      } else {
        self.wait(1);
      }
    }
  });
  WorkerThread self("self", [](WorkerThread&) {});
  while (cap.delay() < 200ms) std::this_thread::sleep_for(1ms);
  const auto began = Clock::now();
  EXPECT_TRUE(cap.wait_and_debit(1, self));
  EXPECT_GE(Clock::now() - began, 1s);
  urgent.stop();
}

// With places among which there is an order each small frame would cost a waking.
TEST(BandwidthCap, ManyWithSmallFramesGetWhatThereIs) {
  constexpr std::uint64_t kRate = 20'000'000;
  BandwidthCap cap(kRate);
  std::atomic<std::uint64_t> bytes{0};
  const auto began = Clock::now();
  {
    std::vector<std::unique_ptr<WorkerThread>> threads;
    for (int i = 0; i < 4; ++i) {
      threads.push_back(std::make_unique<WorkerThread>("small", [&](WorkerThread& self) {
        while (cap.wait_and_debit(1000, self)) bytes += 1000;
      }));
    }
    // However slow this machine is, it gets there.
    while (bytes < kRate / 4) std::this_thread::sleep_for(1ms);
  }
  const double rate =
      static_cast<double>(bytes) / std::chrono::duration<double>(Clock::now() - began).count();
  EXPECT_LT(rate, 1.2 * kRate);
  RecordProperty("of_the_limit", std::to_string(rate / kRate));
  std::printf("%.2f of the limit\n", rate / kRate);
}

}  // namespace
}  // namespace memferry::wire
