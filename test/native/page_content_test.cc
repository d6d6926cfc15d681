// is_zero and diff_pages against naive twins.
#include <gtest/gtest.h>

#include <random>
#include <stdexcept>
#include <vector>

#include "page/diff.h"
#include "page/zero.h"

namespace memferry {
namespace {

TEST(ZeroTest, FindsOneSetBitAnywhere) {
  for (const std::size_t size : {1U, 7U, 8U, 9U, 255U, 256U, 257U, 4096U}) {
    std::vector<std::byte> bytes(size);
    EXPECT_TRUE(is_zero(bytes)) << size;
    for (std::size_t at = 0; at < size; ++at) {
      bytes[at] = std::byte{0x80};
      ASSERT_FALSE(is_zero(bytes)) << at << " of " << size;
      bytes[at] = std::byte{0};
    }
  }
  EXPECT_TRUE(is_zero({}));
}

TEST(ZeroTest, TakesBytesFromAnyAddress) {
  std::vector<std::byte> bytes(5000);
  for (std::size_t start = 0; start < 16; ++start) {
    const auto part = std::span<const std::byte>(bytes).subspan(start, 4096);
    bytes[start + 4096] = std::byte{1};  // just behind it
    if (start > 0) bytes[start - 1] = std::byte{1};
    EXPECT_TRUE(is_zero(part));
    bytes[start + 4096] = bytes[start] = std::byte{0};
    if (start > 0) bytes[start - 1] = std::byte{0};
  }
}

TEST(DiffTest, GivesMaximalRunsOfDifferentPages) {
  constexpr std::uint64_t kPageSize = 512;
  constexpr std::uint64_t kPages = 200;
  std::mt19937_64 random(3);
  for (int round = 0; round < 50; ++round) {
    std::vector<std::byte> a(kPageSize * kPages);
    for (std::byte& byte : a) byte = static_cast<std::byte>(random());
    std::vector<std::byte> b = a;
    for (std::uint64_t i = random() % (kPages * 2); i > 0; --i) {
      const std::uint64_t page = random() % kPages;
      b[page * kPageSize + random() % kPageSize] ^= std::byte{1};
    }
    std::vector<PageRun> expected;
    for (std::uint64_t page = 0; page < kPages; ++page) {
      bool same = true;
      for (std::uint64_t i = 0; i < kPageSize; ++i)
        same = same && a[page * kPageSize + i] == b[page * kPageSize + i];
      if (same) continue;
      if (!expected.empty() && expected.back().end().value == page) {
        ++expected.back().count;
      } else {
        expected.push_back({PageNumber{page}, 1});
      }
    }
    EXPECT_EQ(diff_pages(a, b, kPageSize), expected);
  }
}

TEST(DiffTest, RefusesUnequalLengthsAndHalfPages) {
  const std::vector<std::byte> a(1024);
  const std::vector<std::byte> b(512);
  EXPECT_THROW((void)diff_pages(a, b, 512), std::invalid_argument);
  EXPECT_THROW((void)diff_pages(a, a, 1000), std::invalid_argument);
  EXPECT_THROW((void)diff_pages(a, a, 0), std::invalid_argument);
  EXPECT_TRUE(diff_pages({}, {}, 512).empty());
}

}  // namespace
}  // namespace memferry
