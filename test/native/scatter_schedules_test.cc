// Random schedules of scatters: many guests, servers and faults at a time, each schedule from a seed that reproduces
// it, thousands of them a run. The judgement of each is schedule_run.h's.
//
//   MEMFERRY_SEED=N        this one schedule, whatever test is asked for
//   MEMFERRY_SCHEDULES=N   so many for each test
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "schedule.h"
#include "schedule_run.h"

namespace memferry::test {
namespace {

using Clock = std::chrono::steady_clock;
using Way = Schedule::Way;
using FaultKind = Schedule::FaultKind;
using Outcome = ScheduleRun::Outcome;

constexpr std::uint64_t kFirstSeed = 20'250'000;
constexpr unsigned kSchedules = kThreadsChecked ? 20 : kSanitized ? 50 : 500;
// So many at a time: mostly they wait.
constexpr unsigned kAtOnce = kSanitized ? 4 : 8;
// Of fewer it is not expected that everything happens.
constexpr unsigned kEnough = 400;
constexpr unsigned kMostFailures = 5;
// A schedule that does not even end when its engines are closed.
constexpr std::chrono::seconds kStuck = ScheduleRun::kBound + std::chrono::seconds(30);

std::optional<std::uint64_t> from_environment(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == 0) return std::nullopt;
  return std::strtoull(text, nullptr, 10);
}

const char* name_of(Outcome outcome) {
  constexpr std::array<const char*, ScheduleRun::kOutcomes> kNames{"complete", "lost", "stayed", "closed"};
  return kNames[static_cast<std::size_t>(outcome)];
}

class Campaign {
 public:
  explicit Campaign(Way way) : way_(way) {}

  void run() {
    const auto began = Clock::now();
    if (const auto seed = from_environment("MEMFERRY_SEED")) {
      seeds_ = {*seed};
    } else {
      const std::uint64_t count = from_environment("MEMFERRY_SCHEDULES").value_or(kSchedules);
      for (std::uint64_t i = 0; i < count; ++i) {
        seeds_.push_back((kFirstSeed + i) * Schedule::kWays + static_cast<std::uint64_t>(way_));
      }
    }
    running_.resize(kAtOnce);
    std::vector<std::thread> workers;
    for (unsigned i = 0; i < kAtOnce; ++i) workers.emplace_back([this, i] { work(i); });
    std::thread watchdog([this] { watch(); });
    for (auto& each : workers) each.join();
    over_ = true;
    watchdog.join();
    report(std::chrono::duration<double>(Clock::now() - began).count());
  }

 private:
  struct Running {
    std::shared_ptr<ScheduleRun> run;
    std::string line;
    Clock::time_point since{};
  };

