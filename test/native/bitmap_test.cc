// AtomicBitmap against a naive model, and its takers against each other.
#include "page/bitmap.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

namespace memferry {
namespace {

// The slow twin: one bool a page.
class Model {
 public:
  explicit Model(std::uint64_t capacity) : bits_(capacity) {}
  std::uint64_t fill(PageRun run, bool value) {
    std::uint64_t changed = 0;
    for (std::uint64_t i = run.first.value; i < run.end().value; ++i) {
      changed += bits_[i] != value ? 1U : 0U;
      bits_[i] = value;
    }
    return changed;
  }
  [[nodiscard]] std::uint64_t count(PageRun run) const {
    std::uint64_t set = 0;
    for (std::uint64_t i = run.first.value; i < run.end().value; ++i) set += bits_[i] ? 1U : 0U;
    return set;
  }
  [[nodiscard]] std::optional<PageRun> next(std::uint64_t from, std::uint64_t end, std::uint64_t max,
                                            bool value) const {
    end = std::min<std::uint64_t>(end, bits_.size());
    while (from < end && bits_[from] != value) ++from;
    if (from >= end || max == 0) return std::nullopt;
    std::uint64_t last = from;
    while (last < end && bits_[last] == value && last - from < max) ++last;
    return PageRun{PageNumber{from}, last - from};
  }
  [[nodiscard]] bool test(std::uint64_t page) const { return bits_[page]; }

