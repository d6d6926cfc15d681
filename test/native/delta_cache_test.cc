// What the source remembers of pages that it has sent.
#include "transfer/delta_cache.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <thread>

#include "fake_source.h"

namespace memferry::test {
namespace {

constexpr std::size_t kPage = 4096;

std::vector<std::byte> page_of(std::uint64_t seed) { return random_bytes(kPage, seed); }

constexpr wire::Holders kThere{wire::Holders::kDestination, wire::Holders::kNobody};

std::optional<std::vector<std::byte>> get(DeltaCache& cache, std::uint32_t region, std::uint64_t page,
                                          wire::Holders to = kThere) {
  std::vector<std::byte> bytes(kPage);
  if (!cache.get(region, PageNumber{page}, to, bytes)) return std::nullopt;
  return bytes;
}

TEST(DeltaCache, GivesWhatAnEarlierRoundHasSent) {
  DeltaCache cache(1 << 20, kPage);
  cache.put(0, PageNumber{7}, kThere, page_of(1));
  EXPECT_EQ(get(cache, 0, 7), std::nullopt) << "not acknowledged yet";
  cache.next_round();
  EXPECT_EQ(get(cache, 0, 7), page_of(1));
  EXPECT_EQ(get(cache, 1, 7), std::nullopt);
  EXPECT_EQ(get(cache, 0, 8), std::nullopt);
  cache.put(0, PageNumber{7}, kThere, page_of(2));
  cache.next_round();
  EXPECT_EQ(get(cache, 0, 7), page_of(2));
}

// Whoever was sent another version of a page, or never had it, is given no delta against this one.
TEST(DeltaCache, GivesWhatWasSentToThatReceiver) {
  DeltaCache cache(1 << 20, kPage);
  constexpr wire::Holders kAlone{0, wire::Holders::kNobody};
  constexpr wire::Holders kTwice{0, 1};
  cache.put(0, PageNumber{1}, kAlone, page_of(1));
  cache.put(0, PageNumber{2}, kTwice, page_of(2));
  cache.next_round();
  EXPECT_EQ(get(cache, 0, 1, kAlone), page_of(1));
  EXPECT_EQ(get(cache, 0, 2, kTwice), page_of(2));
  for (const wire::Holders other : {kThere, kTwice, wire::Holders{1, wire::Holders::kNobody}}) {
    EXPECT_EQ(get(cache, 0, 1, other), std::nullopt);
  }
  for (const wire::Holders other : {kThere, kAlone, wire::Holders{1, 0}}) {
    EXPECT_EQ(get(cache, 0, 2, other), std::nullopt);
  }
  cache.put(0, PageNumber{1}, kThere, page_of(3));
  cache.next_round();
  EXPECT_EQ(get(cache, 0, 1, kAlone), std::nullopt) << "sent elsewhere since";
  EXPECT_EQ(get(cache, 0, 1), page_of(3));
}

TEST(DeltaCache, ForgetsRunsShortAndLong) {
  DeltaCache cache(1 << 20, kPage);
  for (std::uint64_t page = 0; page < 64; ++page)
    cache.put(page % 2, PageNumber{page}, kThere, page_of(page + 1));
  cache.next_round();
  cache.forget(0, {PageNumber{10}, 3});
  EXPECT_EQ(get(cache, 0, 10), std::nullopt);
  EXPECT_EQ(get(cache, 1, 11), page_of(12));
  EXPECT_EQ(get(cache, 0, 12), std::nullopt);
  EXPECT_EQ(get(cache, 0, 14), page_of(15));
  cache.forget(1, {PageNumber{0}, 1ULL << 40});
  for (std::uint64_t page = 1; page < 64; page += 2) EXPECT_EQ(get(cache, 1, page), std::nullopt);
  EXPECT_EQ(get(cache, 0, 14), page_of(15));
}

TEST(DeltaCache, PagesOfOneRoundDoNotPushEachOtherOut) {
  DeltaCache cache(64 * (kPage + 16), kPage);
  for (std::uint64_t page = 0; page < 1000; ++page) cache.put(0, PageNumber{page}, kThere, page_of(page + 1));
  cache.next_round();
  std::size_t held = 0;
  for (std::uint64_t page = 0; page < 1000; ++page) {
    const auto bytes = get(cache, 0, page);
    held += bytes.has_value() ? 1 : 0;
    EXPECT_EQ(bytes.has_value(), page < held) << page;
    if (bytes) {
      EXPECT_EQ(*bytes, page_of(page + 1));
    }
  }
  EXPECT_GE(held, 60u);
  EXPECT_LE(held, 64u);
  // The next round's do, those longest unsent first.
  cache.put(0, PageNumber{900}, kThere, page_of(5000));
  cache.next_round();
  EXPECT_EQ(get(cache, 0, 900), page_of(5000));
}

TEST(DeltaCache, HoldsNothingBelowASetAndAfterItsEnd) {
  DeltaCache small(100, kPage);
  small.put(0, PageNumber{1}, kThere, page_of(1));
  small.next_round();
  EXPECT_EQ(get(small, 0, 1), std::nullopt);
  DeltaCache cache(1 << 20, kPage);
  EXPECT_LE(cache.memory_bytes(), 1u << 20);
  cache.put(0, PageNumber{1}, kThere, page_of(1));
  cache.next_round();
  cache.close();
  EXPECT_EQ(get(cache, 0, 1), std::nullopt);
  EXPECT_GT(cache.memory_bytes(), 0u);
  cache.end();
  EXPECT_EQ(get(cache, 0, 1), std::nullopt);
  cache.put(0, PageNumber{1}, kThere, page_of(1));
  cache.forget(0, {PageNumber{0}, 100});
  cache.next_round();
  EXPECT_EQ(get(cache, 0, 1), std::nullopt);
  EXPECT_EQ(cache.memory_bytes(), 0u);
}

// Against a map: whatever it gives is what was put last, and was not forgotten.
TEST(DeltaCache, RandomCallsOfAllKinds) {
  std::mt19937_64 random(3);
  DeltaCache cache(200 * kPage, kPage);
  std::map<std::pair<std::uint32_t, std::uint64_t>, std::uint64_t> last;
  std::size_t given = 0;
  for (std::uint64_t turn = 1; turn < 20000; ++turn) {
    const auto region = static_cast<std::uint32_t>(random() % 2);
    const std::uint64_t page = random() % 400;
    switch (random() % 8) {
      case 0:
        cache.next_round();
        break;
      case 1: {
        const std::uint64_t count = random() % 4 == 0 ? 1 + random() % 400 : 1 + random() % 3;
        cache.forget(region, {PageNumber{page}, count});
        for (std::uint64_t i = 0; i < count; ++i) last.erase({region, page + i});
        break;
      }
      case 2:
      case 3:
      case 4: {
        const auto bytes = get(cache, region, page);
        if (!bytes) break;
        ++given;
        const auto right = last.find({region, page});
        ASSERT_NE(right, last.end());
        ASSERT_EQ(*bytes, page_of(right->second));
        break;
      }
      default:
        cache.put(region, PageNumber{page}, kThere, page_of(turn));
        last[{region, page}] = turn;
    }
  }
  EXPECT_GT(given, 500u);
}

TEST(DeltaCache, ManyThreadsAtOnce) {
  DeltaCache cache(100 * kPage, kPage);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i) {
    threads.emplace_back([&cache, i] {
      std::mt19937_64 random(i);
      std::vector<std::byte> bytes(kPage);
      for (int turn = 0; turn < 2000; ++turn) {
        const PageNumber page{random() % 150};
        std::fill(bytes.begin(), bytes.end(), static_cast<std::byte>(page.value));
        cache.put(0, page, kThere, bytes);
        if (turn % 100 == 0) cache.next_round();
        if (cache.get(0, page, kThere, bytes)) {
          ASSERT_TRUE(std::all_of(bytes.begin(), bytes.end(), [&](std::byte each) {
            return each == static_cast<std::byte>(page.value);
          }));
        }
        if (turn % 37 == 0) cache.forget(0, {page, 2});
        if (i == 0 && turn == 1500) cache.end();
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace
}  // namespace memferry::test
