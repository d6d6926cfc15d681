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

TEST(SendQueue, EveryPageIsTakenOnceWhoeverTakes) {
  SendQueue queue = all_pending(2);
  for (const std::uint32_t region : {0U, 1U}) queue.mark_all(region);
  std::vector<unsigned> taken(2 * kPages);
  const auto count = [&](std::uint32_t region, PageRun run) {
    for (PageNumber page = run.first; page < run.end(); ++page.value) ++taken[region * kPages + page.value];
  };
  std::uint64_t turn = 0;
  for (;; ++turn) {
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
