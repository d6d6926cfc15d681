// A VMD server as its clients see it: what is written is what is read, byte by byte, whatever the order.
#include "stage/stage.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <chrono>
#include <numeric>
#include <random>
#include <thread>

#include "page/keyed_hash.h"
#include "stage_client.h"
#include "wire/later_tokens.h"

namespace memferry::test {
namespace {

using wire::FrameType;
using wire::Holders;
using wire::StageRole;
using Clock = std::chrono::steady_clock;

// A sanitizer's own memory is no part of the cap.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(thread_sanitizer) || __has_feature(address_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

constexpr Holders kHere{0, Holders::kNobody};

TEST(Stage, StoresOverwritesAndReadsBack) {
  StageBench bench;
  const ImageId id = image_id(1);
  bench.make(id, {300, 70});
  ImageOracle oracle({300, 70});
  const auto source = bench.scatter(id);
  const auto gather = bench.gather(id);
  const auto demand = bench.demand(id);

  const auto first = random_pages(130, 1);
  ASSERT_TRUE(source->pages(0, 5, first, kHere));
  oracle.content(0, 5, first);
  const auto other_region = random_pages(3, 2);
  ASSERT_TRUE(source->pages(1, 67, other_region, kHere));
  oracle.content(1, 67, other_region);
  ASSERT_TRUE(source->zeros(0, 200, 100, kHere));
  oracle.zeros(0, 200, 100);
  // Content over content, zeros over content, content over zeros.
  const auto second = random_pages(20, 3);
  ASSERT_TRUE(source->pages(0, 60, second, kHere));
  oracle.content(0, 60, second);
  ASSERT_TRUE(source->zeros(0, 70, 3, kHere));
  oracle.zeros(0, 70, 3);
  ASSERT_TRUE(source->pages(0, 71, random_pages(1, 4), kHere));
  oracle.content(0, 71, random_pages(1, 4));
  ASSERT_TRUE(source->pages(0, 299, random_pages(1, 5), kHere));
  oracle.content(0, 299, random_pages(1, 5));
  const auto barrier = source->barrier(77);
  EXPECT_TRUE(barrier.acknowledged);
  EXPECT_TRUE(barrier.refused.empty());
  oracle.check(*gather);
  oracle.check(*demand);

  const auto stats = bench.stage->image(id);
  ASSERT_TRUE(stats);
  EXPECT_EQ(stats->pages_held, oracle.held());
  EXPECT_EQ(stats->pages_zero, 101U);
  EXPECT_EQ(stats->pages_known, oracle.held() + 101);
  EXPECT_EQ(stats->bytes, (oracle.held() + 3) * system_page_size()) << "content, and 2 + 1 blocks of index";
  EXPECT_GT(stats->bytes_in, 150 * system_page_size());
  EXPECT_GT(stats->bytes_out, 2 * oracle.held() * system_page_size());
}

TEST(Stage, AnythingInAnyOrder) {
  StageBench bench;
  const ImageId id = image_id(1);
  bench.make(id, {150, 40}, 3);
  ImageOracle oracle({150, 40});
  const auto source = bench.scatter(id);
  const auto gather = bench.gather(id);
  std::mt19937 random(99);
  const Holders here{3, Holders::kNobody};
  const Holders elsewhere{1, 2};
  for (unsigned turn = 0; turn < 600; ++turn) {
    const std::uint32_t region = random() % 3 == 0 ? 1 : 0;
    const std::uint64_t pages = region == 0 ? 150 : 40;
    const std::uint64_t first = random() % pages;
    const std::uint64_t count = 1 + random() % std::min<std::uint64_t>(pages - first, 30);
    switch (random() % 5) {
      case 0:
      case 1: {
        const auto bytes = random_pages(count, turn);
        ASSERT_TRUE(source->pages(region, first, bytes, here));
        oracle.content(region, first, bytes);
        break;
      }
      case 2:
        ASSERT_TRUE(source->zeros(region, first, count, here));
        oracle.zeros(region, first, count);
        break;
      case 3:
        ASSERT_TRUE(source->map(region, first, std::vector<std::uint64_t>(count, turn), elsewhere));
        oracle.absent(region, first, count);
        break;
      default:
        ASSERT_TRUE(source->map_bare(region, first, count, elsewhere, wire::kFlagZero));
        oracle.zeros(region, first, count);
        break;
    }
    if (turn % 60 != 59) continue;
    ASSERT_TRUE(source->barrier(turn).acknowledged);
    ASSERT_NO_FATAL_FAILURE(oracle.check(*gather));
    ASSERT_FALSE(HasFailure());
    ASSERT_EQ(bench.stage->image(id)->pages_held, oracle.held());
  }
  const StageStats stats = bench.stage->stats();
  EXPECT_EQ(stats.free_bytes, stats.slab_bytes - bench.stage->image(id)->bytes)
      << "no slot was lost on the way";
}

TEST(Stage, PipelinedReadsAreAnsweredInOrder) {
  StageBench bench;
  const ImageId id = image_id(1);
  bench.make(id, {64});
  const auto source = bench.scatter(id);
  ASSERT_TRUE(source->pages(0, 0, random_pages(10, 1), kHere));
  ASSERT_TRUE(source->zeros(0, 10, 10, kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  const auto demand = bench.demand(id);
  for (std::uint64_t tag = 0; tag < 40; ++tag) ASSERT_TRUE(demand->ask(0, tag % 20, 30, tag));
  for (std::uint64_t tag = 0; tag < 40; ++tag) {
    const auto frames = demand->answer(0, tag % 20, 30, tag);
    ASSERT_EQ(frames.size(), tag % 20 < 10 ? 3U : 2U);
    EXPECT_TRUE(frames.back().is(FrameType::kAbsent));
  }
}

TEST(Stage, TheMapSaysWhoHoldsWhatInMaximalRuns) {
  StageBench bench(64ULL << 20U);
  const ImageId id = image_id(1);
  const std::uint64_t pages = 70000;
  bench.make(id, {pages, 10});
  const auto source = bench.scatter(id);
  std::vector<std::uint64_t> hashes(40000);
  std::iota(hashes.begin(), hashes.end(), 5U);
  // In pieces, as a source sends them: one run all the same. More than a frame of hashes.
  for (std::uint64_t at = 0; at < hashes.size(); at += 8000) {
    ASSERT_TRUE(source->map(0, 100 + at, std::span(hashes).subspan(at, 8000), {1, 2}));
  }
  ASSERT_TRUE(source->map_bare(0, 50000, 20000, {Holders::kDestination, Holders::kNobody}, 0));
  const auto content = random_pages(2, 1);
  ASSERT_TRUE(source->pages(0, 90, content, kHere));
  ASSERT_TRUE(source->zeros(1, 3, 4, kHere));
  ASSERT_TRUE(source->map_bare(1, 7, 3, kHere, wire::kFlagZero));
  ASSERT_TRUE(source->barrier(1).acknowledged);

  const auto gather = bench.gather(id);
  const auto map = gather->read_map();
  ASSERT_TRUE(map.ended);
  EXPECT_FALSE(map.sealed);
  struct Expected {
    std::uint32_t region;
    std::uint64_t first, count;
    Holders holders;
    bool zero;
    std::vector<std::uint64_t> hashes;
  };
  const std::vector<Expected> expected = {
      {0, 90, 2, kHere, false, hashes_of(content)},
      {0, 100, 32768, {1, 2}, false, {hashes.begin(), hashes.begin() + 32768}},
      {0, 32868, 7232, {1, 2}, false, {hashes.begin() + 32768, hashes.end()}},
      {0, 50000, 20000, {Holders::kDestination, Holders::kNobody}, false, {}},
      {1, 3, 7, kHere, true, {}},
  };
  if (system_page_size() != 4096) GTEST_SKIP() << "the runs are those of pages of 4 KiB";
  ASSERT_EQ(map.runs.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const wire::FrameHeader& header = map.runs[i].header;
    EXPECT_EQ(header.region, expected[i].region) << i;
    EXPECT_EQ(header.first_page, expected[i].first) << i;
    EXPECT_EQ(header.page_count, expected[i].count) << i;
    EXPECT_EQ(Holders::of(header.tag), expected[i].holders) << i;
    EXPECT_EQ((header.flags & wire::kFlagZero) != 0, expected[i].zero) << i;
    ASSERT_EQ(map.runs[i].payload.size(), expected[i].hashes.size() * 8) << i;
    const auto bytes = std::as_bytes(std::span(expected[i].hashes));
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), map.runs[i].payload.begin())) << i;
  }
  EXPECT_TRUE(bench.stage->seal(id));
  EXPECT_TRUE(gather->read_map().sealed);
  EXPECT_TRUE(bench.stage->image(id)->sealed);
}

TEST(Stage, AMapRecordDecidesWhatStays) {
  StageBench bench;
  const ImageId id = image_id(1);
  bench.make(id, {20});
  ImageOracle oracle({20});
  const auto source = bench.scatter(id);
  const auto bytes = random_pages(20, 1);
  const auto hashes = hashes_of(bytes);
  ASSERT_TRUE(source->pages(0, 0, bytes, kHere));
  oracle.content(0, 0, bytes);
  // Still ours, as first or second; somebody else's; the destination's; another content that we are said to hold.
  ASSERT_TRUE(source->map(0, 0, std::span(hashes).subspan(0, 2), kHere));
  ASSERT_TRUE(source->map(0, 2, std::span(hashes).subspan(2, 2), {4, 0}));
  ASSERT_TRUE(source->map(0, 4, std::span(hashes).subspan(4, 2), {4, 5}));
  ASSERT_TRUE(source->map_bare(0, 6, 2, {Holders::kDestination, Holders::kNobody}, 0));
  ASSERT_TRUE(source->map(0, 8, std::vector<std::uint64_t>{1, 2}, kHere));
  ASSERT_TRUE(source->map_bare(0, 10, 2, kHere, wire::kFlagZero));
  // Nobody's: it is not known any more.
  ASSERT_TRUE(source->map(0, 12, std::vector<std::uint64_t>{1, 2}, {}));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  oracle.absent(0, 4, 6);
  oracle.zeros(0, 10, 2);
  oracle.absent(0, 12, 2);
  oracle.check(*bench.gather(id));
  const auto stats = bench.stage->image(id);
  EXPECT_EQ(stats->pages_held, 10U);
  EXPECT_EQ(stats->pages_known, 18U);
  const StageStats all = bench.stage->stats();
  EXPECT_EQ(all.free_bytes, all.slab_bytes - stats->bytes);
}

TEST(Stage, WholeWhenEveryPageIsHeldOrZero) {
  StageBench bench;
  const ImageId id = image_id(1);
  bench.make(id, {10, 5});
  const auto source = bench.scatter(id);
  const auto whole = [&](std::vector<std::uint64_t> pages) {
    EXPECT_TRUE(source->barrier(1).acknowledged);
    return bench.stage->whole(id, pages);
  };
  EXPECT_EQ(whole({0, 0}), true);
  EXPECT_EQ(whole({1, 0}), false);
  ASSERT_TRUE(source->pages(0, 0, random_pages(4, 1), kHere));
  ASSERT_TRUE(source->zeros(0, 5, 5, kHere));
  ASSERT_TRUE(source->map_bare(1, 0, 5, {Holders::kDestination, Holders::kNobody}, 0));
  EXPECT_EQ(whole({4, 0}), true);
  EXPECT_EQ(whole({10, 0}), false);
  ASSERT_TRUE(source->map(0, 4, std::vector<std::uint64_t>{7}, {3, Holders::kNobody}));
  EXPECT_EQ(whole({10, 0}), true);
  EXPECT_EQ(whole({10, 1}), false) << "the destination is no server";
  EXPECT_EQ(whole({11}), false);
  EXPECT_EQ(whole({10, 0, 0}), false);
  EXPECT_EQ(bench.stage->whole(image_id(9), {}), std::nullopt);
}

TEST(Stage, ImagesAreKeptApart) {
  StageBench bench;
  const ImageId one = image_id(1);
  const ImageId two = image_id(2);
  bench.make(one, {32});
  bench.make(two, {32});
  ImageOracle first({32});
  ImageOracle second({32});
  const auto to_one = bench.scatter(one);
  const auto to_two = bench.scatter(two);
  ASSERT_TRUE(to_one->pages(0, 0, random_pages(32, 1), kHere));
  first.content(0, 0, random_pages(32, 1));
  ASSERT_TRUE(to_two->pages(0, 0, random_pages(16, 2), kHere));
  second.content(0, 0, random_pages(16, 2));
  ASSERT_TRUE(to_one->barrier(1).acknowledged);
  ASSERT_TRUE(to_two->barrier(1).acknowledged);
  first.check(*bench.gather(one));
  second.check(*bench.gather(two));

  // A token of one says nothing to the other.
  wire::Hello hello = stage_hello(one, StageBench::kDestination, StageRole::kDemand, 3);
  hello.migration = two;
  EXPECT_EQ(bench.say(hello), wire::HelloStatus::kRefused);
  EXPECT_TRUE(bench.stage->drop(one));
  second.check(*bench.gather(two, 1));
  EXPECT_EQ(bench.say(stage_hello(one, StageBench::kDestination, StageRole::kDemand, 3)),
            wire::HelloStatus::kLost);
}

std::vector<std::byte> bytes_of(const HeldState& state) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(state.size()));
  // Across the bounds of its pages.
  for (std::size_t at = 0; at < bytes.size(); at += 1000)
    state.read(at, std::span(bytes).subspan(at, std::min<std::size_t>(1000, bytes.size() - at)));
  return bytes;
}

