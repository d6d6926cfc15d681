// The push's pace: the token bucket and the rate controller with a clock of their own, and a simulated link.
#include "wire/pacer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <thread>

namespace memferry::wire {
namespace {

using namespace std::chrono_literals;

constexpr TimePoint kStart{1h};

double seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

TEST(TokenBucket, WithoutARateNobodyWaits) {
  TokenBucket bucket;
  bucket.debit(1 << 30, kStart);
  EXPECT_EQ(bucket.delay(kStart), Duration::zero());
}

TEST(TokenBucket, DebtIsPaidAtTheRate) {
  TokenBucket bucket;
  bucket.set_rate(1e6, 1000, kStart);
  EXPECT_EQ(bucket.delay(kStart), Duration::zero());
  bucket.debit(10'000, kStart);
  EXPECT_NEAR(seconds(bucket.delay(kStart)), 0.01, 0.0001);
  EXPECT_NEAR(seconds(bucket.delay(kStart + 6ms)), 0.004, 0.0001);
  EXPECT_EQ(bucket.delay(kStart + 11ms), Duration::zero());
}

TEST(TokenBucket, WaitingForTheDelayIsEnough) {
  TokenBucket bucket;
  bucket.set_rate(123'456'789, 0, kStart);
  TimePoint now = kStart;
  for (int i = 0; i < 1000; ++i) {
    bucket.debit(4096 + static_cast<std::uint64_t>(i), now);
    now += bucket.delay(now);
    ASSERT_EQ(bucket.delay(now), Duration::zero()) << i;
  }
}

TEST(TokenBucket, ASilenceSavesNoMoreThanTheBurst) {
  TokenBucket bucket;
  bucket.set_rate(1e6, 1000, kStart);
  const TimePoint later = kStart + 1h;
  bucket.debit(2000, later);
  EXPECT_NEAR(seconds(bucket.delay(later)), 0.001, 0.0001);
}

TEST(TokenBucket, TheRateHoldsOverManyUnevenSteps) {
  TokenBucket bucket;
  bucket.set_rate(5e6, 10'000, kStart);
  TimePoint now = kStart;
  std::uint64_t sent = 0;
  for (int i = 0; i < 2000; ++i) {
    const std::uint64_t bytes = 100 + static_cast<std::uint64_t>(i * 7919 % 60'000);
    bucket.debit(bytes, now);
    sent += bytes;
    now += bucket.delay(now);
  }
  EXPECT_NEAR(static_cast<double>(sent) / seconds(now - kStart), 5e6, 0.01 * 5e6);
}

TEST(TokenBucket, AFallingRateKeepsTheDebt) {
  TokenBucket bucket;
  bucket.set_rate(1e6, 0, kStart);
  bucket.debit(1000, kStart);
  bucket.set_rate(1e5, 0, kStart);
  EXPECT_NEAR(seconds(bucket.delay(kStart)), 0.01, 0.0001);
  bucket.set_rate(0, 0, kStart);
  EXPECT_EQ(bucket.delay(kStart), Duration::zero());
}

// A link with a queue in front of it, which TCP sees as a longer round trip.
struct Link {
  double bytes_a_second;
  double queue_bytes = 0;
  double delivered = 0;
  void step(double offered_bytes, double dt) {
    queue_bytes += offered_bytes;
    const double out = std::min(queue_bytes, bytes_a_second * dt);
    queue_bytes -= out;
    delivered += out;
  }
  // What TCP has not seen acknowledged: what waits, and what is on its way.
  std::uint64_t queued() const { return static_cast<std::uint64_t>(queue_bytes + bytes_a_second * 40e-6); }
};

constexpr double kQueueUs = std::chrono::duration<double, std::micro>(RateController::kQueue).count();

struct Outcome {
  double utilisation;
  double mean_queue_us;
};

// Pushes as the controller allows, with faults' answers of `fault_share` of the link on top.
Outcome run_link(double link_rate, double fault_share, double later_rate = 0) {
  Link link{link_rate};
  RateController controller;
  TimePoint now = kStart;
  constexpr double kDt = 0.0005;
  double queue_us = 0;
  double capacity = 0;
  double delivered_at_start = 0;
  int measured = 0;
  constexpr int kSteps = 16'000;  // 8 s
  for (int i = 0; i < kSteps; ++i) {
    if (i == kSteps / 2 && later_rate > 0) link.bytes_a_second = later_rate;
    const double push = !controller.limiting()          ? 2 * link_rate
                        : now < controller.drained_at() ? 0
                                                        : controller.rate();
    // The bucket: what the faults take, the push does not get.
    const double faults = fault_share * link.bytes_a_second;
    const double offered = controller.limiting() ? std::max(push - faults, 0.0) + faults : push;
    // Before the controller, a queue of finite length, as in a switch.
    if (link.queue_bytes < 0.005 * link_rate)
      link.step(offered * kDt, kDt);
    else
      link.step(0, kDt);
    now += std::chrono::duration_cast<Duration>(std::chrono::duration<double>(kDt));
    if (i % 10 == 9) {
      controller.sample({now, static_cast<std::uint64_t>(link.delivered), link.queued(), 0, 40us});
      if (i > 200) controller.start(now);
    }
    if (i > kSteps - kSteps / 4) {
      if (measured == 0) delivered_at_start = link.delivered;
      queue_us += link.queue_bytes / link.bytes_a_second * 1e6;
      capacity += link.bytes_a_second * kDt;
      ++measured;
    }
  }
  return {(link.delivered - delivered_at_start) / capacity, queue_us / measured};
}

TEST(RateController, FillsALinkOfAnyRateAndNoQueue) {
  for (const double rate : {1.25e6, 12.5e6, 119.6e6, 1.25e9}) {
    for (const double faults : {0.0, 0.1}) {
      const Outcome outcome = run_link(rate, faults);
      EXPECT_GT(outcome.utilisation, 0.95) << rate;
      EXPECT_LT(outcome.mean_queue_us, kQueueUs) << rate;
    }
  }
}

TEST(RateController, FollowsALinkThatBecomesSlower) {
  const Outcome outcome = run_link(119.6e6, 0.1, 60e6);
  EXPECT_GT(outcome.utilisation, 0.9);
  EXPECT_LT(outcome.mean_queue_us, 2 * kQueueUs);
}

// Delivered at 100 MB/s, and this many bytes waiting.
RateController::Sample sample_at(std::chrono::milliseconds at, std::uint64_t queued_bytes) {
  return {kStart + at, static_cast<std::uint64_t>(at.count()) * 100'000, queued_bytes, 0, 40us};
}

TEST(RateController, StartsJustBelowWhatWasDelivered) {
  RateController controller;
  controller.start(kStart);
  EXPECT_FALSE(controller.limiting()) << "nothing measured yet";
  controller.sample(sample_at(0ms, 0));
  RateController::Sample full =
      sample_at(10ms, 97'880);  // with what TCP holds, 2 ms of 97 MB/s and the round trip
  full.unsent_bytes = 100'000;
  controller.sample(full);
  controller.start(kStart + 10ms);
  EXPECT_NEAR(controller.rate(), 98e6, 1e5);
  EXPECT_NEAR(seconds(controller.drained_at() - kStart), 0.012, 0.0001);
  controller.stop();
  EXPECT_FALSE(controller.limiting());
}

TEST(RateController, LearnsNothingWhileTheSocketsDrain) {
  RateController controller;
  controller.sample(sample_at(0ms, 0));
  RateController::Sample full = sample_at(10ms, 1'000'000);
  full.unsent_bytes = 2'000'000;  // 30 ms
  controller.sample(full);
  controller.start(kStart + 10ms);
  const double rate = controller.rate();
  const TimePoint drained = controller.drained_at();
  for (int i = 1; i <= 5; ++i) controller.sample(sample_at(10ms + i * 5ms, 1'000'000));
  EXPECT_EQ(controller.rate(), rate);
  EXPECT_EQ(controller.drained_at(), drained);
  // However much is in the way: not for ever.
  controller.stop();
  full = sample_at(50ms, 1'000'000'000);
  controller.sample(full);
  controller.start(kStart + 50ms);
  EXPECT_LE(controller.drained_at(), kStart + 50ms + RateController::kLongestDrain);
}

TEST(RateController, GrowsWhileThereIsNoQueueAndFallsWhenThereIs) {
  RateController controller;
  // Full for a while: its rate is known.
  for (int i = -RateController::kFull; i <= 0; ++i) controller.sample(sample_at(10ms + i * 1ms, 100'000));
  controller.start(kStart + 10ms);
  controller.sample(sample_at(15ms, 1'000'000));  // the interval after a fall tells nothing
  const double rate = controller.rate();
  controller.sample(sample_at(20ms, 4000));  // no more than the round trip holds
  EXPECT_GT(controller.rate(), rate);
  EXPECT_LT(controller.rate(), 1.01 * rate);
  controller.sample(sample_at(25ms, 100'000));  // a millisecond
  EXPECT_LT(controller.rate(), rate);
  EXPECT_GE(controller.rate(), RateController::kDeepestFall * rate);
  EXPECT_GT(controller.drained_at(), kStart + 25ms);
}

// A link of 100 MB/s; one interval in which little arrived and much waits, as when the reader got no CPU.
TEST(RateController, AHiccupDoesNotCostTheRate) {
  RateController controller;
  std::uint64_t delivered = 0;
  TimePoint now = kStart;
  const auto sample = [&](std::uint64_t bytes, std::uint64_t queued) {
    now += 5ms;
    delivered += bytes;
    controller.sample({now, delivered, queued, 0, 40us});
  };
  // Full for a while: its rate is known.
  for (int i = 0; i <= RateController::kFull; ++i) sample(500'000, 100'000);
  controller.start(now);
  for (int i = 0; i < 4; ++i) sample(490'000, 0);
  const double rate = controller.rate();
  sample(300'000, 200'000);
  EXPECT_EQ(controller.rate(), rate);
  EXPECT_GT(controller.drained_at(), now) << "what waits drains all the same";
  sample(600'000, 0);  // partly a pause
  sample(490'000, 0);
  EXPECT_GE(controller.rate(), rate);
  // Nor do some that come one after the other, as long as what waits goes away in the end.
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < 20; ++i) sample(50'000, 400'000);
    sample(900'000, 0);
    sample(490'000, 0);
    sample(490'000, 0);
  }
  EXPECT_GE(controller.rate(), rate);
  // What catches up afterwards is no rate.
  EXPECT_LT(controller.rate(), 1.2 * rate);
  // A link that became slower is not a hiccup.
  const auto lasting = RateController::kLongestStall / 5ms + 4;
  for (int i = 0; i < lasting; ++i) sample(300'000, 200'000);
  EXPECT_LT(controller.rate(), rate);
}

// Limiting begins together with the push: what was delivered so far is what was given, not what the link takes.
TEST(RateController, FindsARateThatItNeverSaw) {
  RateController controller;
  const double link_rate = 100e6;
  Link link{link_rate};
  TimePoint now = kStart;
  int below_after_300ms = 0;
  for (int ms = 0; ms < 1000; ++ms) {
    const double offered = controller.limiting() ? now < controller.drained_at() ? 0 : controller.rate()
                           : ms < 10 ? 0.05 * link_rate
                                                 : 1.5 * link_rate;
    link.step(offered * 0.001, 0.001);
    now += 1ms;
    if (ms % 5 == 4) {
      const double under_way = std::min(offered, link_rate) * 40e-6;
      const auto queued = static_cast<std::uint64_t>(link.queue_bytes + under_way);
      controller.sample({now, static_cast<std::uint64_t>(link.delivered), queued, 0, 40us});
      if (controller.saturated()) controller.start(now);
      if (ms > 300 && controller.rate() < 0.8 * link_rate) ++below_after_300ms;
    }
  }
  EXPECT_TRUE(controller.limiting());
  EXPECT_EQ(below_after_300ms, 0);
}

TEST(RateController, AStandstillOfAcknowledgementsDoesNotEndAtAStandstill) {
  RateController controller;
  controller.sample(sample_at(0ms, 0));
  controller.sample(sample_at(10ms, 0));
  controller.start(kStart + 10ms);
  for (int i = 0; i < 6; ++i) controller.sample({kStart + 15ms + i * 5ms, 1'000'000, 1'000'000, 0, 40us});
  EXPECT_GT(controller.rate(), 0.2 * 97e6);
}

TEST(RateController, SamplesThatGoBackwardsAreHarmless) {
  RateController controller;
  controller.sample({kStart, 1000, 0, 0, 40us});
  controller.sample({kStart, 2000, 0, 0, 40us});
  controller.sample({kStart - 1ms, 0, 0, 0, 0us});
  controller.start(kStart + 5ms);
  EXPECT_FALSE(controller.limiting());
}

TEST(Pacer, CancelWakesAWaiterAndResetLetsItGoAgain) {
  Pacer pacer;
  pacer.set_bandwidth(1);
  pacer.debit(1000);
  std::jthread canceller([&] { pacer.cancel(); });
  EXPECT_FALSE(pacer.wait_turn());
  EXPECT_FALSE(pacer.wait_turn());
  canceller.join();
  pacer.reset();
  pacer.set_bandwidth(0);
  EXPECT_TRUE(pacer.wait_turn());
}

TEST(Pacer, AnswersToFaultsAreDebitedAndNeverWait) {
  Pacer pacer;
  pacer.set_bandwidth(10'000'000);
  pacer.fault_begin();
  const auto begin = std::chrono::steady_clock::now();
  pacer.fault_end(1'000'000);  // a tenth of a second
  EXPECT_TRUE(pacer.wait_turn());
  const double waited = seconds(std::chrono::steady_clock::now() - begin);
  EXPECT_GT(waited, 0.05);
}

TEST(Pacer, ChunksAreSmallerWhileFaultsAreRecent) {
  Pacer pacer;
  EXPECT_EQ(pacer.chunk_bytes(256 * 1024), 256u * 1024);
  // Until it was recent indeed.
  std::size_t chunk = 0;
  std::chrono::steady_clock::time_point began;
  do {
    began = std::chrono::steady_clock::now();
    pacer.fault_begin();
    pacer.fault_end(4096);
    chunk = pacer.chunk_bytes(256 * 1024);
  } while (std::chrono::steady_clock::now() - began > Pacer::kFaultsAreRecent / 2);
  EXPECT_LT(chunk, 256u * 1024);
}

}  // namespace
}  // namespace memferry::wire
