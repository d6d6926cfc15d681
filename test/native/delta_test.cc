// Deltas of pages: what comes back is what went in; what is no delta of that length is refused and changes nothing.
#include "wire/delta.h"

#include <gtest/gtest.h>

#include <random>

#include "fake_source.h"
#include "packed.h"

namespace memferry::test {
namespace {

constexpr std::size_t kPage = 4096;

std::vector<std::byte> payload_of(std::initializer_list<int> bytes) {
  std::vector<std::byte> payload;
  for (const int byte : bytes) payload.push_back(static_cast<std::byte>(byte));
  return payload;
}

// What applying it leaves, byte by byte, from the format's definition; nullopt: not a delta of that length.
std::optional<std::vector<std::byte>> naive(std::span<const std::byte> payload,
                                            std::vector<std::byte> pages) {
  std::size_t at = 0;
  std::size_t in = 0;
  const auto varint = [&]() -> std::optional<std::uint64_t> {
    std::uint64_t value = 0;
    for (int i = 0; i < 5; ++i) {
      if (in >= payload.size()) return std::nullopt;
      const auto byte = std::to_integer<std::uint64_t>(payload[in++]);
      value += (byte % 128) << (7 * i);
      if (byte < 128) return value;
    }
    return std::nullopt;
  };
  for (;;) {
    const auto skip = varint();
    const auto length = skip ? varint() : std::nullopt;
    if (!length || *skip > pages.size() - at) return std::nullopt;
    at += *skip;
    if (*length == 0) {
      if (at != pages.size() || in != payload.size()) return std::nullopt;
      return pages;
    }
    if (*length > pages.size() - at || *length > payload.size() - in) return std::nullopt;
    for (std::uint64_t i = 0; i < *length; ++i) pages[at++] = payload[in++];
  }
}

TEST(Delta, RandomChangesComeBackAsTheyWere) {
  std::mt19937_64 random(1);
  for (int turn = 0; turn < 500; ++turn) {
    const std::size_t pages = 1 + random() % 8;
    const auto base = random_bytes(pages * kPage, random());
    auto now = base;
    for (std::uint64_t i = random() % 12; i > 0; --i) {
      const std::size_t at = random() % now.size();
      const std::size_t length =
          std::min<std::size_t>(1 + random() % (random() % 3 == 0 ? 3000 : 20), now.size() - at);
      for (std::size_t j = 0; j < length; ++j) now[at + j] = static_cast<std::byte>(random());
    }
    const auto payload = delta_of(base, now, kPage);
    ASSERT_FALSE(payload.empty());
    auto back = base;
    ASSERT_TRUE(wire::apply_delta(payload, back)) << turn;
    ASSERT_EQ(back, now) << turn;
    ASSERT_EQ(naive(payload, base), now) << turn;
  }
}

TEST(Delta, AFewBytesOfAPageAreAFewBytes) {
  const auto base = random_bytes(16 * kPage, 2);
  auto now = base;
  for (std::size_t page = 0; page < 16; ++page) {
    for (std::size_t i = 0; i < 64; ++i) now[page * kPage + 1000 + i] ^= std::byte{0x55};
  }
  EXPECT_LE(delta_of(base, now, kPage).size(), 16 * (64 + 4) + wire::DeltaEncoder::kEndBytes);
  EXPECT_LE(delta_of(base, base, kPage).size(), wire::DeltaEncoder::kEndBytes);
}

TEST(Delta, APageThatDoesNotFitAddsNothing) {
  const auto base = random_bytes(3 * kPage, 3);
  auto now = base;
  now[10] ^= std::byte{1};
  for (std::size_t i = 0; i < kPage; ++i) now[kPage + i] ^= std::byte{0xff};
  now[2 * kPage + 77] ^= std::byte{1};
  std::vector<std::byte> out(3 * kPage);
  wire::DeltaEncoder encoder(out);
  const auto page = [](std::span<const std::byte> of, std::size_t at) {
    return of.subspan(at * kPage, kPage);
  };
  EXPECT_TRUE(encoder.add(page(base, 0), page(now, 0), kPage / 2));
  EXPECT_FALSE(encoder.add(page(base, 1), page(now, 1), kPage / 2));
  EXPECT_TRUE(encoder.add(page(base, 2), page(now, 2), kPage / 2));
  out.resize(encoder.finish());
  // Pages 0 and 2, one behind the other.
  std::vector<std::byte> back(base.begin(), base.begin() + kPage);
  back.insert(back.end(), base.begin() + 2 * kPage, base.end());
  std::vector<std::byte> wanted(now.begin(), now.begin() + kPage);
  wanted.insert(wanted.end(), now.begin() + 2 * kPage, now.end());
  ASSERT_TRUE(wire::apply_delta(out, back));
  EXPECT_EQ(back, wanted);
}

TEST(Delta, AWrongBaseGivesOtherPages) {
  const auto base = random_bytes(kPage, 4);
  auto now = base;
  now[5] ^= std::byte{1};
  auto other = random_bytes(kPage, 5);
  ASSERT_TRUE(wire::apply_delta(delta_of(base, now, kPage), other));
  EXPECT_NE(other, now);
}

TEST(Delta, WhatWritesOutsideOrDoesNotEndThereIsRefused) {
  std::vector<std::byte> pages(kPage, std::byte{0x11});
  const auto before = pages;
  const std::vector<std::vector<std::byte>> wrong{
      {},
      payload_of({0}),
      payload_of({0x80, 0x20}),                          // no end
      payload_of({0x80, 0x20, 0, 0}),                    // something behind the end
      payload_of({0x81, 0x20, 0}),                       // one byte too far
      payload_of({0xff, 0x1f, 0}),                       // one byte short
      payload_of({0xff, 0x1f, 2, 1, 2, 0, 0}),           // a literal over the end
      payload_of({0xff, 0x1f, 5, 1}),                    // a literal longer than the payload
      payload_of({0, 1}),                                // a literal that is not there
      payload_of({0xff, 0xff, 0xff, 0xff, 0x7f, 0}),     // far away
      payload_of({0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}),  // a varint that is too long
      payload_of({0, 0xff, 0xff, 0xff, 0xff, 0x7f}),
  };
  for (std::size_t i = 0; i < wrong.size(); ++i) {
    EXPECT_FALSE(wire::apply_delta(wrong[i], pages)) << i;
    EXPECT_EQ(pages, before) << i;
  }
  EXPECT_TRUE(wire::apply_delta(payload_of({0x80, 0x20, 0}), pages));
  EXPECT_EQ(pages, before);
}

TEST(Delta, DamagedPayloadsAreJudgedLikeTheFormatSays) {
  std::mt19937_64 random(6);
  const auto base = random_bytes(2 * kPage, 7);
  auto now = base;
  for (int i = 0; i < 30; ++i) now[random() % now.size()] ^= std::byte{0x40};
  const auto payload = delta_of(base, now, kPage);
  for (int turn = 0; turn < 20000; ++turn) {
    auto damaged = payload;
    damaged.resize(damaged.size() - (random() % 4 == 0 ? random() % damaged.size() : 0));
    for (std::uint64_t i = 0; i <= random() % 3 && !damaged.empty(); ++i) {
      damaged[random() % damaged.size()] = static_cast<std::byte>(random());
    }
    auto pages = base;
    const bool applied = wire::apply_delta(damaged, pages);
    const auto expected = naive(damaged, base);
    ASSERT_EQ(applied, expected.has_value()) << turn;
    ASSERT_EQ(pages, expected ? *expected : base) << turn;
  }
}

}  // namespace
}  // namespace memferry::test