bool put_state(Stage& stage, const ImageId& image, std::span<const std::byte> bytes) {
  const auto state = stage.make_state(bytes.size());
  if (!state) return false;
  for (std::size_t at = 0; at < bytes.size(); at += 1500)
    state->write(at, bytes.subspan(at, std::min<std::size_t>(1500, bytes.size() - at)));
  return stage.put_state(image, state);
}

// Behind the end of its table a session's tokens follow from a key in it.
TEST(Stage, TokensOfLaterAttempts) {
  StageBench bench(16ULL << 20U);
  const ImageId id = image_id(1);
  bench.make(id, {4});
  const auto table = stage_tokens(id, StageBench::kDestination);
  const auto attempts = static_cast<std::uint32_t>(table.size() / wire::kStageRoles);
  const auto say = [&](wire::StageRole role, std::uint32_t attempt, wire::StageRole token_of) {
    wire::Hello hello = stage_hello(id, StageBench::kDestination, role, attempt);
    hello.token = wire::session_token(table, token_of, attempt).value();
    return bench.say(hello);
  };
  using enum wire::StageRole;
  using enum wire::HelloStatus;
  for (const std::uint32_t attempt : {attempts, attempts + 1, attempts + 1000, 0xffffU}) {
    EXPECT_EQ(say(kGather, attempt, kDemand), kRefused);
    EXPECT_EQ(say(kGather, attempt, kGather), kAccepted) << attempt;
    EXPECT_EQ(say(kGather, attempt, kGather), kRefused) << "it was used";
    EXPECT_EQ(say(kDemand, attempt, kDemand), kAccepted);
    // Not this session's to do.
    EXPECT_EQ(say(kScatter, attempt, kScatter), kRefused);
  }
  EXPECT_EQ(say(kGather, attempts + 2, kGather), kRefused) << "a later one was used";
  EXPECT_EQ(wire::session_token(table, kGather, 0x10000), std::nullopt);
  const std::span first(table.data(), 2 * std::size_t{wire::kStageRoles});
  EXPECT_EQ(wire::session_token(first, kGather, 1), table[wire::kStageRoles + 1]);
  EXPECT_EQ(wire::session_token(first, kGather, 2), std::nullopt) << "no key in it";
  // What others must compute alike: docs/protocol.md.
  wire::TreeKey key{};
  for (std::size_t at = 0; at < key.size(); ++at) key[at] = static_cast<std::uint8_t>(at);
  const wire::Token token = wire::later_token(key, 2, 0x1234);
  std::array<std::uint32_t, 8> words{};
  for (std::size_t half = 0; half < 2; ++half)
    std::ranges::copy(std::array<std::uint32_t, 4>{0x1234, 2, static_cast<std::uint32_t>(half), 0},
                      words.begin() + static_cast<std::ptrdiff_t>(4 * half));
  std::array<KeyedHash, 2> hashes{};
  KeyedHasher(key).pages(std::as_bytes(std::span(words)), 16, hashes.data());
  EXPECT_EQ(std::memcmp(token.data(), hashes.data(), token.size()), 0);
}

