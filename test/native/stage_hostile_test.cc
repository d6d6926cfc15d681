// What a client of a VMD server may not write: each ends its own connection, and never anything more.
#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>

#include "stage_client.h"

namespace memferry::test {
namespace {

using wire::FrameHeader;
using wire::FrameType;
using wire::Holders;
using wire::StageRole;

constexpr Holders kHere{0, Holders::kNobody};
constexpr Holders kReplica{1, 0};  // what comes by a chain
constexpr std::uint64_t kPages = 100;
constexpr std::uint16_t kChainSession = wire::kFirstChainSession + 1;

struct Bad {
  std::string name;
  FrameHeader header;
  std::vector<std::byte> payload;
  bool sealed = true;  // the header's checksum is made to fit
};

FrameHeader header_of(FrameType type, std::uint32_t region = 0, std::uint64_t first = 0,
                      std::uint64_t count = 0, std::uint64_t tag = 0) {
  return wire::make_header(type, region, {PageNumber{first}, count}, tag);
}

// Wrong in any role.
std::vector<Bad> forms() {
  std::vector<Bad> bad;
  const auto add = [&bad](std::string name, FrameHeader header, std::size_t payload = 0) -> Bad& {
    return bad.emplace_back(Bad{std::move(name), header, std::vector<std::byte>(payload), true});
  };
  FrameHeader header = header_of(FrameType::kBarrier);
  header.magic ^= 1;
  add("magic", header);
  for (const unsigned type : {0U, 32U, 99U, 0xffffU}) {
    header = header_of(FrameType::kBarrier);
    header.type = static_cast<std::uint16_t>(type);
    add("type " + std::to_string(type), header);
  }
  for (const FrameType type :
       {FrameType::kDiscard, FrameType::kSwitch, FrameType::kSwitchAck, FrameType::kBarrierAck,
        FrameType::kSuspects, FrameType::kFaultRequest, FrameType::kBitmap, FrameType::kBitmapEnd,
        FrameType::kMapEnd, FrameType::kAbsent, FrameType::kRefused, FrameType::kChainBroken,
        FrameType::kElsewhere, FrameType::kTaken}) {
    const bool lists =
        type == FrameType::kDiscard || type == FrameType::kSuspects || type == FrameType::kBitmap;
    add("somebody else's type " + std::to_string(static_cast<int>(type)), header_of(type, 0, 0, 1),
        lists ? 16 : 0);
  }
  Bad& unsealed = add("checksum of a goodbye", header_of(FrameType::kGoodbye));
  unsealed.sealed = false;
  unsealed.header.checksum = 12345;
  return bad;
}

void add_ranges(std::vector<Bad>& bad, FrameType type, std::uint64_t tag, bool payload_a_page) {
  const auto add = [&](const std::string& name, std::uint32_t region, std::uint64_t first,
                       std::uint64_t count) {
    const std::size_t pages = payload_a_page ? static_cast<std::size_t>(count) : 0;
    bad.push_back({name + " of type " + std::to_string(static_cast<int>(type)),
                   header_of(type, region, first, count, tag),
                   std::vector<std::byte>(pages * system_page_size()), true});
  };
  add("region", 1, 0, 1);
  add("region far off", 0xffffffff, 0, 1);
  add("page behind the end", 0, kPages, 1);
  add("run over the end", 0, kPages - 1, 2);
  add("page far off", 0, ~0ULL, 1);
  add("run that wraps around", 0, ~0ULL - 3, 8);
  if (!payload_a_page) {
    add("no page", 0, 0, 0);
    add("giant count", 0, 0, ~0ULL);
    add("giant count from 1", 0, 1, ~0ULL);
    add("count that wraps to the start", 0, 50, 0ULL - 50);
  }
}

std::vector<Bad> writes(Holders mine) {
  std::vector<Bad> bad = forms();
  const std::size_t page = system_page_size();
  add_ranges(bad, FrameType::kPages, mine.tag(), true);
  add_ranges(bad, FrameType::kZero, mine.tag(), false);
  const auto add = [&bad](std::string name, FrameHeader header, std::size_t payload = 0) -> Bad& {
    return bad.emplace_back(Bad{std::move(name), header, std::vector<std::byte>(payload), true});
  };
  add("pages with no page", header_of(FrameType::kPages, 0, 0, 0, mine.tag()));
  add("pages with too many", header_of(FrameType::kPages, 0, 0, 65, mine.tag()), 65 * page);
  add("pages with a giant count", header_of(FrameType::kPages, 0, 0, ~0ULL, mine.tag()), page);
  add("pages whose payload is short", header_of(FrameType::kPages, 0, 0, 2, mine.tag()), page);
  add("pages whose payload is long", header_of(FrameType::kPages, 0, 0, 1, mine.tag()), 2 * page);
  Bad& huge = add("pages whose payload is huge", header_of(FrameType::kPages, 0, 0, 1, mine.tag()));
  huge.header.payload_bytes = 0xffffffff;
  huge.sealed = false;
  const auto encoded = [&](std::string name, unsigned flags, std::size_t payload) {
    FrameHeader header = header_of(FrameType::kPages, 0, 0, 1, mine.tag());
    header.flags = static_cast<std::uint16_t>(flags);
    header.payload_bytes = static_cast<std::uint32_t>(payload);
    const std::uint64_t hash_of_zeros = xxh3_64(std::vector<std::byte>(page));
    header.checksum = wire::pages_checksum(header, std::span(&hash_of_zeros, 1));
    add(std::move(name), header, payload).sealed = false;
  };
  encoded("pages in two encodings", wire::kFlagLz4 | wire::kFlagZstd, page - 1);
  encoded("a delta that is compressed", wire::kFlagDelta | wire::kFlagLz4, page - 1);
  encoded("a delta of nothing", wire::kFlagDelta, 0);
  encoded("a delta as long as its pages", wire::kFlagDelta, page);
  encoded("an encoded payload of nothing", wire::kFlagLz4, 0);
  encoded("an encoded payload as long as its pages", wire::kFlagZstd, page);
  encoded("an encoded payload longer than its pages", wire::kFlagZstd, page + 1);
  FrameHeader encoded_zeros = header_of(FrameType::kZero, 0, 0, 1, mine.tag());
  encoded_zeros.flags = wire::kFlagLz4;
  add("encoded zeros", encoded_zeros);
  add("zeros with a payload", header_of(FrameType::kZero, 0, 0, 1, mine.tag()), 8);
  add("barrier with a payload", header_of(FrameType::kBarrier), 8);
  add("end of nobody's chain", header_of(FrameType::kChainOver, Holders::kMostServers, 0, 0, 1));
  add("end of a chain beyond measure", header_of(FrameType::kChainOver, 2, 0, 0, 1ULL << 32U));
  add("end of a chain with a payload", header_of(FrameType::kChainOver, 2, 0, 0, 1), 8);
  add("chain beyond measure", header_of(FrameType::kChainOf, 0, 0, 0, 1ULL << 32U));
  add("read from a writer", header_of(FrameType::kRead, 0, 0, 1));
  add("map request from a writer", header_of(FrameType::kMapRequest));
  for (const FrameType type :
       {FrameType::kZero, FrameType::kBarrier, FrameType::kChainOf, FrameType::kChainOver}) {
    Bad& unsealed = add("checksum of type " + std::to_string(static_cast<int>(type)),
                        header_of(type, 0, 0, 1, mine.tag()));
    unsealed.sealed = false;
    unsealed.header.checksum = 1;
  }
  // Holders that make no sense here.
  const std::vector<std::uint64_t> tags = {
      Holders{}.tag(),
      Holders{0, 0}.tag(),
      Holders{1, Holders::kNobody}.tag(),
      Holders{Holders::kDestination, Holders::kNobody}.tag(),
      Holders{Holders::kNobody, 0}.tag(),
      Holders{0, Holders::kDestination}.tag(),
      Holders{0, 251}.tag(),
      Holders{251, 0}.tag(),
      mine.tag() | 1U << 16U,
      mine.tag() | 1ULL << 63U,
  };
  for (const std::uint64_t tag : tags) {
    add("zeros held by " + std::to_string(tag), header_of(FrameType::kZero, 0, 0, 1, tag));
    add("pages held by " + std::to_string(tag), header_of(FrameType::kPages, 0, 0, 1, tag), page);
  }
  return bad;
}

std::vector<Bad> scatters() {
  std::vector<Bad> bad = writes(kHere);
  const std::uint64_t there = Holders{1, Holders::kNobody}.tag();
  const auto add = [&bad](std::string name, FrameHeader header, std::size_t payload,
                          std::uint16_t flags = 0) -> Bad& {
    header.flags = flags;
    return bad.emplace_back(Bad{std::move(name), header, std::vector<std::byte>(payload), true});
  };
  add("map outside", header_of(FrameType::kMap, 0, 99, 2, there), 16);
  add("map of a region that is not", header_of(FrameType::kMap, 1, 0, 1, there), 8);
  add("map that wraps around", header_of(FrameType::kMap, 0, ~0ULL, 2, there), 16);
  add("map with no page", header_of(FrameType::kMap, 0, 0, 0, there), 0);
  add("map without hashes", header_of(FrameType::kMap, 0, 0, 2, there), 0);
  add("map with too few hashes", header_of(FrameType::kMap, 0, 0, 2, there), 8);
  add("map with half a hash", header_of(FrameType::kMap, 0, 0, 2, there), 12);
  add("map with a giant count", header_of(FrameType::kMap, 0, 0, 1ULL << 61U, there), 0);
  add("map of zeros with hashes", header_of(FrameType::kMap, 0, 0, 1, there), 8, wire::kFlagZero);
  add("map of zeros outside", header_of(FrameType::kMap, 0, 0, ~0ULL, there), 0, wire::kFlagZero);
  for (const Holders wrong : {Holders{0, 0}, Holders{3, 3}, Holders{Holders::kNobody, 0}, Holders{251, 1},
                              Holders{0, 251}, Holders{0, Holders::kDestination}}) {
    add("map with holders " + std::to_string(wrong.tag()), header_of(FrameType::kMap, 0, 0, 1, wrong.tag()),
        8);
  }
  add("map with more in its tag", header_of(FrameType::kMap, 0, 0, 1, there | 1ULL << 40U), 8);
  Bad& unsealed = add("checksum of a map", header_of(FrameType::kMap, 0, 0, 1, there), 8);
  unsealed.sealed = false;
  unsealed.header.payload_bytes = 8;
  return bad;
}

std::vector<Bad> chains() {
  std::vector<Bad> bad = writes(kReplica);
  // Right for a source, and for nobody else.
  const std::size_t page = system_page_size();
  bad.push_back({"pages as a source sends them", header_of(FrameType::kPages, 0, 0, 1, kHere.tag()),
                 std::vector<std::byte>(page), true});
  bad.push_back(
      {"map", header_of(FrameType::kMap, 0, 0, 1, Holders{1, 0}.tag()), std::vector<std::byte>(8), true});
  FrameHeader zeros = header_of(FrameType::kMap, 0, 0, 1, Holders{1, 0}.tag());
  zeros.flags = wire::kFlagZero;
  bad.push_back({"map of zeros", zeros, {}, true});
  return bad;
}

std::vector<Bad> reads() {
  std::vector<Bad> bad = forms();
  add_ranges(bad, FrameType::kRead, 5, false);
  const auto add = [&bad](std::string name, FrameHeader header, std::size_t payload = 0) -> Bad& {
    return bad.emplace_back(Bad{std::move(name), header, std::vector<std::byte>(payload), true});
  };
  add("read of too many", header_of(FrameType::kRead, 0, 0, wire::max_run_pages(system_page_size()) + 1));
  add("read with a payload", header_of(FrameType::kRead, 0, 0, 1), 8);
  FrameHeader delta = header_of(FrameType::kRead, 0, 0, 1);
  delta.flags = wire::kFlagDelta;
  add("read that wants deltas", delta);
  add("map request with a payload", header_of(FrameType::kMapRequest), 8);
  add("pages from a reader", header_of(FrameType::kPages, 0, 0, 1, kHere.tag()), system_page_size());
  add("zeros from a reader", header_of(FrameType::kZero, 0, 0, 1, kHere.tag()));
  add("map from a reader", header_of(FrameType::kMap, 0, 0, 1, Holders{1, 2}.tag()), 8);
  add("barrier from a reader", header_of(FrameType::kBarrier));
  for (const FrameType type : {FrameType::kRead, FrameType::kMapRequest}) {
    Bad& unsealed =
        add("checksum of type " + std::to_string(static_cast<int>(type)), header_of(type, 0, 0, 1));
    unsealed.sealed = false;
    unsealed.header.checksum = 99;
  }
  return bad;
}

// A server with an image that has content, zeros and nothing, and whoever must not notice anything of it all.
class HostileStage : public ::testing::Test {
 protected:
  void SetUp() override {
    bench.make(id, {kPages});
    source = bench.scatter(id);
    const auto bytes = random_pages(40, 1);
    ASSERT_TRUE(source->pages(0, 0, bytes, kHere));
    oracle.content(0, 0, bytes);
    ASSERT_TRUE(source->zeros(0, 40, 20, kHere));
    oracle.zeros(0, 40, 20);
    ASSERT_TRUE(source->barrier(1).acknowledged);
    gather = bench.gather(id);
    // Enough sessions for one attempt each: what ends is to end by itself, not by its successor.
    const std::uint16_t first = 10;
    for (std::uint16_t session = first; session < first + 250; ++session) {
      ASSERT_TRUE(bench.stage->add_session(id, session, 7, stage_tokens(id, session, 1)));
    }
  }
  std::unique_ptr<StageClient> fresh(StageRole role) {
    if (role != StageRole::kChain) return bench.connect(id, next_session++, role);
    // Chains have their own sessions: made anew each time.
    EXPECT_TRUE(bench.stage->remove_session(id, kChainSession));
    EXPECT_TRUE(bench.stage->add_session(id, kChainSession, role_bit(StageRole::kChain),
                                         stage_tokens(id, kChainSession)));
    return bench.connect(id, kChainSession, role);
  }
  void each(StageRole role, const std::vector<Bad>& bads) {
    for (const Bad& bad : bads) {
      SCOPED_TRACE(bad.name);
      const auto client = fresh(role);
      FrameHeader header = bad.header;
      if (bad.sealed && header.type == static_cast<std::uint16_t>(FrameType::kPages)) {
        std::vector<std::uint64_t> hashes(bad.payload.size() / system_page_size());
        hash_pages(bad.payload, system_page_size(), hashes.data());
        wire::seal_pages(header, system_page_size(), hashes);
      } else if (bad.sealed) {
        wire::seal(header, bad.payload);
      }
      ASSERT_TRUE(client->wire().raw(&header, sizeof header));
      (void)client->wire().raw(bad.payload.data(), bad.payload.size());
      ASSERT_TRUE(client->ended());
      ASSERT_FALSE(HasFailure());
    }
    oracle.check(*gather);
    EXPECT_TRUE(source->barrier(2).acknowledged);
    while (bench.stage->stats().connections > 2) std::this_thread::yield();
    const StageStats stats = bench.stage->stats();
    EXPECT_EQ(stats.free_bytes, stats.slab_bytes - bench.stage->image(id)->bytes);
  }

