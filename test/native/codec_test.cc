// lz4 and zstd runs: what comes back is what went in, or it is refused; never a byte beyond the run.
#include "wire/codec.h"

#include <gtest/gtest.h>
#include <lz4.h>
#include <zstd.h>

#include <random>

#include "fake_source.h"
#include "packed.h"

namespace memferry::test {
namespace {

constexpr std::size_t kPage = 4096;

class CodecTest : public testing::TestWithParam<std::uint16_t> {
 protected:
  // Into a buffer with guards on both sides.
  bool decode(std::span<const std::byte> payload, std::size_t length, std::vector<std::byte>* out = nullptr) {
    constexpr std::size_t kGuard = 256;
    std::vector<std::byte> buffer(length + 2 * kGuard, std::byte{0x5a});
    const bool decoded =
        decompressor.decompress(GetParam(), payload, std::span(buffer).subspan(kGuard, length));
    for (std::size_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(buffer[i], std::byte{0x5a});
      EXPECT_EQ(buffer[kGuard + length + i], std::byte{0x5a});
    }
    if (out != nullptr) out->assign(&buffer[kGuard], &buffer[kGuard] + length);
    return decoded;
  }
  wire::Decompressor decompressor;
};

TEST_P(CodecTest, RunsComeBackAsTheyWere) {
  std::mt19937_64 random(1);
  for (int turn = 0; turn < 200; ++turn) {
    const std::size_t length = kPage * (1 + random() % 64);
    std::vector<std::byte> bytes = packable_bytes(length, random());
    // Noise in the middle of it, from none at all to all of it.
    const auto noise = random_bytes(random() % (length + 1) & ~std::size_t{7}, random());
    std::copy(noise.begin(), noise.end(),
              bytes.begin() + static_cast<std::ptrdiff_t>(random() % (length - noise.size() + 1)));
    const auto payload = packed(GetParam(), bytes);
    if (payload.empty()) continue;  // it did not get smaller
    ASSERT_LT(payload.size(), length);
    std::vector<std::byte> back;
    ASSERT_TRUE(decode(payload, length, &back)) << turn;
    ASSERT_EQ(back, bytes) << turn;
  }
}

TEST_P(CodecTest, ZerosAndNoise) {
  const std::vector<std::byte> zeros(64 * kPage);
  const auto payload = packed(GetParam(), zeros);
  ASSERT_GT(payload.size(), 0u);
  EXPECT_LT(payload.size(), kPage);
  std::vector<std::byte> back;
  ASSERT_TRUE(decode(payload, zeros.size(), &back));
  EXPECT_EQ(back, zeros);
  EXPECT_EQ(packed(GetParam(), random_bytes(64 * kPage, 3)).size(), 0u) << "noise does not get smaller";
}

TEST_P(CodecTest, WhatDoesNotFitIsNoRun) {
  const auto bytes = packable_bytes(8 * kPage, 4);
  wire::Compressor codec;
  std::vector<std::byte> small(100);
  EXPECT_EQ(codec.compress(GetParam(), bytes, small), 0u);
}

TEST_P(CodecTest, TruncatedAndLengthenedPayloadsAreRefused) {
  const auto bytes = packable_bytes(4 * kPage, 5);
  auto payload = packed(GetParam(), bytes);
  for (std::size_t length = 0; length < payload.size(); length += 1 + length / 16) {
    EXPECT_FALSE(decode(std::span(payload).first(length), bytes.size())) << length;
  }
  payload.push_back(std::byte{0});
  EXPECT_FALSE(decode(payload, bytes.size()));
}

TEST_P(CodecTest, AnotherLengthIsRefused) {
  const auto bytes = packable_bytes(4 * kPage, 6);
  const auto payload = packed(GetParam(), bytes);
  EXPECT_TRUE(decode(payload, bytes.size()));
  for (const std::size_t length : {std::size_t{0}, kPage, 4 * kPage - 1, 4 * kPage + 1, 64 * kPage}) {
    EXPECT_FALSE(decode(payload, length)) << length;
  }
}

// A small payload of a gigabyte of zeros: it ends at the run's end.
TEST_P(CodecTest, Bombs) {
  const std::vector<std::byte> zeros(64u << 20);
  std::vector<std::byte> bomb(1u << 20);
  if (GetParam() == wire::kFlagLz4) {
    const int length = LZ4_compress_default(reinterpret_cast<const char*>(zeros.data()),
                                            reinterpret_cast<char*>(bomb.data()),
                                            static_cast<int>(zeros.size()), static_cast<int>(bomb.size()));
    ASSERT_GT(length, 0);
    bomb.resize(static_cast<std::size_t>(length));
  } else {
    bomb.resize(ZSTD_compress(bomb.data(), bomb.size(), zeros.data(), zeros.size(), 1));
    ASSERT_FALSE(ZSTD_isError(bomb.size()));
  }
  EXPECT_FALSE(decode(bomb, 64 * kPage));
  EXPECT_FALSE(decode(bomb, kPage));
}

TEST_P(CodecTest, DamagedPayloadsNeitherCrashNorWriteOutside) {
  std::mt19937_64 random(7);
  const auto bytes = packable_bytes(16 * kPage, 8);
  const auto payload = packed(GetParam(), bytes);
  for (int turn = 0; turn < 3000; ++turn) {
    auto damaged = payload;
    for (std::uint64_t i = 0; i <= random() % 8; ++i) {
      damaged[random() % damaged.size()] ^= static_cast<std::byte>(1U << random() % 8);
    }
    (void)decode(damaged, bytes.size());
    (void)decode(random_bytes(random() % 600 & ~std::size_t{7}, random()), kPage * (1 + random() % 4));
  }
}

TEST_P(CodecTest, TheOtherCodecsPayloadIsRefused) {
  const auto bytes = packable_bytes(4 * kPage, 9);
  const std::uint16_t other = GetParam() == wire::kFlagLz4 ? wire::kFlagZstd : wire::kFlagLz4;
  EXPECT_FALSE(decode(packed(other, bytes), bytes.size()));
}

INSTANTIATE_TEST_SUITE_P(Codecs, CodecTest, testing::Values(wire::kFlagLz4, wire::kFlagZstd),
                         [](const auto& of) { return of.param == wire::kFlagLz4 ? "Lz4" : "Zstd"; });

// zstd's decoder takes more than one frame of today's format; this one does not.
TEST(CodecZstd, OneFrameAndNothingElse) {
  const auto bytes = packable_bytes(2 * kPage, 10);
  const auto half = packed(wire::kFlagZstd, std::span(bytes).first(kPage));
  auto two = half;
  const auto rest = packed(wire::kFlagZstd, std::span(bytes).subspan(kPage));
  two.insert(two.end(), rest.begin(), rest.end());
  std::vector<std::byte> out(2 * kPage);
  wire::Decompressor decompressor;
  EXPECT_FALSE(decompressor.decompress(wire::kFlagZstd, two, out));
  // A frame to be skipped, before a right one.
  std::vector<std::byte> skipped{std::byte{0x50}, std::byte{0x2a}, std::byte{0x4d},
                                 std::byte{0x18}, std::byte{1},    std::byte{0},
                                 std::byte{0},    std::byte{0},    std::byte{7}};
  skipped.insert(skipped.end(), half.begin(), half.end());
  EXPECT_FALSE(decompressor.decompress(wire::kFlagZstd, skipped, std::span(out).first(kPage)));
  EXPECT_TRUE(decompressor.decompress(wire::kFlagZstd, half, std::span(out).first(kPage)));
  EXPECT_FALSE(decompressor.decompress(wire::kFlagDelta, half, std::span(out).first(kPage)));
  EXPECT_FALSE(decompressor.decompress(wire::kCompressions, half, std::span(out).first(kPage)));
}

}  // namespace
}  // namespace memferry::test