TEST(Stage, ExecutionStates) {
  StageBench bench(16ULL << 20U);
  const ImageId id = image_id(1);
  EXPECT_FALSE(bench.stage->put_state(id, bench.stage->make_state(0)));
  bench.make(id, {4});
  EXPECT_EQ(bench.stage->state(id), nullptr);
  std::shared_ptr<const HeldState> former;
  std::vector<std::byte> before;
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{4096}, std::size_t{100003}}) {
    const auto state = random_bytes(bytes, bytes);
    EXPECT_TRUE(put_state(*bench.stage, id, state));
    EXPECT_EQ(bytes_of(*bench.stage->state(id)), state);
    // Whoever reads the one that was replaced reads on.
    if (former) {
      EXPECT_EQ(bytes_of(*former), before);
    }
    former = bench.stage->state(id);
    before = state;
  }
  former.reset();
  // What comes counts before any of it is there, and no more once nobody wants it.
  const std::uint64_t free = bench.stage->stats().free_bytes;
  EXPECT_EQ(bench.stage->make_state(free + 1), nullptr);
  auto coming = bench.stage->make_state(free / 2);
  ASSERT_NE(coming, nullptr);
  EXPECT_LE(bench.stage->stats().free_bytes, free - free / 2);
  EXPECT_THROW(coming->write(free / 2 - 1, random_bytes(2, 1)), std::invalid_argument);
  EXPECT_THROW(coming->write(free / 2 + 1, {}), std::invalid_argument);
  EXPECT_THROW(coming->write(~0ULL, random_bytes(2, 1)), std::invalid_argument);
  coming.reset();
  EXPECT_EQ(bench.stage->stats().free_bytes, free);
  EXPECT_EQ(bytes_of(*bench.stage->state(id)), random_bytes(100003, 100003));
  EXPECT_EQ(bench.stage->image(id)->bytes,
            system_page_size() + (100003 / system_page_size() + 1) * system_page_size());
  EXPECT_TRUE(bench.stage->drop(id));
  EXPECT_EQ(bench.stage->stats().free_bytes, bench.stage->stats().slab_bytes);
}

