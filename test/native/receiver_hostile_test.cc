// A peer that knows the secret and says wrong things, and peers that do not know it.
#include <gtest/gtest.h>

#include <sys/resource.h>
#include <cstring>
#include <functional>
#include <random>
#include <thread>

#include "fake_source.h"
#include "os/userfaultfd.h"
#include "packed.h"

namespace memferry::test {
namespace {

constexpr std::uint64_t kPages = 64;

struct Attack {
  const char* name;
  std::function<void(Bench&)> act;
};

// Each ends the migration with an error, and the memory around the region is not touched.
std::vector<Attack> attacks() {
  const auto bare = [](wire::FrameType type, PageRun run, std::uint32_t payload_bytes,
                       std::uint32_t region = 0) {
    return [=](Bench& bench) {
      wire::FrameHeader header = wire::make_header(type, region, run);
      header.payload_bytes = payload_bytes;
      header.checksum = wire::payload_checksum(header, {});
      bench.data(0).raw(&header, sizeof header);
    };
  };
  const auto page_size = static_cast<std::uint32_t>(Bench::page_size_of());
  // One page, said to be encoded.
  const auto coded = [](unsigned flags, std::uint32_t payload_bytes) {
    return [=](Bench& bench) {
      const auto content = random_bytes(Bench::page_size_of(), 9);
      const wire::FrameHeader header = encoded_header(static_cast<std::uint16_t>(flags), 0, 3, content,
                                                      payload_bytes, Bench::page_size_of());
      bench.data(0).raw(&header, sizeof header);
      const std::vector<std::byte> payload(payload_bytes);
      bench.data(0).raw(payload.data(), payload.size());
    };
  };
  const std::uint64_t huge = ~std::uint64_t{0};
  const auto zeros = [](std::uint64_t first, std::uint64_t count) {
    return [=](Bench& bench) { bench.data(0).zeros(0, first, count); };
  };
  const auto discards = [](std::uint64_t first, std::uint64_t count) {
    return [=](Bench& bench) { bench.data(0).discard(0, {{0, 1}, {first, count}}); };
  };
  return {
      {"garbage",
       [](Bench& bench) {
         const auto junk = random_bytes(4096, 1);
         bench.data(0).raw(junk.data(), junk.size());
       }},
      {"garbage on the demand channel",
       [](Bench& bench) {
         const auto junk = random_bytes(4096, 2);
         bench.demand().raw(junk.data(), junk.size());
       }},
      {"truncated header",
       [](Bench& bench) {
         bench.data(0).raw("MFF1", 4);
         bench.data(0).close();
       }},
      {"wrong magic",
       [](Bench& bench) {
         wire::FrameHeader header{};
         bench.data(0).raw(&header, sizeof header);
       }},
      {"unknown type", bare(static_cast<wire::FrameType>(99), {PageNumber{0}, 1}, 0)},
      {"oversized payload", bare(wire::FrameType::kPages, {PageNumber{0}, 1u << 20}, 0xffffffffU)},
      {"payload that is not page count times page size",
       bare(wire::FrameType::kPages, {PageNumber{0}, 2}, page_size)},
      {"no pages", bare(wire::FrameType::kPages, {PageNumber{0}, 0}, 0)},
      {"pages behind the end", bare(wire::FrameType::kPages, {PageNumber{kPages}, 1}, page_size)},
      {"pages across the end", bare(wire::FrameType::kPages, {PageNumber{kPages - 1}, 2}, 2 * page_size)},
      {"page number that overflows", bare(wire::FrameType::kPages, {PageNumber{huge}, 2}, 2 * page_size)},
      {"no such region", bare(wire::FrameType::kPages, {PageNumber{0}, 1}, page_size, 1)},
      {"no such region, huge", bare(wire::FrameType::kZero, {PageNumber{0}, 1}, 0, 0xffffffffU)},
      {"zeros across the end", zeros(kPages - 1, 2)},
      {"zeros that overflow", zeros(1, huge)},
      {"zeros with a payload", bare(wire::FrameType::kZero, {PageNumber{0}, 1}, 16)},
      {"zeros with a wrong checksum",
       [](Bench& bench) {
         wire::FrameHeader header = wire::make_header(wire::FrameType::kZero, 0, {PageNumber{0}, 1});
         bench.data(0).raw(&header, sizeof header);
       }},
      {"discard outside", discards(kPages, 1)},
      {"discard that overflows", discards(huge, 2)},
      {"discard of nothing", discards(3, 0)},
      {"discards that overlap", discards(0, 2)},
      {"discards that descend",
       [](Bench& bench) {
         bench.data(0).discard(0, {{5, 1}, {3, 1}});
       }},
      {"discard on another channel",
       [](Bench& bench) {
         bench.data(1).discard(0, {{0, 1}});
       }},
      {"discard of half a run",
       [](Bench& bench) {
         const std::byte half[8] = {};
         bench.data(0).frame(wire::FrameType::kDiscard, 0, {}, 0, half);
       }},
      {"a switch that was not agreed on",
       [](Bench& bench) { bench.data(0).frame(wire::FrameType::kSwitch); }},
      {"an answer", [](Bench& bench) { bench.data(0).frame(wire::FrameType::kBarrierAck, 0, {}, 1); }},
      {"how far it is", [](Bench& bench) { bench.data(0).frame(wire::FrameType::kTaken, 0, {}, 1); }},
      {"a fault request",
       [](Bench& bench) {
         bench.demand().frame(wire::FrameType::kFaultRequest, 0, {PageNumber{0}, 1});
       }},
      {"pages in two encodings", coded(wire::kFlagLz4 | wire::kFlagZstd, page_size - 1)},
      {"a delta that is compressed", coded(wire::kFlagDelta | wire::kFlagLz4, page_size - 1)},
      {"an encoding that was not agreed on", coded(wire::kFlagZstd, page_size - 1)},
      {"an encoded payload of nothing", coded(wire::kFlagLz4, 0)},
      {"an encoded payload as long as its pages", coded(wire::kFlagLz4, page_size)},
      {"an encoded payload longer than its pages", coded(wire::kFlagLz4, page_size + 1)},
      {"encoded zeros",
       [](Bench& bench) {
         wire::FrameHeader header = wire::make_header(wire::FrameType::kZero, 0, {PageNumber{0}, 1});
         header.flags = wire::kFlagLz4;
         wire::seal(header);
         bench.data(0).raw(&header, sizeof header);
       }},
      {"a bitmap",
       [](Bench& bench) {
         const std::byte word[8] = {};
         bench.demand().frame(wire::FrameType::kBitmap, 0, {}, 0, word);
       }},
  };
}

TEST(ReceiverHostile, EveryBadFrameWhileFillingEndsItClearly) {
  for (const Attack& attack : attacks()) {
    SCOPED_TRACE(attack.name);
    Bench bench(kPages);
    bench.start();
    bench.connect();
    attack.act(bench);
    const EngineEvent failed = bench.log.wait(EngineEventKind::kFailed);
    EXPECT_FALSE(failed.message.empty());
    EXPECT_TRUE(failed.code == "PROTOCOL" || failed.code == "CHECKSUM" || failed.code == "CHANNEL_LOST")
        << failed.code;
    EXPECT_TRUE(bench.data(1).ended() || bench.data(0).ended());
    EXPECT_FALSE(bench.receiver->ready());
    for (const std::byte byte : bench.memory()) ASSERT_EQ(byte, std::byte{0});
  }
}

TEST(ReceiverHostile, EveryBadFrameWhilePagingIsACutAndTooManyAreALoss) {
  if (!Userfaultfd::probe().kernel_faults) GTEST_SKIP() << "no full userfaultfd here";
  const auto content = random_bytes(kPages * Bench::page_size_of(), 3);
  const auto all = attacks();
  std::size_t next = 0;
  while (next < all.size()) {
    Bench bench(kPages);
    bench.config.paging_from_start = true;
    bench.config.loss_grace = 0ms;
    bench.start();
    bench.connect();
    ASSERT_TRUE(bench.data(0).switch_over());
    EXPECT_TRUE(bench.data(0).pages(0, 0, std::span(content).first(content.size() / 2), bench.page_size));
    EXPECT_TRUE(bench.data(0).barrier(1).answered);
    std::uint32_t epoch = 0;
    for (; epoch < 3 && next < all.size(); ++epoch, ++next) {
      // The one is a cut and no bad frame, the other is right here.
      const std::string name = all[next].name;
      if (name == "truncated header" || name == "a switch that was not agreed on") ++next;
      SCOPED_TRACE(all[next].name);
      all[next].act(bench);
      bench.log.wait(EngineEventKind::kPaused, epoch);
      bench.connect(epoch + 1);
      bench.log.wait(EngineEventKind::kRecovered, epoch);
      bench.bitmap();
      EXPECT_EQ(std::memcmp(bench.memory().data(), content.data(), content.size() / 2), 0);
    }
    if (epoch == 3) {
      const wire::FrameHeader torn =
          Wire::pages_header(0, 40, std::span(content).first(bench.page_size), bench.page_size);
      EXPECT_TRUE(bench.data(0).raw(&torn, sizeof torn) &&
                  bench.data(0).raw(content.data() + 5, bench.page_size));
      EXPECT_EQ(bench.log.wait(EngineEventKind::kLost).code, "CHECKSUM");
      EXPECT_EQ(try_read(bench.page(40)), std::nullopt);
    }
  }
}

// What the sockets hold is minutes of work: closing waits for none of it.
TEST(ReceiverHostile, ClosingDoesNotWaitForWhatIsQueued) {
  constexpr std::uint64_t kMany = 4ULL << 20;
  Bench bench(kMany);
  bench.start();
  bench.connect();
  wire::FrameHeader zeros = wire::make_header(wire::FrameType::kZero, 0, {PageNumber{0}, kMany});
  wire::seal(zeros);
  const std::vector<wire::FrameHeader> frames(80000, zeros);
  ASSERT_TRUE(bench.demand().raw(frames.data(), frames.size() * sizeof zeros));
  while (bench.receiver->stats().pages_zero < kMany) std::this_thread::sleep_for(1ms);
  const auto began = std::chrono::steady_clock::now();
  bench.receiver->close();
  // 80000 frames would take far longer.
  EXPECT_LT(std::chrono::steady_clock::now() - began, 30s);
}

TEST(ReceiverHostile, TheSamePagesOnTwoChannelsAtOnce) {
  Bench bench(kPages);
  bench.start();
  bench.connect();
  const auto content = random_bytes(8 * bench.page_size, 4);
  const wire::FrameHeader header = Wire::pages_header(0, 0, content, bench.page_size);
  EXPECT_TRUE(bench.data(0).raw(&header, sizeof header) &&
              bench.data(0).raw(content.data(), bench.page_size));
  // Channel 0 is in the middle of them; which of the two is found out does not matter.
  EXPECT_TRUE(bench.data(1).raw(&header, sizeof header));
  EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "PROTOCOL");
}

TEST(ReceiverHostile, WrongHellosAllGetTheSameAnswer) {
  Bench bench(kPages);
  bench.start();
  std::vector<wire::Hello> wrong(8, bench.hello(0, 0));
  wrong[0].migration[0] ^= 1;
  wrong[1].version = 2;
  wrong[2].token[31] ^= 1;
  wrong[3].token[0] ^= 0x80;
  wrong[4].channel = 7;
  wrong[5].channel = 1;  // with channel 0's token
  wrong[6].epoch = 1000;
  wrong[7].epoch = 0xffffffffU;
  for (const wire::Hello& hello : wrong) EXPECT_EQ(bench.say(hello), wire::HelloStatus::kRefused);
  EXPECT_EQ(bench.say(bench.hello(0, 1)), wire::HelloStatus::kRefused);  // right, but nothing was cut
  EXPECT_EQ(bench.log.count(EngineEventKind::kFirstChannel), 0U);
  std::unique_ptr<Wire> right;
  EXPECT_EQ(bench.say(bench.hello(0, 0), &right), wire::HelloStatus::kAccepted);
  EXPECT_EQ(bench.say(bench.hello(0, 0)), wire::HelloStatus::kRefused);  // replayed
  // The one that was accepted is none the worse for it.
  EXPECT_TRUE(right->barrier(5).answered);
  bench.listener->remove(bench.config.migration);
  EXPECT_EQ(bench.say(bench.hello(1, 0)), wire::HelloStatus::kRefused);
}

TEST(ReceiverHostile, ReplayedHellosOfFormerEpochs) {
  if (!Userfaultfd::probe().kernel_faults) GTEST_SKIP() << "no full userfaultfd here";
  Bench bench(kPages);
  bench.config.paging_from_start = true;
  bench.start();
  bench.connect();
  ASSERT_TRUE(bench.data(0).switch_over());
  bench.data(0).close();
  bench.log.wait(EngineEventKind::kPaused);
  EXPECT_EQ(bench.say(bench.hello(0, 0)), wire::HelloStatus::kRefused);
  bench.connect(2);
  EXPECT_EQ(bench.say(bench.hello(0, 1)), wire::HelloStatus::kRefused);  // older, though never used
  EXPECT_EQ(bench.say(bench.hello(0, 2)), wire::HelloStatus::kRefused);
  bench.log.wait(EngineEventKind::kRecovered);
}

// Frames that are right on their own, wrong ones, and bytes that are no frames, in any order: whatever comes,
// the receiver neither crashes nor hangs, nor writes outside its region.
TEST(ReceiverHostile, RandomStreamsOfFrames) {
  const bool can_page = Userfaultfd::probe().kernel_faults;
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937_64 random(seed);
    const std::uint64_t page_size = Bench::page_size_of();
    auto owner = Region::allocate((kPages + 2) * page_size);
    std::byte* const guard = owner->address(PageNumber{0}).pointer();
    std::memset(guard, 0x3c, page_size);
    std::memset(guard + (kPages + 1) * page_size, 0x3c, page_size);
    Bench bench(1);
    bench.regions = {
        Region::adopt({Extent{owner->address(PageNumber{1}), kPages * page_size}}, kPages * page_size)};
    bench.config.regions = bench.regions;
    bench.config.recover_timeout = 5ms;
    bench.config.loss_grace = 0ms;
    bench.config.may_page = can_page && seed % 2 == 0;
    bench.config.paging_from_start = can_page && seed % 4 == 0;
    bench.start();
    bench.connect();
    const auto content = random_bytes(16 * page_size, seed);
    for (int i = 0; i < 40; ++i) {
      Wire& wire = *bench.wires[random() % 3];
      const std::uint64_t first = random() % (kPages + (random() % 8 == 0 ? 4 : 0));
      const std::uint64_t count = 1 + random() % 16;
      switch (random() % 9) {
        case 0:
        case 1:
        case 2: {
          const std::uint64_t inside = std::min(count, kPages - std::min(first, kPages - 1));
          wire.pages(0, first, std::span(content).first(inside * page_size), page_size);
          break;
        }
        case 3:
          wire.zeros(0, first, std::min(count, kPages - std::min(first, kPages - 1)));
          break;
        case 4:
          bench.data(0).discard(0, {{first % kPages, 1}});
          break;
        case 5:
          wire.frame(wire::FrameType::kBarrier, 0, {}, random());
          break;
        case 6:
          if (random() % 4 == 0) bench.data(0).frame(wire::FrameType::kSwitch);
          break;
        case 7:
          if (random() % 8 == 0)
            wire.frame(static_cast<wire::FrameType>(random() % 16), static_cast<std::uint32_t>(random() % 3),
                       {PageNumber{random() % 80}, random() % 80});
          break;
        default:
          if (random() % 8 == 0) wire.raw(content.data(), random() % 200);
      }
    }
    bench.wires.clear();
    bench.listener->close();
    bench.receiver->close();
    for (std::uint64_t i = 0; i < page_size; ++i) {
      ASSERT_EQ(guard[i], std::byte{0x3c});
      ASSERT_EQ(guard[(kPages + 1) * page_size + i], std::byte{0x3c});
    }
  }
}

}  // namespace
}  // namespace memferry::test
