// What is lost page by page is told in a few reports, each page once, and poisoned only after it was told.
#include <gtest/gtest.h>

#include <chrono>
#include <set>
#include <string>
#include <vector>

#include "fault/loss_reports.h"

namespace memferry {
namespace {

using namespace std::chrono_literals;

struct Told {
  std::string why;
  std::vector<PageRun> runs;
};

class LossReportsTest : public testing::Test {
 protected:
  LossReports::Config config(std::chrono::milliseconds grace) {
    return {.pages = 200,
            .grace = grace,
            .needless = [this](PageNumber page) { return dropped.count(page.value) > 0; },
            .report =
                [this](const std::string& why, std::vector<PageRun> runs) {
                  told.push_back({why, std::move(runs)});
                },
            .due_changed = [this] { ++changes; }};
  }
  static std::vector<PageRun> poison(LossReports& losses) {
    std::vector<PageRun> runs;
    losses.poison([&](PageRun run) { runs.push_back(run); });
    return runs;
  }

  std::set<std::uint64_t> dropped;
  std::vector<Told> told;
  int changes = 0;
};

TEST_F(LossReportsTest, OneReportAtATime) {
  LossReports losses(config(1h));
  EXPECT_EQ(losses.due(), std::nullopt);
  EXPECT_TRUE(losses.lose(PageNumber{5}, "first"));
  EXPECT_FALSE(losses.lose(PageNumber{5}, "again"));
  ASSERT_EQ(told.size(), 1U);
  EXPECT_EQ(told[0].runs, (std::vector<PageRun>{{PageNumber{5}, 1}}));
  for (std::uint64_t page = 6; page < 100; ++page) EXPECT_TRUE(losses.lose(PageNumber{page}, "later"));
  EXPECT_TRUE(losses.lose(PageNumber{3}, "last"));
  EXPECT_EQ(told.size(), 1U);
  EXPECT_EQ(poison(losses), (std::vector<PageRun>{{PageNumber{5}, 1}}));
  ASSERT_EQ(told.size(), 2U);
  EXPECT_EQ(told[1].why, "last");
  EXPECT_EQ(told[1].runs, (std::vector<PageRun>{{PageNumber{3}, 1}, {PageNumber{6}, 94}}));
  EXPECT_EQ(poison(losses), told[1].runs);
  EXPECT_EQ(told.size(), 2U);
  EXPECT_EQ(losses.due(), std::nullopt);
  EXPECT_EQ(losses.count(), 96U);
}

TEST_F(LossReportsTest, PoisonedAfterItsGraceOrOnceItWasTold) {
  LossReports losses(config(1h));
  losses.acknowledge();  // of nothing
  EXPECT_EQ(losses.due(), std::nullopt);
  EXPECT_TRUE(losses.lose(PageNumber{0}, ""));
  EXPECT_GT(losses.due(), LossReports::Clock::now() + 59min);
  const int before = changes;
  losses.acknowledge();
  EXPECT_GT(changes, before);
  EXPECT_LE(losses.due(), LossReports::Clock::now());
}

TEST_F(LossReportsTest, WhatIsDroppedIsNoLoss) {
  LossReports losses(config(1h));
  dropped.insert(7);
  EXPECT_FALSE(losses.lose(PageNumber{7}, ""));
  EXPECT_FALSE(losses.lost(PageNumber{7}));
  EXPECT_TRUE(told.empty());
  EXPECT_TRUE(losses.lose(PageNumber{8}, ""));
  EXPECT_TRUE(losses.lose(PageNumber{9}, ""));
  dropped.insert(9);  // noted first, taken back then
  EXPECT_EQ(losses.forget({PageNumber{9}, 1}), 1U);
  EXPECT_EQ(losses.forget({PageNumber{9}, 1}), 0U);
  EXPECT_EQ(poison(losses), (std::vector<PageRun>{{PageNumber{8}, 1}}));
  EXPECT_EQ(told.size(), 1U);
}

TEST_F(LossReportsTest, NothingIsToldAfterTheEnd) {
  LossReports losses(config(0ms));
  losses.stop();
  EXPECT_TRUE(losses.lose(PageNumber{1}, ""));
  EXPECT_TRUE(told.empty());
  EXPECT_EQ(losses.due(), std::nullopt);
}

}  // namespace
}  // namespace memferry