// Laws of the cap: what does not fit is refused by name, nothing older is read in its place, and dropping gives all of
// it back.
TEST(Stage, RefusesWhatDoesNotFitAndGivesAllBack) {
  const std::uint64_t memory = 16ULL << 20U;
  const std::uint64_t idle = resident_bytes();
  StageBench bench(memory);
  const ImageId id = image_id(1);
  const std::uint64_t pages = memory / system_page_size();
  bench.make(id, {pages});
  const auto source = bench.scatter(id);
  const auto bytes = random_pages(64, 1);
  const std::uint64_t page_bytes = system_page_size();
  for (std::uint64_t at = 0; at + 64 <= pages; at += 64) ASSERT_TRUE(source->pages(0, at, bytes, kHere));
  const auto barrier = source->barrier(1);
  ASSERT_TRUE(barrier.acknowledged);
  ASSERT_FALSE(barrier.refused.empty());
  std::uint64_t refused = 0;
  for (const auto& run : barrier.refused) refused += run.count;
  const std::uint64_t held = pages - refused;
  EXPECT_EQ(bench.stage->image(id)->pages_held, held);
  EXPECT_EQ(bench.stage->stats().free_bytes, 0U);
  EXPECT_GE(held, (memory - memory / 4) / page_bytes * 98 / 100);
  if (!kSanitized) {
    EXPECT_LT(resident_bytes(), idle + memory);
  }
  // The last run that fitted may be split: exactly what is not refused is there.
  EXPECT_EQ(barrier.refused.front().first, held);
  ImageOracle oracle({pages});
  for (std::uint64_t at = 0; at + 64 <= held; at += 64) oracle.content(0, at, bytes);
  oracle.content(0, held / 64 * 64, std::span(bytes).first(held % 64 * page_bytes));
  oracle.check(*bench.gather(id));

  // Full, and yet what is there can be replaced: its own old room is enough.
  const auto newer = random_pages(64, 2);
  ASSERT_TRUE(source->pages(0, 128, newer, kHere));
  oracle.content(0, 128, newer);
  // Half of it new: the old half's room holds one half, the other half is refused.
  ASSERT_TRUE(source->pages(0, held - 10, std::span(newer).first(20 * page_bytes), kHere));
  const auto again = source->barrier(2);
  ASSERT_TRUE(again.acknowledged);
  std::uint64_t lacking = 0;
  for (const auto& run : again.refused) {
    lacking += run.count;
    oracle.absent(0, run.first, run.count);
  }
  EXPECT_EQ(lacking, 10U);
  ASSERT_EQ(again.refused.size(), 1U);
  ASSERT_GE(again.refused[0].first, held - 10);
  ASSERT_LE(again.refused[0].first, held + 10);
  oracle.content(0, held - 10, std::span(newer).first((again.refused[0].first - (held - 10)) * page_bytes));
  oracle.check(*bench.gather(id, 1));

  const std::uint64_t full = resident_bytes();
  EXPECT_TRUE(bench.stage->drop(id));
  EXPECT_TRUE(source->ended());
  EXPECT_EQ(bench.stage->stats().free_bytes, bench.stage->stats().slab_bytes);
  EXPECT_LT(resident_bytes() + held * page_bytes * 9 / 10, full) << "the memory is the system's again";
}

