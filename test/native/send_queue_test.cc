// Which page goes next, and to whom.
#include <gtest/gtest.h>

#include <vector>

#include "transfer/send_queue.h"

namespace memferry {
namespace {

constexpr std::uint64_t kPages = 256;

SendQueue all_pending(std::size_t regions = 1) {
  std::vector<std::shared_ptr<Region>> all;
  for (std::size_t i = 0; i < regions; ++i) all.push_back(Region::allocate(kPages * system_page_size()));
  return SendQueue(std::move(all));
}

std::uint64_t first_of(SendQueue& queue, std::uint64_t pages, Towards towards) {
  const auto chunk = queue.take(pages, towards);
  if (!chunk) {
    ADD_FAILURE() << "nothing is pending";
    return ~0ULL;
  }
  return chunk->run.first.value;
}

TEST(SendQueue, AFaultMovesWhereTheDestinationGoesOnAndNobodyElse) {
  SendQueue queue = all_pending();
  queue.mark_all(0);
  EXPECT_EQ(first_of(queue, 8, Towards::kServer), 0U);
  const SendQueue::FaultTake fault = queue.take_for_fault(0, PageNumber{100}, 3);
  EXPECT_EQ(fault.run, (PageRun{PageNumber{100}, 4}));
  EXPECT_TRUE(fault.first_was_pending);
  EXPECT_EQ(first_of(queue, 4, Towards::kDestination), 104U);
  EXPECT_EQ(queue.server_cursor().second, PageNumber{8});
  EXPECT_EQ(first_of(queue, 8, Towards::kServer), 8U);
  EXPECT_EQ(first_of(queue, 4, Towards::kDestination), 108U);
}

TEST(SendQueue, ServersBeginWhereTheyAreToldAndComeRoundToWhatLiesBefore) {
  SendQueue queue = all_pending(2);
  for (const std::uint32_t region : {0U, 1U}) queue.mark_all(region);
  queue.begin_servers_at(kPages + 250);
  EXPECT_EQ(queue.server_cursor(), (std::pair{1U, PageNumber{250}}));
  std::vector<std::uint64_t> order;
  while (const auto chunk = queue.take(8, Towards::kServer))
    order.push_back(chunk->region * kPages + chunk->run.first.value);
  ASSERT_FALSE(order.empty());
  EXPECT_EQ(order.front(), kPages + 250);
  EXPECT_EQ(order[1], 0U) << "the other region, from its beginning";
  EXPECT_EQ(order.back(), kPages + 248) << "what lies before comes last";
  queue.begin_servers_at(2 * kPages);  // beyond all: nothing changes
  EXPECT_EQ(queue.server_cursor(), (std::pair{1U, PageNumber{250}}));
}

TEST(SendQueue, ServersAreGivenFirstWhatIsPutFirst) {
  SendQueue queue = all_pending(2);
  for (const std::uint32_t region : {0U, 1U}) queue.mark_all(region);
  for (const std::uint64_t page : {30U, 31U, 32U, 90U}) queue.put_first(0, PageNumber{page});
  queue.put_first(1, PageNumber{7});
  EXPECT_EQ(first_of(queue, 1, Towards::kDestination), 0U) << "the destination takes what comes next";
  EXPECT_EQ(queue.take_for_fault(0, PageNumber{31}, 0).run.count, 1U);
  // What somebody else took is passed over, and what did not fit stays first.
  std::vector<std::pair<std::uint32_t, PageRun>> first;
  for (int i = 0; i < 4; ++i) {
    const auto chunk = queue.take(2, Towards::kServer);
    ASSERT_TRUE(chunk);
    first.emplace_back(chunk->region, chunk->run);
  }
  const auto one = [](std::uint32_t region, std::uint64_t page) {
    return std::pair{region, PageRun{PageNumber{page}, 1}};
  };
  EXPECT_EQ(first, (std::vector{one(0, 30), one(0, 32), one(0, 90), one(1, 7)}));
  // Then as ever; and what is put first no more, or is not pending, goes or stays as it would.
  queue.put_first(0, PageNumber{200});
  queue.forget_first(0, {PageNumber{0}, kPages});
  queue.put_first(0, PageNumber{90});
  const auto next = queue.take(4, Towards::kServer);
  ASSERT_TRUE(next);
  EXPECT_EQ(next->region, 1U);
  EXPECT_EQ(next->run, (PageRun{PageNumber{8}, 4}));
  std::uint64_t left = 0;
  while (const auto chunk = queue.take(64, Towards::kServer)) left += chunk->run.count;
  EXPECT_EQ(left + 4 + 4 + 1 + 1, 2 * kPages);
}

TEST(SendQueue, EveryPageIsTakenOnceWhoeverTakes) {
  SendQueue queue = all_pending(2);
  for (const std::uint32_t region : {0U, 1U}) queue.mark_all(region);
  std::vector<unsigned> taken(2 * kPages);
  const auto count = [&](std::uint32_t region, PageRun run) {
    for (PageNumber page = run.first; page < run.end(); ++page.value) ++taken[region * kPages + page.value];
  };
  std::uint64_t turn = 0;
  for (;; ++turn) {
    if (turn % 4 == 1) queue.put_first(static_cast<std::uint32_t>(turn % 2), PageNumber{turn * 61 % kPages});
    if (turn % 5 == 3) {
      const auto region = static_cast<std::uint32_t>(turn % 2);
      const auto fault = queue.take_for_fault(region, PageNumber{turn * 37 % kPages}, 2);
      count(region, fault.first_was_pending
                        ? fault.run
                        : PageRun{PageNumber{fault.run.first.value + 1}, fault.run.count - 1});
      continue;
    }
    const auto chunk = queue.take(1 + turn % 7, turn % 3 == 0 ? Towards::kDestination : Towards::kServer);
    if (!chunk) break;
    count(chunk->region, chunk->run);
  }
  for (std::size_t page = 0; page < taken.size(); ++page) ASSERT_EQ(taken[page], 1U) << page;
  EXPECT_EQ(queue.pending_pages(), 0U);
  EXPECT_FALSE(queue.take(1, Towards::kServer));
}

}  // namespace
}  // namespace memferry
