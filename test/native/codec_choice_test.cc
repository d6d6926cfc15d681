// The choice of a codec: pure, so every story is told in figures.
#include "wire/codec_choice.h"

#include <gtest/gtest.h>

#include "wire/frame.h"

namespace memferry::wire {
namespace {

constexpr double kMb = 1e6;
constexpr std::uint64_t kChunk = 256 * 1024;

// A connection with data that packs like this, simulated: the link takes `link` bytes/s, the thread hands over raw
// bytes at `thread` bytes/s when it does not compress.
struct World {
  double link = 12.5 * kMb;
  double thread = 3000 * kMb;
  double share = 1;  // of the CPU
  CodecFigures lz4{500 * kMb, 0.5};
  CodecFigures zstd{250 * kMb, 0.33};
  std::uint64_t tried = 0;

  // One window of 20 ms.
  void step(CodecChoice& choice) {
    const std::uint16_t encoding = choice.encoding();
    const CodecFigures& used = encoding == kFlagLz4 ? lz4 : zstd;
    const double ratio = encoding == 0 ? 1 : used.ratio;
    const double able = share * (encoding == 0 ? thread : 1 / (1 / used.rate + 1 / thread));
    const double raw = std::min(able, link / ratio);
    const bool full = link / ratio <= able;
    std::uint64_t left = static_cast<std::uint64_t>(raw / 50);
    while (left > 0) {
      const std::uint64_t now = std::min(left, kChunk);
      if (const std::uint16_t wanted = choice.to_try(); wanted != 0) {
        for (const std::uint16_t each : {kFlagLz4, kFlagZstd}) {
          if ((wanted & each) == 0 || !choice.worth_trying(each)) continue;
          ++tried;
          use(choice, each, 65536);
        }
        choice.tried_all();
      }
      if (encoding != 0) use(choice, encoding, now);
      choice.sent(now);
      left -= now;
    }
    choice.measured(std::min(raw * ratio, link), raw, full);
  }
  void use(CodecChoice& choice, std::uint16_t encoding, std::uint64_t raw) const {
    const CodecFigures& used = encoding == kFlagLz4 ? lz4 : zstd;
    choice.used(encoding, raw, static_cast<std::uint64_t>(static_cast<double>(raw) * used.ratio),
                static_cast<double>(raw) / used.rate);
  }
  void steps(CodecChoice& choice, int count) {
    for (int i = 0; i < count; ++i) step(choice);
  }
};

TEST(CodecChoice, PredictsTheSlowerOfThreadAndLink) {
  EXPECT_DOUBLE_EQ(predicted_rate(100 * kMb, {0, 0.5}), 0) << "nothing is known";
  EXPECT_DOUBLE_EQ(predicted_rate(100 * kMb, {1e12, 0.5}), 200 * kMb);
  EXPECT_LT(predicted_rate(100 * kMb, {150 * kMb, 0.5}), 150 * kMb);
  EXPECT_GT(predicted_rate(100 * kMb, {150 * kMb, 0.5}), 140 * kMb);
}

TEST(CodecChoice, ChangesOnlyForMoreThanALittle) {
  const CodecFigures lz4{500 * kMb, 0.5};
  const CodecFigures a_bit_better{500 * kMb, 0.47};
  const CodecFigures much_better{500 * kMb, 0.3};
  EXPECT_EQ(better_codec(0, 20 * kMb, lz4, {}), kFlagLz4);
  EXPECT_EQ(better_codec(0, 20 * kMb, lz4, a_bit_better), kFlagZstd);
  EXPECT_EQ(better_codec(kFlagLz4, 20 * kMb, lz4, a_bit_better), kFlagLz4);
  EXPECT_EQ(better_codec(kFlagLz4, 20 * kMb, lz4, much_better), kFlagZstd);
  const CodecFigures hardly{500 * kMb, 0.93};
  EXPECT_EQ(better_codec(0, 20 * kMb, hardly, {}), 0);
  EXPECT_EQ(better_codec(kFlagLz4, 20 * kMb, hardly, {}), kFlagLz4);
  EXPECT_EQ(better_codec(kFlagLz4, 20 * kMb, {500 * kMb, 0.99}, {}), 0);
  EXPECT_EQ(better_codec(kFlagLz4, 900 * kMb, lz4, {}), 0) << "slower than the link";
}

TEST(CodecChoice, ASlowLinkGetsTheCodecThatPacksBest) {
  World world;
  CodecChoice choice(Compress::kAuto, kCompressions);
  world.steps(choice, CodecChoice::kFullWindows);
  EXPECT_EQ(choice.encoding(), 0) << "not before anything is known";
  world.steps(choice, 2);
  EXPECT_EQ(choice.encoding(), kFlagZstd);
  world.steps(choice, 2000);
  EXPECT_EQ(choice.encoding(), kFlagZstd);
}

TEST(CodecChoice, AFasterLinkGetsTheFasterCodec) {
  World world;
  world.link = 150 * kMb;
  world.zstd = {160 * kMb, 0.33};
  CodecChoice choice(Compress::kAuto, kCompressions);
  world.steps(choice, 10);
  EXPECT_EQ(choice.encoding(), kFlagLz4);
}

TEST(CodecChoice, ALinkThatOutrunsEveryCodecIsLeftAlone) {
  World world;
  world.link = 2500 * kMb;
  CodecChoice choice(Compress::kAuto, kCompressions);
  world.steps(choice, 500);
  EXPECT_EQ(choice.encoding(), 0);
  EXPECT_EQ(world.tried, 0u) << "even a perfect ratio could not pay";
}

TEST(CodecChoice, AThreadThatIsTheBottleneckIsGivenNothingToDo) {
  World world;
  world.link = 10000 * kMb;
  world.thread = 400 * kMb;
  CodecChoice choice(Compress::kAuto, kCompressions);
  world.steps(choice, 500);
  EXPECT_EQ(choice.encoding(), 0);
  EXPECT_EQ(world.tried, 0u);
}

TEST(CodecChoice, NoiseIsTriedMoreAndMoreSeldom) {
  World world;
  world.lz4.ratio = world.zstd.ratio = 1;
  world.link = 100 * kMb;
  CodecChoice choice(Compress::kAuto, kCompressions);
  world.steps(choice, 500);  // 10 s, 1 GB
  EXPECT_EQ(choice.encoding(), 0);
  EXPECT_GT(world.tried, 4u);
  EXPECT_LE(world.tried, 24u);
}

TEST(CodecChoice, DataThatChangesIsNoticedBothWays) {
  World world;
  CodecChoice choice(Compress::kAuto, kCompressions);
  world.steps(choice, 20);
  ASSERT_NE(choice.encoding(), 0);
  const World before = world;
  world.lz4.ratio = world.zstd.ratio = 1;
  world.steps(choice, 60);
  EXPECT_EQ(choice.encoding(), 0);
  world.lz4 = before.lz4;
  world.zstd = before.zstd;
  world.steps(choice, 400);
  EXPECT_NE(choice.encoding(), 0);
}

TEST(CodecChoice, ALinkThatBecomesFastIsFoundOut) {
  World world;
  CodecChoice choice(Compress::kAuto, kCompressions);
  world.steps(choice, 20);
  ASSERT_NE(choice.encoding(), 0);
  world.link = 5000 * kMb;
  world.steps(choice, 200);
  EXPECT_EQ(choice.encoding(), 0);
  world.link = 12.5 * kMb;
  world.steps(choice, 50);
  EXPECT_NE(choice.encoding(), 0);
}

// Four threads on two CPUs: zstd would be the better one alone.
TEST(CodecChoice, SharedCpusGetTheCheaperCodec) {
  World world;
  world.link = 62 * kMb;
  CodecChoice alone(Compress::kAuto, kCompressions);
  world.steps(alone, 20);
  EXPECT_EQ(alone.encoding(), kFlagZstd);
  world.share = 0.4;
  CodecChoice choice(Compress::kAuto, kCompressions);
  world.steps(choice, 40);
  EXPECT_EQ(choice.encoding(), kFlagLz4);
  world.share = 1;
  world.steps(choice, 1000);
  EXPECT_EQ(choice.encoding(), kFlagZstd);
}

TEST(CodecChoice, ForcedCodecsStay) {
  for (const auto& [mode, encoding] : {std::pair{Compress::kLz4, kFlagLz4}, {Compress::kZstd, kFlagZstd}}) {
    World world;
    world.link = 5000 * kMb;
    world.lz4.ratio = world.zstd.ratio = 1;
    CodecChoice choice(mode, kCompressions);
    world.steps(choice, 50);
    EXPECT_EQ(choice.encoding(), encoding);
  }
}

TEST(CodecChoice, NothingThatWasNotAgreedOn) {
  EXPECT_EQ(CodecChoice(Compress::kLz4, kFlagZstd).encoding(), 0);
  EXPECT_EQ(CodecChoice(Compress::kZstd, 0).encoding(), 0);
  World world;
  CodecChoice only_lz4(Compress::kAuto, kFlagLz4 | kFlagDelta);
  world.steps(only_lz4, 100);
  EXPECT_EQ(only_lz4.encoding(), kFlagLz4);
  CodecChoice none(Compress::kAuto, kFlagDelta);
  world.tried = 0;
  world.steps(none, 100);
  EXPECT_EQ(none.encoding(), 0);
  EXPECT_EQ(world.tried, 0u);
}

}  // namespace
}  // namespace memferry::wire