TEST(Stage, DroppingGivesBackWhatWasReplacedBefore) {
  StageBench bench;
  const ImageId id = image_id(1);
  const std::uint64_t pages = 4096;
  bench.make(id, {pages});
  const auto source = bench.scatter(id);
  ASSERT_TRUE(source->pages(0, 0, random_pages(pages, 1), kHere));
  ASSERT_TRUE(source->zeros(0, 0, pages, kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  ASSERT_EQ(bench.stage->image(id)->pages_held, 0U);
  const std::uint64_t before = resident_bytes();
  EXPECT_TRUE(bench.stage->drop(id));
  EXPECT_LT(resident_bytes() + pages * system_page_size() * 9 / 10, before);
}

// When a newer copy is refused, the older one must not be read in its place.
TEST(Stage, WhatIsRefusedIsForgotten) {
  StageBench bench;
  const ImageId id = image_id(1);
  bench.make(id, {64});
  ImageOracle oracle({64});
  const auto source = bench.scatter(id);
  const auto old = random_pages(8, 1);
  ASSERT_TRUE(source->pages(0, 0, old, kHere));
  oracle.content(0, 0, old);
  // A guest that wrote while its page was sent: hashed first, other bytes sent.
  auto torn = random_pages(4, 2);
  const wire::FrameHeader header = StageClient::pages_header(0, 2, torn, kHere);
  torn[5000] ^= std::byte{1};
  ASSERT_TRUE(source->wire().raw(&header, sizeof header) && source->wire().raw(torn.data(), torn.size()));
  const auto barrier = source->barrier(3);
  ASSERT_TRUE(barrier.acknowledged) << "the connection goes on";
  EXPECT_EQ(barrier.refused, (std::vector<StageClient::Refused>{{0, 2, 4}}));
  oracle.absent(0, 2, 4);
  const auto gather = bench.gather(id);
  oracle.check(*gather);
  const StageStats stats = bench.stage->stats();
  EXPECT_EQ(stats.free_bytes, stats.slab_bytes - bench.stage->image(id)->bytes);
  ASSERT_TRUE(source->pages(0, 2, torn, kHere));
  oracle.content(0, 2, torn);
  EXPECT_TRUE(source->barrier(4).refused.empty());
  oracle.check(*gather);
}

// A slow reader's answer is sent from slots that are replaced meanwhile, and that somebody else would get at once,
// since there are no others.
TEST(Stage, WhatIsBeingSentSurvivesBeingReplaced) {
  StageBench bench(16ULL << 20U);
  const ImageId id = image_id(1);
  const std::uint64_t run = wire::max_run_pages(system_page_size());
  const std::uint64_t reads = 64;
  bench.make(id, {run, 8192});
  const auto source = bench.scatter(id);
  const auto old = random_pages(run, 1);
  ASSERT_TRUE(source->pages(0, 0, old, kHere));
  // Everything else is full.
  for (std::uint64_t at = 0; at + run <= 8192; at += run)
    ASSERT_TRUE(source->pages(1, at, random_pages(run, 2), kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  ASSERT_EQ(bench.stage->stats().free_bytes, 0U);

  const auto gather = bench.gather(id);
  for (std::uint64_t tag = 0; tag < reads; ++tag) ASSERT_TRUE(gather->ask(0, 0, run, tag));
  // It is stuck when nothing has gone out for a while: the sockets' buffers are full, and it is in the middle of one.
  std::uint64_t sent = 0;
  for (int quiet = 0; quiet < 10;) {
    std::this_thread::sleep_for(20ms);
    const std::uint64_t now = bench.stage->image(id)->bytes_out;
    quiet = now == sent && now > 0 ? quiet + 1 : 0;
    sent = now;
  }
  ASSERT_LT(sent, reads * old.size()) << "the sockets hold everything: nothing was tested";
  const auto newer = random_pages(run, 3);
  ASSERT_TRUE(source->pages(0, 0, newer, kHere));
  for (int turn = 0; turn < 4; ++turn) ASSERT_TRUE(source->pages(1, 0, random_pages(run, 4), kHere));
  ASSERT_TRUE(source->barrier(2).acknowledged) << "a reader holds up nobody";

  bool stuck_was_old = false;
  for (std::uint64_t tag = 0; tag < reads; ++tag) {
    for (const auto& frame : gather->answer(0, 0, run, tag)) {
      // Their checksums fit, which answer() has seen to. Pages that found no room when they were replaced are absent.
      if (!frame.is(FrameType::kPages)) continue;
      const auto offset = static_cast<std::ptrdiff_t>(frame.header.first_page * system_page_size());
      const bool is_old = std::equal(frame.payload.begin(), frame.payload.end(), old.begin() + offset);
      const bool is_new = std::equal(frame.payload.begin(), frame.payload.end(), newer.begin() + offset);
      ASSERT_TRUE(is_old || is_new) << "answer " << tag;
      if (is_old && (tag + 1) * old.size() > sent - old.size()) stuck_was_old = true;
    }
  }
  EXPECT_TRUE(stuck_was_old);
  ASSERT_TRUE(source->pages(0, 0, newer, kHere));
  EXPECT_TRUE(source->barrier(3).refused.empty()) << "pins were taken back";
  ImageOracle oracle({run});
  oracle.content(0, 0, newer);
  oracle.check(*gather);
}

// Neither writers nor drop() nor close() wait for a reader that does not read.
TEST(Stage, AReaderThatDoesNotReadHoldsUpNobody) {
  for (const bool by_drop : {true, false}) {
    StageBench bench;
    const ImageId id = image_id(1);
    const std::uint64_t run = wire::max_run_pages(system_page_size());
    bench.make(id, {run});
    const auto source = bench.scatter(id);
    ASSERT_TRUE(source->pages(0, 0, random_pages(run, 1), kHere));
    ASSERT_TRUE(source->barrier(1).acknowledged);
    const auto gather = bench.gather(id);
    for (std::uint64_t tag = 0; tag < 64; ++tag) ASSERT_TRUE(gather->ask(0, 0, run, tag));
    // And a writer that stops in the middle of a frame.
    const auto half = random_pages(2, 1);
    const wire::FrameHeader header = StageClient::pages_header(0, 0, half, kHere);
    ASSERT_TRUE(source->wire().raw(&header, sizeof header) && source->wire().raw(half.data(), 5000));
    const auto writer = bench.scatter(id, 1);
    EXPECT_TRUE(source->ended()) << "its successor is here";
    ASSERT_TRUE(writer->pages(0, 0, random_pages(run, 2), kHere));
    ASSERT_TRUE(writer->barrier(2).acknowledged);
    ASSERT_TRUE(writer->wire().raw(&header, sizeof header) && writer->wire().raw(half.data(), 5000));

    const auto begun = Clock::now();
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) {
      callers.emplace_back([&] {
        if (by_drop) {
          bench.stage->drop(id);
        } else {
          bench.stage->close();
        }
      });
    }
    callers.emplace_back([&] { bench.stage->remove_session(id, StageBench::kDestination); });
    for (auto& caller : callers) caller.join();
    EXPECT_LT(Clock::now() - begun, 30s);
    EXPECT_EQ(bench.stage->stats().connections, 0U);
    EXPECT_EQ(bench.stage->stats().free_bytes, bench.stage->stats().slab_bytes);
    EXPECT_TRUE(writer->ended());
  }
}

TEST(Stage, TheBandwidthCapHoldsInBothDirections) {
  const std::uint64_t rate = 1ULL << 20U;
  StageBench bench(32ULL << 20U, rate);
  const ImageId id = image_id(1);
  const std::uint64_t run = wire::max_run_pages(system_page_size());
  const std::uint64_t pages = rate / system_page_size();
  bench.make(id, {pages});
  const auto source = bench.scatter(id);
  const auto bytes = random_pages(pages, 1);
  // A second's worth: the last frame is taken on credit, and there is a little to begin with.
  auto begun = Clock::now();
  ASSERT_TRUE(source->pages(0, 0, bytes, kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  EXPECT_GE(Clock::now() - begun, 600ms);
  EXPECT_GT(source->signs, 0U) << "of all that came in";
  EXPECT_LT(Clock::now() - begun, 30s);

  const auto gather = bench.gather(id);
  const auto demand = bench.demand(id);
  begun = Clock::now();
  for (std::uint64_t at = 0; at < pages; at += run) gather->read(0, at, run, at);
  EXPECT_GE(Clock::now() - begun, 600ms);
  EXPECT_LT(Clock::now() - begun, 30s);
  // An answer that somebody waits for does not wait, unless they are all that the rate has room for.
  const auto read_all = [&] {
    for (std::uint64_t at = 0; at < pages; at += run) demand->read(0, at, run, at);
  };
  begun = Clock::now();
  for (int times = 0; times < 3; ++times) read_all();
  EXPECT_GE(Clock::now() - begun, 2s) << "three seconds' worth, and a quarter of one on credit";
  EXPECT_LT(Clock::now() - begun, 60s);
  // They do not end; who reads ahead is told that its answer will come, and gets it, and the map does not wait for them.
  std::atomic<bool> over{false};
  std::thread hog([&] {
    while (!over) read_all();
  });
  const unsigned signs = gather->signs;
  begun = Clock::now();
  EXPECT_EQ(gather->read(0, 0, run, 2).size(), 1U);
  EXPECT_GT(gather->signs, signs);
  EXPECT_TRUE(gather->read_map().ended);
  EXPECT_LT(Clock::now() - begun, 30s);
  over = true;
  hog.join();
  EXPECT_GT(demand->signs + gather->signs, signs);
  // Whoever waits for its turn is not waited for.
  for (std::uint64_t tag = 10; tag < 40; ++tag) ASSERT_TRUE(gather->ask(0, 0, run, tag));
  begun = Clock::now();
  EXPECT_TRUE(bench.stage->drop(id));
  EXPECT_LT(Clock::now() - begun, 5s) << "seven seconds' worth";
}

TEST(Stage, TokensAreGoodForOneConnectionOfTheirRole) {
  StageBench bench;
  const ImageId id = image_id(1);
  EXPECT_EQ(bench.say(stage_hello(id, 1, StageRole::kScatter, 0)), wire::HelloStatus::kLost);
  bench.make(id, {16});
  using Status = wire::HelloStatus;
  const auto refused = [&](wire::Hello hello) { return bench.say(hello) == Status::kRefused; };
  const wire::Hello good = stage_hello(id, StageBench::kSource, StageRole::kScatter, 2);
  wire::Hello hello = good;
  hello.token[31] ^= 1;
  EXPECT_TRUE(refused(hello)) << "token";
  hello = good;
  hello.version = 2;
  EXPECT_TRUE(refused(hello)) << "version";
  EXPECT_TRUE(refused(stage_hello(id, StageBench::kSource, StageRole::kGather, 0))) << "role that it has not";
  EXPECT_TRUE(refused(stage_hello(id, StageBench::kDestination, StageRole::kScatter, 0)));
  EXPECT_TRUE(refused(stage_hello(id, StageBench::kDestination, StageRole::kChain, 0)));
  EXPECT_TRUE(refused(stage_hello(id, 3, StageRole::kScatter, 0))) << "session";
  EXPECT_TRUE(refused(stage_hello(id, StageBench::kSource, StageRole::kScatter, 16))) << "beyond the table";
  hello = good;
  hello.channel = 0xffff;
  EXPECT_TRUE(refused(hello)) << "no role";
  hello = stage_hello(id, 3, StageRole::kScatter, 0);
  hello.token = {};
  EXPECT_TRUE(refused(hello)) << "zeros where there is no token";

  std::unique_ptr<StageClient> first;
  EXPECT_EQ(bench.say(good, &first), Status::kAccepted) << "what was refused has used nothing up";
  EXPECT_TRUE(refused(good)) << "used";
  EXPECT_TRUE(refused(stage_hello(id, StageBench::kSource, StageRole::kScatter, 1)))
      << "older than one that was used";
  ASSERT_TRUE(first->barrier(1).acknowledged) << "the refused ones have not ended it";
  const auto second = bench.scatter(id, 3);
  EXPECT_TRUE(first->ended());
  ASSERT_TRUE(second->barrier(1).acknowledged);
  EXPECT_TRUE(bench.stage->remove_session(id, StageBench::kSource));
  EXPECT_TRUE(second->ended());
  EXPECT_TRUE(refused(stage_hello(id, StageBench::kSource, StageRole::kScatter, 4)));
  // A stage that is not served is an unknown preface.
  bench.listener->serve_stage(nullptr);
  EXPECT_EQ(bench.say(stage_hello(id, StageBench::kDestination, StageRole::kGather, 0)), std::nullopt);
}

// A connection's frames come after all of those of the connection that it replaces, even if one of these takes long:
// otherwise old content would replace new.
TEST(Stage, ASuccessorWritesAfterItsPredecessor) {
  StageBench bench(128ULL << 20U);
  const ImageId id = image_id(1);
  const std::uint64_t pages = 4ULL << 20U;  // 64 MiB of index
  bench.make(id, {pages});
  const auto source = bench.scatter(id);
  ASSERT_TRUE(source->zeros(0, 0, pages, kHere));
  while (bench.stage->image(id)->bytes_in == 0) std::this_thread::yield();
  const auto successor = bench.scatter(id, 1);
  const auto bytes = random_pages(1, 1);
  ASSERT_TRUE(successor->pages(0, pages - 1, bytes, kHere));
  ASSERT_TRUE(successor->barrier(1).acknowledged);
  EXPECT_EQ(bench.stage->image(id)->pages_known, pages);
  const auto read = bench.gather(id)->read(0, pages - 1, 1);
  ASSERT_EQ(read.size(), 1U);
  EXPECT_EQ(read[0].payload, bytes);
}

TEST(Stage, ConnectionsOfAnImageAreBounded) {
  StageBench bench;
  const ImageId id = image_id(1);
  ASSERT_TRUE(bench.stage->create_image({id, {16}, 0}));
  std::vector<std::unique_ptr<StageClient>> clients;
  for (std::uint16_t session = 0; session <= Stage::kMostConnectionsAnImage; ++session) {
    ASSERT_TRUE(
        bench.stage->add_session(id, session, role_bit(StageRole::kGather), stage_tokens(id, session)));
    const bool fits = session < Stage::kMostConnectionsAnImage;
    std::unique_ptr<StageClient> client;
    EXPECT_EQ(bench.say(stage_hello(id, session, StageRole::kGather, 0), &client),
              fits ? wire::HelloStatus::kAccepted : wire::HelloStatus::kRefused);
    clients.push_back(std::move(client));
  }
  EXPECT_EQ(bench.stage->stats().connections, Stage::kMostConnectionsAnImage);
  // One that replaces another is no more than there was.
  EXPECT_EQ(bench.say(stage_hello(id, 5, StageRole::kGather, 1), &clients[5]), wire::HelloStatus::kAccepted);
  EXPECT_EQ(clients[5]->read(0, 0, 1).size(), 1U);
  clients[3]->goodbye();
  EXPECT_TRUE(clients[3]->ended());
  while (bench.stage->stats().connections > Stage::kMostConnectionsAnImage - 1) std::this_thread::yield();
  EXPECT_EQ(bench.say(stage_hello(id, Stage::kMostConnectionsAnImage, StageRole::kGather, 1), &clients[3]),
            wire::HelloStatus::kAccepted);
}

TEST(Stage, BoundsOfWhatMayBeAskedFor) {
  EXPECT_THROW((void)Stage::create({Stage::kLeastMemory - 1, 0}), std::invalid_argument);
  const auto stage = Stage::create({Stage::kLeastMemory, 0});
  const ImageId id = image_id(1);
  EXPECT_THROW(stage->create_image({id, {}, 0}), std::invalid_argument);
  EXPECT_THROW(stage->create_image({id, std::vector<std::uint64_t>(65, 1), 0}), std::invalid_argument);
  EXPECT_THROW(stage->create_image({id, {~0ULL}, 0}), std::invalid_argument);
  EXPECT_THROW(stage->create_image({id, {1ULL << 63U, 1ULL << 63U}, 0}), std::invalid_argument);
  EXPECT_THROW(stage->create_image({id, {16}, Holders::kMostServers}), std::invalid_argument);
  EXPECT_TRUE(stage->create_image({id, std::vector<std::uint64_t>(64, 1), 0}));
  EXPECT_THROW(stage->create_image({id, {1}, 0}), std::invalid_argument);
  // Index for more than half: the first finds room, the second does not, and leaves nothing behind.
  const std::uint64_t slots = stage->stats().slab_bytes / system_page_size();
  const std::uint64_t most = slots * 6 / 10 * (system_page_size() / 16);
  EXPECT_TRUE(stage->create_image({image_id(2), {most}, 0}));
  const std::uint64_t free = stage->stats().free_bytes;
  EXPECT_FALSE(stage->create_image({image_id(3), {most / 6, most}, 0}));
  EXPECT_EQ(stage->stats().free_bytes, free);

  const auto tokens = stage_tokens(id, 1);
  EXPECT_THROW(stage->add_session(id, 1, 0, tokens), std::invalid_argument);
  EXPECT_THROW(stage->add_session(id, 1, 32, tokens), std::invalid_argument);
  EXPECT_THROW(stage->add_session(id, 1, 1, {}), std::invalid_argument);
  EXPECT_THROW(stage->add_session(id, 1, 1, std::vector<wire::Token>(wire::kStageRoles + 1)),
               std::invalid_argument);
  EXPECT_THROW(stage->add_session(id, 1, 1, std::vector<wire::Token>(65 * wire::kStageRoles)),
               std::invalid_argument);
  EXPECT_TRUE(stage->add_session(id, 1, 1, tokens));
  EXPECT_THROW(stage->add_session(id, 1, 1, tokens), std::invalid_argument);
  EXPECT_THROW(stage->set_chain(id, 250, "127.0.0.1", 1, chain_tokens(id, 0)), std::invalid_argument);
  EXPECT_THROW(stage->set_chain(id, 1, "localhost", 1, chain_tokens(id, 0)), std::invalid_argument);
  EXPECT_THROW(stage->set_chain(id, 1, "127.0.0.1", 1, {}), std::invalid_argument);
  const ImageId nobody = image_id(9);
  EXPECT_FALSE(stage->add_session(nobody, 1, 1, tokens));
  EXPECT_FALSE(stage->remove_session(nobody, 1));
  EXPECT_FALSE(stage->set_chain(nobody, 1, "127.0.0.1", 1, chain_tokens(id, 0)));
  EXPECT_FALSE(stage->seal(nobody));
  EXPECT_FALSE(stage->drop(nobody));
  EXPECT_FALSE(stage->image(nobody).has_value());
  stage->close();
  stage->close();
  EXPECT_THROW(stage->create_image({id, {1}, 0}), std::logic_error);
  EXPECT_FALSE(stage->drop(id));
  EXPECT_EQ(stage->stats().free_bytes, stage->stats().slab_bytes);
}

// Writers of two regions, readers, map records and drops at once. Every page says which it is and when it was
// written: what is read must be some version of the page asked for, and never an older one than read before.
TEST(Stage, WritersAndReadersAtOnce) {
  StageBench bench(16ULL << 20U);
  const ImageId id = image_id(1);
  const std::uint64_t pages = 96;
  ASSERT_TRUE(bench.stage->create_image({id, {pages, pages}, 0}));
  for (std::uint16_t session = 0; session < 5; ++session) {
    ASSERT_TRUE(bench.stage->add_session(id, session, 7, stage_tokens(id, session)));
  }
  const std::size_t size = system_page_size();
  const auto stamp = [size](std::byte* page, std::uint64_t region, std::uint64_t number,
                            std::uint64_t version) {
    for (std::size_t at = 0; at < size; at += 8) {
      const std::uint64_t word = version << 32U | region << 16U | number;
      std::memcpy(page + at, &word, 8);
    }
  };
  std::atomic<int> writing{2};
  std::atomic<std::uint64_t> read{0};
  std::vector<std::thread> threads;
  for (std::uint32_t region = 0; region < 2; ++region) {
    threads.emplace_back([&, region] {
      const auto source = bench.connect(id, static_cast<std::uint16_t>(region), StageRole::kScatter);
      std::mt19937 random(region);
      std::vector<std::byte> bytes(16 * size);
      for (std::uint64_t version = 1; version <= 300; ++version) {
        const std::uint64_t first = random() % (pages - 16);
        for (std::uint64_t i = 0; i < 16; ++i) stamp(bytes.data() + i * size, region, first + i, version);
        ASSERT_TRUE(source->pages(region, first, bytes, kHere));
        if (version % 50 == 0) {
          const auto barrier = source->barrier(version);
          ASSERT_TRUE(barrier.acknowledged);
          ASSERT_TRUE(barrier.refused.empty());
        }
      }
      --writing;
    });
  }
  for (std::uint16_t session = 2; session < 5; ++session) {
    threads.emplace_back([&, session] {
      const auto reader = bench.connect(id, session, session == 2 ? StageRole::kDemand : StageRole::kGather);
      std::mt19937 random(session);
      std::array<std::vector<std::uint64_t>, 2> newest{std::vector<std::uint64_t>(pages),
                                                       std::vector<std::uint64_t>(pages)};
      do {
        const std::uint32_t region = random() % 2;
        const std::uint64_t first = random() % (pages - 32);
        for (const auto& frame : reader->read(region, first, 32, random())) {
          for (std::uint64_t i = 0; i < frame.header.page_count; ++i) {
            const std::uint64_t number = frame.header.first_page + i;
            if (!frame.is(FrameType::kPages)) {
              ASSERT_EQ(newest[region][number], 0U) << "a page that was there";
              continue;
            }
            std::uint64_t word = 0;
            std::memcpy(&word, frame.payload.data() + i * size, 8);
            ASSERT_EQ(word & 0xffffU, number);
            ASSERT_EQ(word >> 16U & 0xffffU, region);
            ASSERT_GE(word >> 32U, newest[region][number]);
            newest[region][number] = word >> 32U;
            ++read;
          }
        }
        if (random() % 16 == 0) {
          ASSERT_TRUE(reader->read_map().ended);
        }
      } while (writing > 0);
    });
  }
  while (writing > 0) {
    const ImageId other = image_id(2);
    ASSERT_TRUE(bench.stage->create_image({other, {64}, 0}));
    ASSERT_TRUE(put_state(*bench.stage, other, random_bytes(50000, 1)));
    (void)bench.stage->image(id);
    (void)bench.stage->whole(id, std::vector<std::uint64_t>{pages, pages});
    ASSERT_TRUE(bench.stage->drop(other));
  }
  for (auto& thread : threads) thread.join();
  EXPECT_GT(read, 0U);
  // What the last answers had pinned is given back after they were sent.
  while (bench.stage->stats().connections > 0) std::this_thread::yield();
  const StageStats stats = bench.stage->stats();
  EXPECT_EQ(stats.free_bytes, stats.slab_bytes - bench.stage->image(id)->bytes);
}

}  // namespace
}  // namespace memferry::test