  StageBench bench;
  const ImageId id = image_id(1);
  ImageOracle oracle{{kPages}};
  std::unique_ptr<StageClient> source;
  std::unique_ptr<StageClient> gather;
  std::uint16_t next_session = 10;
};

TEST_F(HostileStage, WhatASourceMayNotWrite) { each(StageRole::kScatter, scatters()); }
TEST_F(HostileStage, WhatAnotherServerMayNotWrite) { each(StageRole::kChain, chains()); }
TEST_F(HostileStage, WhatADestinationMayNotWriteAhead) { each(StageRole::kGather, reads()); }
TEST_F(HostileStage, WhatADestinationMayNotWriteOnDemand) { each(StageRole::kDemand, reads()); }

// What the tables above call wrong is so only for what they name: the same frames, right, are taken.
TEST_F(HostileStage, TheSameThingsRightAreTaken) {
  const auto scatter = fresh(StageRole::kScatter);
  const auto bytes = random_pages(1, 8);
  ASSERT_TRUE(scatter->pages(0, kPages - 1, bytes, kHere));
  ASSERT_TRUE(scatter->zeros(0, kPages - 2, 1, kHere));
  ASSERT_TRUE(scatter->map(0, kPages - 3, std::vector<std::uint64_t>{1}, {1, 2}));
  ASSERT_TRUE(scatter->barrier(9).acknowledged);
  const auto chain = fresh(StageRole::kChain);
  ASSERT_TRUE(chain->pages(0, 70, bytes, kReplica));
  ASSERT_TRUE(chain->zeros(0, 71, 1, kReplica));
  ASSERT_TRUE(chain->barrier(9).acknowledged);
  oracle.content(0, kPages - 1, bytes);
  oracle.zeros(0, kPages - 2, 1);
  oracle.content(0, 70, bytes);
  oracle.zeros(0, 71, 1);
  oracle.check(*gather);
}

// A frame that ends anywhere changes nothing, and what was held for it is free again.
TEST_F(HostileStage, HalfFrames) {
  const auto bytes = random_pages(20, 3);
  const FrameHeader header = StageClient::pages_header(0, 60, bytes, kHere);
  std::vector<std::byte> frame(sizeof header + bytes.size());
  std::memcpy(frame.data(), &header, sizeof header);
  std::memcpy(frame.data() + sizeof header, bytes.data(), bytes.size());
  for (const std::size_t cut :
       {std::size_t{0}, std::size_t{1}, std::size_t{47}, std::size_t{48}, std::size_t{49},
        std::size_t{48 + 4096}, std::size_t{48 + 70000}, frame.size() - 1}) {
    const auto client = fresh(StageRole::kScatter);
    ASSERT_TRUE(client->wire().raw(frame.data(), cut));
    ::shutdown(client->fd(), SHUT_WR);
    ASSERT_TRUE(client->ended()) << cut;
  }
  std::vector<std::uint64_t> hashes(20, 7);
  FrameHeader map = header_of(FrameType::kMap, 0, 0, 20, Holders{1, 2}.tag());
  wire::seal(map, std::as_bytes(std::span(hashes)));
  for (const std::size_t cut : {std::size_t{0}, std::size_t{8}, std::size_t{159}}) {
    const auto client = fresh(StageRole::kScatter);
    ASSERT_TRUE(client->wire().raw(&map, sizeof map) && client->wire().raw(hashes.data(), cut));
    ::shutdown(client->fd(), SHUT_WR);
    ASSERT_TRUE(client->ended()) << cut;
  }
  each(StageRole::kScatter, {});
}

// Nothing that arrives makes it hang or crash, and none of it is taken for something else.
TEST_F(HostileStage, NoiseOfAnyKind) {
  std::mt19937 random(5);
  for (int turn = 0; turn < 60; ++turn) {
    const auto role = static_cast<StageRole>(random() % 3);
    const auto client = fresh(role);
    // A right frame with some of its bits turned over, then noise.
    FrameHeader header = role == StageRole::kScatter ? header_of(FrameType::kZero, 0, 1, 2, kHere.tag())
                                                     : header_of(FrameType::kRead, 0, 1, 2, 3);
    wire::seal(header);
    auto* bytes = reinterpret_cast<std::uint8_t*>(&header);
    bytes[random() % sizeof header] ^= static_cast<std::uint8_t>(1U << random() % 8);
    std::vector<std::uint8_t> noise(random() % 3000);
    for (auto& byte : noise) byte = static_cast<std::uint8_t>(random());
    ASSERT_TRUE(client->wire().raw(&header, sizeof header));
    (void)client->wire().raw(noise.data(), noise.size());
    ASSERT_TRUE(client->ended()) << turn;
  }
  each(StageRole::kScatter, {});
}

// What its socket holds is minutes of work: whoever drops the image waits for none of it.
TEST(StageQueue, DroppingDoesNotWaitForWhatIsQueued) {
  constexpr std::uint64_t kMany = 4ULL << 20;
  const StageBench bench(256ULL << 20);
  const ImageId id = image_id(1);
  bench.make(id, {kMany});
  const auto source = bench.scatter(id);
  FrameHeader zeros = header_of(FrameType::kZero, 0, 0, kMany, kHere.tag());
  wire::seal(zeros);
  const std::vector<FrameHeader> frames(2000, zeros);
  ASSERT_TRUE(source->wire().raw(frames.data(), frames.size() * sizeof zeros));
  while (bench.stage->image(id)->pages_zero < kMany)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const auto began = std::chrono::steady_clock::now();
  EXPECT_TRUE(bench.stage->drop(id));
  // All frames would take far longer.
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(30));
}

}  // namespace
}  // namespace memferry::test