  void work(unsigned worker) {
    for (;;) {
      const std::size_t at = next_.fetch_add(1);
      if (at >= seeds_.size() || failures_ >= kMostFailures) return;
      const Schedule schedule = Schedule::of(seeds_[at]);
      const auto run = std::make_shared<ScheduleRun>(schedule);
      {
        const std::lock_guard lock(mutex_);
        running_[worker] = {run, schedule.line(), Clock::now()};
      }
      if (seeds_.size() == 1) std::printf("%s\n", schedule.line().c_str());
      run->run();
      const std::lock_guard lock(mutex_);
      const double took = std::chrono::duration<double>(Clock::now() - running_[worker].since).count();
      running_[worker] = {};
      ++done_;
      slowest_ = std::max(slowest_, took);
      for (const Outcome each : run->outcomes()) ++outcomes_[static_cast<std::size_t>(each)];
      for (const FaultKind each : run->struck()) ++struck_[static_cast<std::size_t>(each)];
      gathered_ += run->pages_gathered();
      deduplicated_ += run->pages_deduplicated();
      remote_faults_ += run->remote_faults();
      given_up_for_nothing_ += run->given_up_for_nothing();
      audits_ += run->audits();
      if (!run->failed()) continue;
      ++failures_;
      ADD_FAILURE() << schedule.line() << "\n"
                    << run->failures() << "  alone: MEMFERRY_SEED=" << schedule.seed
                    << " memferry_tests --gtest_filter='ScatterSchedules.*'";
    }
  }
  void watch() {
    while (!over_) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      const std::lock_guard lock(mutex_);
      for (const Running& each : running_) {
        if (!each.run || Clock::now() - each.since < kStuck) continue;
        std::fprintf(stderr, "does not end even when it is closed: %s\n", each.line.c_str());
        std::fprintf(stderr, "%s\n", each.run->state().c_str());
        std::abort();
      }
    }
  }
  void report(double seconds) {
    std::string text;
    for (std::size_t i = 0; i < outcomes_.size(); ++i)
      text += std::string(" ") + name_of(static_cast<Outcome>(i)) + " " + std::to_string(outcomes_[i]);
    std::printf(
        "%s: %u schedules in %.1f s, the slowest %.1f s; guests:%s; %llu pages gathered, %llu deduplicated, "
        "%llu faults, "
        "%llu audits, %llu servers given up for nothing\n",
        test::name_of(way_), done_, seconds, slowest_, text.c_str(),
        static_cast<unsigned long long>(gathered_), static_cast<unsigned long long>(deduplicated_),
        static_cast<unsigned long long>(remote_faults_), static_cast<unsigned long long>(audits_),
        static_cast<unsigned long long>(given_up_for_nothing_));
    text.clear();
    for (std::size_t i = 0; i < struck_.size(); ++i)
      text += std::string(" ") + test::name_of(static_cast<FaultKind>(i)) + " " + std::to_string(struck_[i]);
    std::printf("  struck:%s\n", text.c_str());
    if (done_ < kEnough || testing::Test::HasFailure()) return;
    // What never happens here is not tested here.
    for (std::size_t i = 0; i < struck_.size(); ++i) {
      const auto kind = static_cast<FaultKind>(i);
      EXPECT_EQ(struck_[i] > 0, possible(way_, kind)) << test::name_of(kind);
    }
    for (std::size_t i = 0; i < outcomes_.size(); ++i) {
      const auto outcome = static_cast<Outcome>(i);
      // Where everything is gathered before the switch, nobody runs on a guest of which pages are missing.
      const bool never =
          way_ == Way::kScatterPreCopy && (outcome == Outcome::kLost || outcome == Outcome::kClosed);
      EXPECT_EQ(outcomes_[i] > 0, !never) << name_of(outcome);
    }
    EXPECT_GT(gathered_, 0u);
    EXPECT_GT(deduplicated_, 0u);
    EXPECT_GT(audits_, 0u);
    EXPECT_EQ(remote_faults_ > 0, way_ != Way::kScatterPreCopy);
  }

  const Way way_;
  std::vector<std::uint64_t> seeds_;
  std::atomic<std::size_t> next_{0};
  std::atomic<unsigned> failures_{0};
  std::atomic<bool> over_{false};
  std::mutex mutex_;  // guards the rest
  std::vector<Running> running_;
  unsigned done_ = 0;
  double slowest_ = 0;
  std::array<unsigned, ScheduleRun::kOutcomes> outcomes_{};
  std::array<unsigned, Schedule::kFaultKinds> struck_{};
  std::uint64_t gathered_ = 0;
  std::uint64_t deduplicated_ = 0;
  std::uint64_t remote_faults_ = 0;
  std::uint64_t given_up_for_nothing_ = 0;
  std::uint64_t audits_ = 0;
};

TEST(ScatterSchedules, PushedAfterTheSwitch) { Campaign(Way::kScatter).run(); }
TEST(ScatterSchedules, SwitchedAfterRounds) { Campaign(Way::kScatterHybrid).run(); }
TEST(ScatterSchedules, SentInRoundsToTheEnd) { Campaign(Way::kScatterPreCopy).run(); }
TEST(ScatterSchedules, ParkedAndGatheredWithoutASource) { Campaign(Way::kPark).run(); }

}  // namespace
}  // namespace memferry::test
