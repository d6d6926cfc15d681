// Encoded pages at the destination: while memory is filled, after the switch, and every way in which they can be wrong.
#include <gtest/gtest.h>

#include <cstring>

#include "fake_source.h"
#include "os/userfaultfd.h"
#include "packed.h"

namespace memferry::test {
namespace {

constexpr std::uint64_t kPages = 64;

class EncodedBench : public Bench {
 public:
  EncodedBench() : Bench(kPages) { config.encodings = wire::kEncodings; }
  // A frame that claims to be `pages`, with whatever payload.
  bool encoded(std::uint16_t flags, std::uint64_t first, std::span<const std::byte> pages,
               std::span<const std::byte> payload) {
    const wire::FrameHeader header = encoded_header(flags, 0, first, pages, payload.size(), page_size);
    return data(0).raw(&header, sizeof header) && data(0).raw(payload.data(), payload.size());
  }
  bool holds(std::uint64_t first, std::span<const std::byte> pages) const {
    return std::memcmp(page(first), pages.data(), pages.size()) == 0;
  }
};

class ReceiverEncoded : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    bench.config.may_page = GetParam();
    bench.config.keep_page_hashes = true;
    bench.start();
    bench.connect();
  }
  std::size_t pages(std::uint64_t count) const { return static_cast<std::size_t>(count * bench.page_size); }
  // Those pages, and no others, are suspect; sent plainly they are taken.
  void expect_suspect(std::uint64_t first, std::span<const std::byte> right) {
    const Wire::Barrier answer = bench.data(0).barrier(++tag);
    ASSERT_TRUE(answer.answered);
    EXPECT_EQ(answer.suspect_pages, right.size() / bench.page_size);
    ASSERT_EQ(answer.suspects.size(), 1u);
    EXPECT_EQ(answer.suspects[0].first_page, first);
    EXPECT_FALSE(bench.receiver->ready());
    EXPECT_TRUE(bench.data(0).pages(0, first, right, bench.page_size));
    EXPECT_EQ(bench.data(0).barrier(++tag).suspect_pages, 0u);
    EXPECT_TRUE(bench.holds(first, right));
  }
  EncodedBench bench;
  std::uint64_t tag = 0;
};

TEST_P(ReceiverEncoded, RunsAndDeltasFillEveryByte) {
  auto content = packable_bytes(pages(kPages), 1);
  const std::span<const std::byte> all(content);
  EXPECT_TRUE(
      bench.encoded(wire::kFlagLz4, 0, all.first(pages(32)), packed(wire::kFlagLz4, all.first(pages(32)))));
  EXPECT_TRUE(bench.encoded(wire::kFlagZstd, 32, all.subspan(pages(32)),
                            packed(wire::kFlagZstd, all.subspan(pages(32)))));
  EXPECT_EQ(bench.data(0).barrier(++tag).suspect_pages, 0u);
  EXPECT_TRUE(bench.receiver->ready());
  ASSERT_TRUE(bench.holds(0, content));
  auto later = content;
  for (std::uint64_t page = 10; page < 20; ++page) later[pages(page) + 123] ^= std::byte{0x80};
  const auto part = [&](std::span<const std::byte> of) { return of.subspan(pages(10), pages(10)); };
  EXPECT_TRUE(bench.encoded(wire::kFlagDelta, 10, part(later),
                            delta_of(part(content), part(later), bench.page_size)));
  EXPECT_EQ(bench.data(0).barrier(++tag).suspect_pages, 0u);
  EXPECT_TRUE(bench.receiver->ready());
  EXPECT_TRUE(bench.holds(0, later));
  std::vector<std::uint64_t> hashes(kPages);
  hash_pages(later, bench.page_size, hashes.data());
  EXPECT_EQ(bench.receiver->digest(0), xxh3_128(std::as_bytes(std::span(hashes))));
}

TEST_P(ReceiverEncoded, WhatCannotBeDecodedIsSuspect) {
  const auto right = packable_bytes(pages(4), 2);
  for (const std::uint16_t codec : {wire::kFlagLz4, wire::kFlagZstd}) {
    auto damaged = packed(codec, right);
    damaged.resize(damaged.size() / 2);
    EXPECT_TRUE(bench.encoded(codec, 8, right, damaged));
    expect_suspect(8, right);
    // A bomb: eight pages said to be four.
    const auto bomb = packed(codec, packable_bytes(pages(8), 2));
    EXPECT_TRUE(bench.encoded(codec, 12, right, std::span(bomb).first(std::min(bomb.size(), pages(4) - 1))));
    expect_suspect(12, right);
    // Too few of them.
    EXPECT_TRUE(bench.encoded(codec, 16, right, packed(codec, std::span(right).first(pages(2)))));
    expect_suspect(16, right);
    // The right length, and other pages.
    EXPECT_TRUE(bench.encoded(codec, 20, right, packed(codec, packable_bytes(pages(4), 3))));
    expect_suspect(20, right);
  }
}