 private:
  std::vector<bool> bits_;
};

class BitmapModelTest : public testing::TestWithParam<std::uint64_t> {};

TEST_P(BitmapModelTest, AgreesWithANaiveModelUnderRandomOperations) {
  const std::uint64_t capacity = GetParam();
  std::mt19937_64 random(capacity);
  const auto below = [&](std::uint64_t bound) { return random() % bound; };
  AtomicBitmap bitmap(capacity);
  Model model(capacity);
  for (int step = 0; step < 20000; ++step) {
    const std::uint64_t first = below(capacity);
    const std::uint64_t longest =
        below(4) == 0 ? capacity - first : std::min<std::uint64_t>(capacity - first, 90);
    const PageRun run{PageNumber{first}, below(longest + 1)};
    const std::uint64_t end = first + below(capacity + 70 - first);
    const std::uint64_t max = below(3) == 0 ? ~0ULL : below(130);
    switch (below(9)) {
      case 0:
        ASSERT_EQ(bitmap.set_run(run), model.fill(run, true));
        break;
      case 1:
        ASSERT_EQ(bitmap.clear_run(run), model.fill(run, false));
        break;
      case 2:
        ASSERT_EQ(bitmap.set(PageNumber{first}), model.fill({PageNumber{first}, 1}, true) == 0);
        break;
      case 3:
        ASSERT_EQ(bitmap.clear(PageNumber{first}), model.fill({PageNumber{first}, 1}, false) == 1);
        break;
      case 4:
        ASSERT_EQ(bitmap.count(run), model.count(run));
        break;
      case 5:
        ASSERT_EQ(bitmap.next_set(PageNumber{first}, PageNumber{end}, max),
                  model.next(first, end, max, true));
        break;
      case 6:
        ASSERT_EQ(bitmap.next_clear(PageNumber{first}, PageNumber{end}, max),
                  model.next(first, end, max, false));
        break;
      case 7: {
        const auto taken = bitmap.take_run(PageNumber{first}, PageNumber{end}, max);
        ASSERT_EQ(taken, model.next(first, end, max, true));
        if (taken) {
          ASSERT_EQ(model.fill(*taken, false), taken->count);
        }
        break;
      }
      default:
        ASSERT_EQ(bitmap.test(PageNumber{first}), model.test(first));
        break;
    }
  }
  ASSERT_EQ(bitmap.count(), model.count({PageNumber{0}, capacity}));
  for (std::uint64_t i = 0; i < capacity; ++i) ASSERT_EQ(bitmap.test(PageNumber{i}), model.test(i)) << i;
}

INSTANTIATE_TEST_SUITE_P(Capacities, BitmapModelTest,
                         testing::Values(1, 2, 63, 64, 65, 128, 200, 1000, 4099));

TEST(BitmapTest, AnEmptyBitmapHasNothing) {
  AtomicBitmap bitmap(0);
  EXPECT_EQ(bitmap.count(), 0U);
  EXPECT_EQ(bitmap.words(), 0U);
  EXPECT_FALSE(bitmap.next_set(PageNumber{0}, PageNumber{10}, 10));
  EXPECT_FALSE(bitmap.next_clear(PageNumber{0}, PageNumber{10}, 10));
  EXPECT_THROW(bitmap.set(PageNumber{0}), std::out_of_range);
}

TEST(BitmapTest, RefusesWhatIsBeyondItsCapacity) {
  AtomicBitmap bitmap(100);
  EXPECT_THROW(bitmap.set(PageNumber{100}), std::out_of_range);
  EXPECT_THROW(bitmap.clear(PageNumber{~0ULL}), std::out_of_range);
  EXPECT_THROW((void)bitmap.test(PageNumber{100}), std::out_of_range);
  EXPECT_THROW(bitmap.set_run({PageNumber{99}, 2}), std::out_of_range);
  EXPECT_THROW(bitmap.set_run({PageNumber{50}, ~0ULL}), std::out_of_range);
  EXPECT_THROW(bitmap.clear_run({PageNumber{~0ULL}, 2}), std::out_of_range);
  EXPECT_THROW((void)bitmap.count({PageNumber{1}, 100}), std::out_of_range);
  EXPECT_THROW((void)bitmap.word(2), std::out_of_range);
  EXPECT_THROW(bitmap.or_word(2, 1), std::out_of_range);
  EXPECT_EQ(bitmap.set_run({PageNumber{100}, 0}), 0U);
  EXPECT_EQ(bitmap.count(), 0U);
}

TEST(BitmapTest, WordsMergeAndIgnoreBitsBeyondTheCapacity) {
  AtomicBitmap bitmap(70);
  bitmap.or_word(0, 0x8000000000000001ULL);
  bitmap.or_word(1, ~0ULL);
  EXPECT_EQ(bitmap.word(0), 0x8000000000000001ULL);
  EXPECT_EQ(bitmap.word(1), 0x3fULL);
  EXPECT_EQ(bitmap.count(), 8U);
  EXPECT_EQ(bitmap.next_set(PageNumber{1}, PageNumber{70}, 100), (PageRun{PageNumber{63}, 7}));
}

// Takers, single-bit takers and a late setter at once: every page that was ever set is taken exactly once.
TEST(BitmapTest, NoPageIsTakenTwiceAndNoneIsLost) {
  constexpr std::uint64_t kPages = 20011;
  constexpr int kTakers = 3;
  AtomicBitmap bitmap(kPages);
  std::vector<std::atomic<int>> taken(kPages);
  std::atomic<std::uint64_t> total{0};
  std::atomic<std::uint64_t> set{0};
  const PageNumber end{kPages};
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    std::mt19937_64 random(7);
    for (std::uint64_t at = 0; at < kPages;) {
      const std::uint64_t count = std::min<std::uint64_t>(kPages - at, 1 + random() % 150);
      set += bitmap.set_run({PageNumber{at}, count});
      at += count;
    }
  });
  for (int i = 0; i < kTakers; ++i) {
    threads.emplace_back([&, i] {
      std::mt19937_64 random(static_cast<std::uint64_t>(i));
      while (total.load() < kPages) {
        if (const auto run = bitmap.take_run(PageNumber{random() % kPages}, end, 1 + random() % 100)) {
          for (std::uint64_t p = run->first.value; p < run->end().value; ++p) ++taken[p];
          total += run->count;
        }
        const PageNumber one{random() % kPages};
        if (bitmap.clear(one)) {
          ++taken[one.value];
          ++total;
        }
        // Random starts alone would leave the last few pages to chance.
        if (const auto run = bitmap.take_run(PageNumber{0}, end, 64)) {
          for (std::uint64_t p = run->first.value; p < run->end().value; ++p) ++taken[p];
          total += run->count;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(set.load(), kPages);
  EXPECT_EQ(bitmap.count(), 0U);
  for (std::uint64_t p = 0; p < kPages; ++p) ASSERT_EQ(taken[p].load(), 1) << "page " << p;
}

}  // namespace
}  // namespace memferry
