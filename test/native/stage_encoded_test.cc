// Encoded pages at a VMD server: held decoded, passed on as they came, answered packed where the reader allows it and
// its link is what is waited for.
#include <gtest/gtest.h>

#include <thread>

#include "packed.h"
#include "stage_client.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;
using wire::Holders;
using wire::StageRole;

// A sanitizer's own memory is no part of the cap.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
constexpr bool kSanitized = __has_feature(thread_sanitizer) || __has_feature(address_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

constexpr Holders kHere{0, Holders::kNobody};
constexpr std::uint64_t kPages = 256;

std::vector<std::byte> delta(std::span<const std::byte> base, std::span<const std::byte> now) {
  return delta_of(base, now, StageClient::page_size());
}

class StageEncoded : public testing::Test {
 protected:
  void SetUp() override {
    bench.make(id, {kPages});
    source = bench.scatter(id);
    gather = bench.gather(id);
  }
  static bool encoded(StageClient& to, std::uint16_t flags, std::uint64_t first,
                      std::span<const std::byte> pages, std::span<const std::byte> payload, Holders holders) {
    const wire::FrameHeader header =
        encoded_header(flags, 0, first, pages, payload.size(), StageClient::page_size(), holders.tag());
    return to.wire().raw(&header, sizeof header) && to.wire().raw(payload.data(), payload.size());
  }
  static std::vector<std::byte> pages(std::uint64_t count, std::uint64_t seed) {
    return packable_bytes(static_cast<std::size_t>(count * StageClient::page_size()), seed);
  }
  const ImageId id = image_id(3);
  StageBench bench;
  ImageOracle oracle{{kPages}};
  std::unique_ptr<StageClient> source;
  std::unique_ptr<StageClient> gather;
};

TEST_F(StageEncoded, RunsAreHeldDecoded) {
  const auto a = pages(64, 1);
  const auto b = pages(3, 2);
  ASSERT_TRUE(encoded(*source, wire::kFlagLz4, 0, a, packed(wire::kFlagLz4, a), kHere));
  ASSERT_TRUE(encoded(*source, wire::kFlagZstd, 100, b, packed(wire::kFlagZstd, b), kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  oracle.content(0, 0, a);
  oracle.content(0, 100, b);
  oracle.check(*gather);
}

TEST_F(StageEncoded, WhatCannotBeDecodedIsRefusedAndForgotten) {
  const auto held = pages(8, 3);
  ASSERT_TRUE(source->pages(0, 0, held, kHere));
  oracle.content(0, 0, held);
  const auto newer = pages(4, 4);
  auto damaged = packed(wire::kFlagZstd, newer);
  damaged.resize(damaged.size() / 2);
  ASSERT_TRUE(encoded(*source, wire::kFlagZstd, 0, newer, damaged, kHere));
  // A bomb, and the right length of other pages.
  ASSERT_TRUE(encoded(*source, wire::kFlagLz4, 4, std::span(newer).first(StageClient::page_size()),
                      packed(wire::kFlagLz4, std::vector<std::byte>(64 * StageClient::page_size())), kHere));
  ASSERT_TRUE(encoded(*source, wire::kFlagLz4, 5, std::span(newer).first(2 * StageClient::page_size()),
                      packed(wire::kFlagLz4, std::span(newer).subspan(StageClient::page_size(),
                                                                      2 * StageClient::page_size())),
                      kHere));
  const StageClient::Barrier answer = source->barrier(2);
  ASSERT_TRUE(answer.acknowledged);
  EXPECT_EQ(answer.refused, (std::vector<StageClient::Refused>{{0, 0, 4}, {0, 4, 1}, {0, 5, 2}}));
  oracle.absent(0, 0, 7);
  oracle.check(*gather);
}

TEST_F(StageEncoded, ReplicasGetWhatCameAsItCame) {
  StageBench second;
  second.make(id, {kPages}, 1);
  const auto session = static_cast<std::uint16_t>(wire::kFirstChainSession + 0);
  ASSERT_TRUE(second.stage->add_session(id, session, role_bit(StageRole::kChain), stage_tokens(id, session)));
  ASSERT_TRUE(bench.stage->set_chain(id, 1, "127.0.0.1", second.listener->port(), chain_tokens(id, 0)));
  const auto content = pages(64, 5);
  const auto payload = packed(wire::kFlagZstd, content);
  ASSERT_TRUE(encoded(*source, wire::kFlagZstd, 0, content, payload, {0, 1}));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  oracle.content(0, 0, content);
  oracle.check(*gather);
  oracle.check(*second.gather(id));
  EXPECT_LT(second.stage->image(id)->bytes_in, payload.size() + 4096) << "not packed any more";
  // It has the same former version, so a delta is one there as well.
  const auto newer = changed_bytes(content, 1);
  const std::uint64_t before = second.stage->image(id)->bytes_in;
  ASSERT_TRUE(encoded(*source, wire::kFlagDelta, 0, newer, delta(content, newer), {0, 1}));
  const StageClient::Barrier answer = source->barrier(2);
  ASSERT_TRUE(answer.acknowledged);
  EXPECT_TRUE(answer.refused.empty());
  oracle.content(0, 0, newer);
  oracle.check(*gather);
  oracle.check(*second.gather(id, 1));
  EXPECT_LT(second.stage->image(id)->bytes_in, before + 4096) << "not a delta any more";
}

// The replica has another version, or none: it refuses what the first one could store, and the source hears of it.
TEST_F(StageEncoded, AReplicaRefusesADeltaOfItsOwn) {
  StageBench second;
  second.make(id, {kPages}, 1);
  const auto session = static_cast<std::uint16_t>(wire::kFirstChainSession + 0);
  ASSERT_TRUE(second.stage->add_session(id, session, role_bit(StageRole::kChain), stage_tokens(id, session)));
  ASSERT_TRUE(bench.stage->set_chain(id, 1, "127.0.0.1", second.listener->port(), chain_tokens(id, 0)));
  const auto content = pages(4, 12);
  const auto newer = changed_bytes(content, 1);
  ASSERT_TRUE(source->pages(0, 0, content, kHere));  // here alone
  ASSERT_TRUE(encoded(*source, wire::kFlagDelta, 0, newer, delta(content, newer), {0, 1}));
  const StageClient::Barrier answer = source->barrier(1);
  ASSERT_TRUE(answer.acknowledged);
  EXPECT_EQ(answer.refused, (std::vector<StageClient::Refused>{{0, 0, 4}}));
  oracle.content(0, 0, newer);
  oracle.check(*gather);
  ImageOracle nothing{{kPages}};
  nothing.check(*second.gather(id));
}

TEST_F(StageEncoded, DeltasAreAgainstWhatIsHeldOfThePage) {
  auto now = pages(64, 7);
  ASSERT_TRUE(source->pages(0, 10, now, kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  for (std::uint64_t round = 2; round < 12; ++round) {
    const auto newer = changed_bytes(now, round);
    ASSERT_TRUE(encoded(*source, wire::kFlagDelta, 10, newer, delta(now, newer), kHere));
    const StageClient::Barrier answer = source->barrier(round);
    ASSERT_TRUE(answer.acknowledged);
    EXPECT_TRUE(answer.refused.empty());
    now = newer;
    oracle.content(0, 10, now);
    oracle.check(*gather);
  }
  EXPECT_EQ(bench.stage->image(id)->pages_held, 64u);
}

TEST_F(StageEncoded, DeltasAgainstWhatIsNotThereAreRefusedAndForgotten) {
  const auto held = pages(8, 8);
  const auto newer = changed_bytes(held, 1);
  const std::size_t page = StageClient::page_size();
  ASSERT_TRUE(source->pages(0, 0, held, kHere));
  ASSERT_TRUE(source->zeros(0, 20, 1, kHere));
  const auto part = [&](const std::vector<std::byte>& of, std::size_t from, std::size_t count) {
    return std::span(of).subspan(from * page, count * page);
  };
  const auto say = [&](std::uint64_t first, std::span<const std::byte> now,
                       std::span<const std::byte> payload) {
    ASSERT_TRUE(encoded(*source, wire::kFlagDelta, first, now, payload, kHere));
  };
  // Nobody has sent it; it is zeros; of a run one page is not there.
  say(30, part(newer, 0, 1), delta(part(held, 0, 1), part(newer, 0, 1)));
  say(20, part(newer, 0, 1), delta(part(held, 0, 1), part(newer, 0, 1)));
  say(7, part(newer, 0, 2), delta(part(held, 0, 2), part(newer, 0, 2)));
  // Of another version of the page; the right pages' checksum.
  const auto other = changed_bytes(held, 2);
  const auto later = changed_bytes(other, 3);
  say(0, part(later, 0, 1), delta(part(other, 0, 1), part(later, 0, 1)));
  // Right, but the frame's checksum is of something else.
  say(1, part(other, 1, 1), delta(part(held, 1, 1), part(newer, 1, 1)));
  // Longer than its run, shorter, and no delta at all.
  say(2, part(newer, 2, 1), delta(part(held, 2, 2), part(newer, 2, 2)));
  say(3, part(newer, 3, 2), delta(part(held, 3, 1), part(newer, 3, 1)));
  say(5, part(newer, 5, 1), std::span(held).first(64));
  const StageClient::Barrier answer = source->barrier(2);
  ASSERT_TRUE(answer.acknowledged);
  EXPECT_EQ(answer.refused,
            (std::vector<StageClient::Refused>{
                {0, 30, 1}, {0, 20, 1}, {0, 7, 2}, {0, 0, 1}, {0, 1, 1}, {0, 2, 1}, {0, 3, 2}, {0, 5, 1}}));
  oracle.content(0, 6, part(held, 6, 1));
  oracle.check(*gather);
  // Plainly it comes again.
  ASSERT_TRUE(source->pages(0, 0, newer, kHere));
  ASSERT_TRUE(source->barrier(3).acknowledged);
  oracle.content(0, 0, newer);
  oracle.check(*gather);
}

TEST_F(StageEncoded, DeltasFromWhoeverMayOnlyReadEndTheConnection) {
  const auto held = pages(1, 10);
  const auto newer = changed_bytes(held, 1);
  ASSERT_TRUE(source->pages(0, 0, held, kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  for (const auto role : {StageRole::kDemand, StageRole::kGather}) {
    const auto reader = bench.connect(id, StageBench::kDestination, role, 3);
    ASSERT_TRUE(reader);
    (void)encoded(*reader, wire::kFlagDelta, 0, newer, delta(held, newer), kHere);
    EXPECT_TRUE(reader->ended());
  }
  oracle.content(0, 0, held);
  oracle.check(*bench.gather(id, 5));
}

// Another image's page with the same number is no base: each has its own.
TEST_F(StageEncoded, DeltasAreAgainstTheirOwnImage) {
  const ImageId other = image_id(4);
  bench.make(other, {kPages});
  const auto theirs = bench.scatter(other);
  const auto held = pages(2, 11);
  const auto newer = changed_bytes(held, 1);
  ASSERT_TRUE(source->pages(0, 0, held, kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  ASSERT_TRUE(encoded(*theirs, wire::kFlagDelta, 0, newer, delta(held, newer), kHere));
  const StageClient::Barrier answer = theirs->barrier(1);
  ASSERT_TRUE(answer.acknowledged);
  EXPECT_EQ(answer.refused, (std::vector<StageClient::Refused>{{0, 0, 2}}));
  oracle.content(0, 0, held);
  oracle.check(*gather);
}

// A reader on a slow link: answers are packed as soon as that is found out, and only where they may be.
TEST_F(StageEncoded, SlowReadersThatAllowItGetPackedAnswers) {
  const auto content = pages(64, 6);
  ASSERT_TRUE(source->pages(0, 0, content, kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  for (const std::uint16_t allowed : {std::uint16_t{0}, wire::kCompressions}) {
    const auto reader = bench.gather(id, allowed == 0 ? 1 : 2);
    // Or the whole test fits into the socket.
    const int little = 64 * 1024;
    ASSERT_EQ(::setsockopt(reader->fd(), SOL_SOCKET, SO_RCVBUF, &little, sizeof little), 0);
    std::uint64_t asked = 0;
    std::size_t packed_answers = 0;
    const auto limit = std::chrono::steady_clock::now() + 60s;
    for (std::uint64_t answered = 0; packed_answers < 20 && std::chrono::steady_clock::now() < limit;
         ++answered) {
      for (; asked < answered + 8; ++asked) {
        wire::FrameHeader read = wire::make_header(wire::FrameType::kRead, 0, {PageNumber{0}, 64}, asked + 1);
        read.flags = allowed;
        ASSERT_TRUE(reader->frame(read));
      }
      std::this_thread::sleep_for(10ms);
      const auto answer = reader->receive();
      ASSERT_TRUE(answer && answer->is(wire::FrameType::kPages));
      ASSERT_EQ(answer->header.tag, answered + 1);
      ASSERT_EQ(answer->header.page_count, 64u);
      ASSERT_EQ(answer->payload, content);
      packed_answers += wire::encoding_of(answer->header) != 0 ? 1 : 0;
      if (allowed == 0 && answered > 60) break;
    }
    EXPECT_EQ(packed_answers, allowed == 0 ? 0u : 20u);
  }
}

// As many as a server takes connections for its images, each of which sends packed pages by every codec and wants its
// answers packed: what they take is within the cap.
TEST(StageCodecs, OfManyConnectionsStayWithinTheCap) {
  const std::uint64_t memory = 64ULL << 20U;
  constexpr std::uint64_t kRun = 64;
  constexpr std::uint16_t kPairs = Stage::kMostConnectionsAnImage / 2;
  const auto content = packable_bytes(static_cast<std::size_t>(kRun * StageClient::page_size()), 1);
  const auto newer = changed_bytes(content, 2);
  const std::array<std::pair<std::uint16_t, std::vector<std::byte>>, 3> ways{
      {{wire::kFlagLz4, packed(wire::kFlagLz4, content)},
       {wire::kFlagZstd, packed(wire::kFlagZstd, content)},
       {wire::kFlagDelta, delta(content, newer)}}};
  std::vector<std::unique_ptr<StageClient>> clients;
  clients.reserve(256);
  const std::uint64_t idle = resident_bytes();
  StageBench bench(memory);
  for (std::uint8_t number = 1; number <= 16; ++number) {
    const ImageId id = image_id(number);
    ASSERT_TRUE(bench.stage->create_image({.id = id, .region_pages = {kRun * kPairs}, .ordinal = 0}));
    for (std::uint16_t session = 1; session <= kPairs; ++session) {
      ASSERT_TRUE(bench.stage->add_session(id, session,
                                           role_bit(StageRole::kScatter) | role_bit(StageRole::kGather),
                                           stage_tokens(id, session, 1)));
      auto writer = bench.connect(id, session, StageRole::kScatter);
      ASSERT_TRUE(writer);
      for (const auto& [encoding, payload] : ways) {
        const auto& pages = encoding == wire::kFlagDelta ? newer : content;
        const wire::FrameHeader header =
            encoded_header(encoding, 0, std::uint64_t{session - 1U} * kRun, pages, payload.size(),
                           StageClient::page_size(), kHere.tag());
        ASSERT_TRUE(writer->wire().raw(&header, sizeof header));
        ASSERT_TRUE(writer->wire().raw(payload.data(), payload.size()));
      }
      const StageClient::Barrier answer = writer->barrier(1);
      ASSERT_TRUE(answer.acknowledged);
      ASSERT_TRUE(answer.refused.empty());
      clients.push_back(std::move(writer));
      auto reader = bench.connect(id, session, StageRole::kGather);
      ASSERT_TRUE(reader);
      const int little = 32 * 1024;
      ASSERT_EQ(::setsockopt(reader->fd(), SOL_SOCKET, SO_RCVBUF, &little, sizeof little), 0);
      wire::FrameHeader read = wire::make_header(wire::FrameType::kRead, 0,
                                                 {PageNumber{std::uint64_t{session - 1U} * kRun}, kRun}, 1);
      read.flags = wire::kCompressions;
      for (std::uint64_t asked = 1; asked <= 8; ++asked) {
        read.tag = asked;
        ASSERT_TRUE(reader->frame(read));
      }
      for (std::uint64_t asked = 1; asked <= 8; ++asked) {
        const auto got = reader->receive();
        ASSERT_TRUE(got && got->is(wire::FrameType::kPages));
        ASSERT_EQ(got->payload, newer);
      }
      clients.push_back(std::move(reader));
    }
  }
  // The last one has its answer a moment before it counts.
  while (bench.stage->stats().connections < clients.size()) std::this_thread::yield();
  if (!kSanitized) {
    EXPECT_LT(resident_bytes(), idle + memory);
  }
}

// Full to the last slot: what a frame comes as needs room too, and gives it up for its pages.
TEST(StageCodecs, AFullServerStillReplacesWhatItHas) {
  const std::uint64_t memory = 16ULL << 20U;
  StageBench bench(memory);
  const ImageId id = image_id(1);
  const std::uint64_t pages = memory / StageClient::page_size();
  bench.make(id, {pages});
  const auto source = bench.scatter(id);
  const auto content = packable_bytes(static_cast<std::size_t>(64 * StageClient::page_size()), 1);
  const auto send = [&](std::uint16_t encoding, std::uint64_t first, std::span<const std::byte> now,
                        std::span<const std::byte> payload) {
    const wire::FrameHeader header =
        encoded_header(encoding, 0, first, now, payload.size(), StageClient::page_size(), kHere.tag());
    ASSERT_TRUE(source->wire().raw(&header, sizeof header));
    ASSERT_TRUE(source->wire().raw(payload.data(), payload.size()));
  };
  const auto as_lz4 = packed(wire::kFlagLz4, content);
  for (std::uint64_t at = 0; at + 64 <= pages; at += 64) send(wire::kFlagLz4, at, content, as_lz4);
  const auto barrier = source->barrier(1);
  ASSERT_TRUE(barrier.acknowledged);
  ASSERT_FALSE(barrier.refused.empty());
  std::uint64_t refused = 0;
  for (const auto& run : barrier.refused) refused += run.count;
  EXPECT_EQ(bench.stage->image(id)->pages_held, pages - refused);
  EXPECT_LT(bench.stage->stats().free_bytes / StageClient::page_size(), 64u);
  ImageOracle oracle({pages});
  for (std::uint64_t at = 0; at + 64 <= pages; at += 64) oracle.content(0, at, content);
  for (const auto& run : barrier.refused) oracle.absent(0, run.first, run.count);
  oracle.check(*bench.gather(id));
  // Fill what is left.
  const auto filler = random_pages(64, 3);
  ASSERT_TRUE(source->pages(0, pages - 64, filler, kHere));
  const auto filled = source->barrier(2);
  ASSERT_TRUE(filled.acknowledged);
  EXPECT_EQ(bench.stage->stats().free_bytes, 0u);
  oracle.content(0, pages - 64, filler);
  for (const auto& run : filled.refused) oracle.absent(0, run.first, run.count);
  // Another version of pages that are there, as they are packed: their own room is enough.
  const auto newer = changed_bytes(content, 5);
  send(wire::kFlagZstd, 128, newer, packed(wire::kFlagZstd, newer));
  const auto replaced = source->barrier(3);
  ASSERT_TRUE(replaced.acknowledged);
  EXPECT_TRUE(replaced.refused.empty());
  oracle.content(0, 128, newer);
  // A delta has its base to keep meanwhile: it is refused, and nothing older is read in its place.
  send(wire::kFlagDelta, 192, newer, delta(content, newer));
  const auto last = source->barrier(4);
  ASSERT_TRUE(last.acknowledged);
  EXPECT_EQ(last.refused, (std::vector<StageClient::Refused>{{0, 192, 64}}));
  EXPECT_EQ(last.torn, 0u) << "for want of room: it was not found to be wrong";
  oracle.absent(0, 192, 64);
  oracle.check(*bench.gather(id, 1));
}

}  // namespace
}  // namespace memferry::test