TEST_P(ReceiverEncoded, ADeltaAgainstAnotherBaseIsSuspect) {
  const auto held = random_bytes(pages(2), 4);
  const auto other = random_bytes(pages(2), 5);
  auto now = other;
  now[9] ^= std::byte{1};
  const auto payload = delta_of(other, now, bench.page_size);
  EXPECT_TRUE(bench.data(0).pages(0, 5, held, bench.page_size));
  EXPECT_TRUE(bench.encoded(wire::kFlagDelta, 5, now, payload));
  expect_suspect(5, now);
  // Of pages that are zeros, that were never sent, that were forgotten, and that are suspect already.
  EXPECT_TRUE(bench.data(0).zeros(0, 20, 2));
  EXPECT_TRUE(bench.encoded(wire::kFlagDelta, 20, now, payload));
  expect_suspect(20, now);
  EXPECT_TRUE(bench.encoded(wire::kFlagDelta, 30, now, payload));
  expect_suspect(30, now);
  EXPECT_TRUE(bench.data(0).pages(0, 40, other, bench.page_size));
  EXPECT_TRUE(bench.data(0).discard(0, {{41, 1}}));
  EXPECT_TRUE(bench.encoded(wire::kFlagDelta, 40, now, payload));
  expect_suspect(40, now);
  EXPECT_TRUE(bench.encoded(wire::kFlagDelta, 50, now, payload));
  EXPECT_TRUE(bench.encoded(wire::kFlagDelta, 50, now, payload));
  expect_suspect(50, now);
}

TEST_P(ReceiverEncoded, ADeltaThatWritesOutsideChangesNothing) {
  auto content = random_bytes(pages(kPages), 6);
  EXPECT_TRUE(bench.data(0).pages(0, 0, content, bench.page_size));
  const std::span<const std::byte> last = std::span<const std::byte>(content).subspan(pages(kPages - 1));
  for (const std::vector<std::uint8_t>& bytes :
       std::vector<std::vector<std::uint8_t>>{{0x80, 0x20, 4, 1, 2, 3, 4, 0, 0},
                                              {0xff, 0x1f, 4, 1, 2, 3, 4, 0, 0},
                                              {0xff, 0xff, 0x7f, 1, 9, 0, 0}}) {
    EXPECT_TRUE(bench.encoded(wire::kFlagDelta, kPages - 1, last, std::as_bytes(std::span(bytes))));
    expect_suspect(kPages - 1, last);
    EXPECT_TRUE(bench.holds(0, content));
  }
}

INSTANTIATE_TEST_SUITE_P(MayPage, ReceiverEncoded, testing::Bool());

TEST(ReceiverEncodedPaging, RunsAreInstalled) {
  if (!Userfaultfd::probe().kernel_faults) GTEST_SKIP() << "no full userfaultfd here";
  EncodedBench bench;
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  ASSERT_TRUE(bench.data(0).switch_over());
  const auto content = packable_bytes(kPages * bench.page_size, 7);
  const auto half = std::span(content).first(content.size() / 2);
  const auto rest = std::span(content).subspan(content.size() / 2);
  EXPECT_TRUE(bench.encoded(wire::kFlagLz4, 0, half, packed(wire::kFlagLz4, half)));
  EXPECT_TRUE(bench.encoded(wire::kFlagZstd, kPages / 2, rest, packed(wire::kFlagZstd, rest)));
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_TRUE(bench.holds(0, content));
}

TEST(ReceiverEncodedPaging, DeltasAndWhatCannotBeDecodedAreCuts) {
  if (!Userfaultfd::probe().kernel_faults) GTEST_SKIP() << "no full userfaultfd here";
  EncodedBench bench;
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  ASSERT_TRUE(bench.data(0).switch_over());
  const auto content = packable_bytes(4 * bench.page_size, 8);
  EXPECT_TRUE(bench.data(0).pages(0, 0, content, bench.page_size));
  EXPECT_TRUE(bench.encoded(wire::kFlagDelta, 0, content, delta_of(content, content, bench.page_size)));
  bench.log.wait(EngineEventKind::kPaused, 0);
  bench.connect(1);
  bench.log.wait(EngineEventKind::kRecovered, 0);
  bench.bitmap();
  auto damaged = packed(wire::kFlagZstd, content);
  damaged.resize(damaged.size() - 1);
  EXPECT_TRUE(bench.encoded(wire::kFlagZstd, 8, content, damaged));
  bench.log.wait(EngineEventKind::kPaused, 1);
  EXPECT_TRUE(bench.holds(0, content));
}

}  // namespace
}  // namespace memferry::test
