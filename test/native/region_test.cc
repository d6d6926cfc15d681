// Regions: their arithmetic, and the protocol by which their memory goes away under native threads.
#include "page/region.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <semaphore>
#include <stdexcept>
#include <thread>
#include <vector>

#include "os/mapping.h"

namespace memferry {
namespace {

const std::uint64_t kPage = system_page_size();

TEST(RegionTest, AllocatesZeroedMemoryOfWholePages) {
  const auto region = Region::allocate(8 * kPage);
  EXPECT_EQ(region->pages(), 8U);
  EXPECT_EQ(region->capacity_pages(), 8U);
  EXPECT_EQ(region->bytes(), 8 * kPage);
  const auto all = region->contiguous({PageNumber{0}, 8});
  EXPECT_EQ(all.size(), 8 * kPage);
  for (const std::byte byte : all) ASSERT_EQ(byte, std::byte{0});
  EXPECT_THROW((void)Region::allocate(0), std::invalid_argument);
  EXPECT_THROW((void)Region::allocate(kPage + 1), std::invalid_argument);
  EXPECT_THROW((void)Region::allocate(~0ULL / kPage * kPage), SystemError);
}

TEST(RegionTest, NumbersSeveralExtentsAsOneSequence) {
  const auto memory = Mapping::anonymous(32 * kPage);
  const auto at = [&](std::uint64_t page) { return memory.start().plus(page * kPage); };
  // Not in the order of their addresses, and the last one may grow by two pages.
  const auto region = Region::adopt({{at(20), 3 * kPage}, {at(4), 2 * kPage}, {at(10), kPage}}, 3 * kPage);
  EXPECT_EQ(region->pages(), 6U);
  EXPECT_EQ(region->capacity_pages(), 8U);
  EXPECT_EQ(region->address(PageNumber{0}), at(20));
  EXPECT_EQ(region->address(PageNumber{3}), at(4));
  EXPECT_EQ(region->address(PageNumber{5}), at(10));
  EXPECT_EQ(region->contiguous({PageNumber{1}, 4}).size(), 2 * kPage);
  EXPECT_EQ(region->contiguous({PageNumber{5}, 100}).size(), kPage);
  EXPECT_EQ(region->page_at(at(22).plus(5)), PageNumber{2});
  EXPECT_EQ(region->page_at(at(5)), PageNumber{4});
  EXPECT_EQ(region->page_at(at(12)), PageNumber{7});  // capacity, not yet there
  EXPECT_FALSE(region->page_at(at(13)));
  EXPECT_FALSE(region->page_at(at(6)));
  EXPECT_FALSE(region->page_at(at(3)));
  EXPECT_THROW((void)region->address(PageNumber{6}), std::out_of_range);
  EXPECT_THROW((void)region->contiguous({PageNumber{6}, 1}), std::out_of_range);
  region->grow(8);
  EXPECT_EQ(region->address(PageNumber{7}), at(12));
  EXPECT_EQ(region->extents().back().bytes, 3 * kPage);
  EXPECT_THROW(region->grow(7), std::invalid_argument);
  EXPECT_THROW(region->grow(9), std::invalid_argument);
}

TEST(RegionTest, JoinsNeighbouringExtents) {
  const auto memory = Mapping::anonymous(8 * kPage);
  const auto region =
      Region::adopt({{memory.start(), 2 * kPage}, {memory.start().plus(2 * kPage), 3 * kPage}}, 5 * kPage);
  EXPECT_EQ(region->contiguous({PageNumber{0}, 99}).size(), 5 * kPage);
  EXPECT_EQ(region->capacity_pages(), 7U);
  region->grow(7);
  EXPECT_EQ(region->contiguous({PageNumber{1}, 99}).size(), 6 * kPage);
}

TEST(RegionTest, RefusesWhatCannotBeARegion) {
  const auto memory = Mapping::anonymous(8 * kPage);
  const Address start = memory.start();
  EXPECT_THROW((void)Region::adopt({}, 0), std::invalid_argument);
  EXPECT_THROW((void)Region::adopt({{start.plus(16), kPage}}, kPage), std::invalid_argument);
  EXPECT_THROW((void)Region::adopt({{start, kPage + 1}}, 2 * kPage), std::invalid_argument);
  EXPECT_THROW((void)Region::adopt({{start, 2 * kPage}}, kPage), std::invalid_argument);
  EXPECT_THROW((void)Region::adopt({{start, 2 * kPage}}, 2 * kPage + 1), std::invalid_argument);
  EXPECT_THROW((void)Region::adopt({{start, 0}, {start.plus(kPage), kPage}}, kPage), std::invalid_argument);
  EXPECT_THROW((void)Region::adopt({{start, 2 * kPage}, {start.plus(kPage), kPage}}, kPage),
               std::invalid_argument);
  EXPECT_THROW((void)Region::adopt({{Address{0 - kPage}, 2 * kPage}}, 2 * kPage), std::invalid_argument);
}

TEST(RegionTest, OneClaimAtATime) {
  const auto region = Region::allocate(kPage);
  EXPECT_TRUE(region->claim());
  EXPECT_FALSE(region->claim());
  region->release();
  EXPECT_TRUE(region->claim());
}

TEST(RegionTest, RetireReturnsOnlyWhenEveryUserHasStopped) {
  const auto region = Region::allocate(64 * kPage);
  std::atomic<int> touching{0};
  struct Toucher {
    std::atomic<bool> stop{false};
    std::thread thread;
    std::unique_ptr<Region::User> user;
  };
  std::vector<std::unique_ptr<Toucher>> touchers;
  std::atomic<int> started{0};
  for (int i = 0; i < 3; ++i) {
    touchers.push_back(std::make_unique<Toucher>());
    Toucher& toucher = *touchers.back();
    toucher.user = region->enlist([&toucher] {
      toucher.stop = true;
      toucher.thread.join();
    });
    ASSERT_NE(toucher.user, nullptr);
    toucher.thread = std::thread([&toucher, &touching, &started, &region, i] {
      ++touching;
      ++started;
      const auto page = region->contiguous({PageNumber{static_cast<std::uint64_t>(i)}, 1});
      while (!toucher.stop) page[0] = std::byte(std::to_integer<int>(page[0]) + 1);
      --touching;
    });
  }
  while (started.load() < 3) std::this_thread::yield();
  region->retire();
  EXPECT_EQ(touching.load(), 0);
  EXPECT_TRUE(region->retired());
  EXPECT_EQ(region->enlist([] {}), nullptr);
  region->retire();  // again: at once, although the tokens are still there
}

TEST(RegionTest, ATokenThatWasDroppedIsNotStopped) {
  const auto region = Region::allocate(kPage);
  int stops = 0;
  region->enlist([&] { ++stops; }).reset();
  const auto kept = region->enlist([&] { stops += 10; });
  region->retire();
  EXPECT_EQ(stops, 10);
}

TEST(RegionTest, AStopMayDropItsOwnTokenAndThoseOfOthers) {
  const auto region = Region::allocate(kPage);
  std::unique_ptr<Region::User> own;
  std::unique_ptr<Region::User> other;
  int stops = 0;
  own = region->enlist([&] {
    ++stops;
    own.reset();
    other.reset();
  });
  other = region->enlist([&] { ++stops; });
  region->retire();
  EXPECT_EQ(stops, 1);
}

// retire() is inside the stop when the owner drops the token: the drop must wait, or the stop would run on
// what the owner destroys next.
TEST(RegionTest, DroppingATokenWaitsForItsStop) {
  const auto region = Region::allocate(kPage);
  std::binary_semaphore inside(0);
  std::binary_semaphore go_on(0);
  std::atomic<bool> stop_over{false};
  auto user = region->enlist([&] {
    inside.release();
    go_on.acquire();
    stop_over = true;
  });
  std::thread retirer([&] { region->retire(); });
  inside.acquire();
  std::atomic<bool> dropping{false};
  auto dropped = std::async(std::launch::async, [&] {
    dropping = true;
    user.reset();
    return stop_over.load();
  });
  while (!dropping) std::this_thread::yield();
  // Nothing that could be waited for says "it is blocked"; a drop that does not wait fails here nearly
  // always.
  EXPECT_EQ(dropped.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
  go_on.release();
  EXPECT_TRUE(dropped.get());
  retirer.join();
}

TEST(RegionTest, TwoRetiresAtOnceBothWait) {
  const auto region = Region::allocate(kPage);
  std::binary_semaphore inside(0);
  std::binary_semaphore go_on(0);
  std::atomic<bool> stop_over{false};
  const auto user = region->enlist([&] {
    inside.release();
    go_on.acquire();
    stop_over = true;
  });
  std::thread first([&] { region->retire(); });
  inside.acquire();
  auto second = std::async(std::launch::async, [&] {
    region->retire();
    return stop_over.load();
  });
  EXPECT_EQ(second.wait_for(std::chrono::milliseconds(20)), std::future_status::timeout);
  go_on.release();
  EXPECT_TRUE(second.get());
  first.join();
}

TEST(RegionTest, RetireWaitsForAnOperationInProgress) {
  const auto region = Region::allocate(kPage);
  std::atomic<bool> over{false};
  std::binary_semaphore started(0);
  std::thread operation([&] {
    const RegionUse use(region, "test");
    started.release();
    while (!use.revoked()) std::this_thread::yield();
    over = true;
  });
  started.acquire();
  region->retire();
  EXPECT_TRUE(over.load());
  EXPECT_THROW(RegionUse(region, "test"), RegionGone);
  operation.join();
}

// Users come and go while the region is retired: no stop runs on a dead owner, and all of it ends.
TEST(RegionTest, EnlistingRacesWithRetiring) {
  for (int round = 0; round < 50; ++round) {
    const auto region = Region::allocate(kPage);
    std::atomic<int> refused{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([&] {
        for (;;) {
          auto alive = std::make_unique<std::atomic<int>>(42);
          auto user = region->enlist([&value = *alive] { ASSERT_EQ(value.load(), 42); });
          if (!user) break;
          user.reset();
          alive->store(0);
        }
        ++refused;
      });
    }
    std::thread retirer([&] { region->retire(); });
    for (std::thread& thread : threads) thread.join();
    retirer.join();
    EXPECT_EQ(refused.load(), 3);
  }
}

}  // namespace
}  // namespace memferry
