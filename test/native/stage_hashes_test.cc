// A server that is asked what its pages are: by hash, under the asker's key, of what it holds just now.
#include <gtest/gtest.h>

#include "page/keyed_hash.h"
#include "stage_client.h"

namespace memferry::test {
namespace {

using wire::FrameType;

constexpr wire::Holders kHere{0, wire::Holders::kNobody};
constexpr std::uint64_t kPages = 24;

class StageHashes : public testing::Test {
 protected:
  void SetUp() override {
    bench.make(image, {kPages});
    const auto client = bench.scatter(image);
    // 0 to 7 content, 8 to 15 zeros, nothing of the rest.
    ASSERT_TRUE(client->pages(0, 0, pages, kHere));
    ASSERT_TRUE(client->zeros(0, 8, 8, kHere));
    ASSERT_TRUE(client->barrier(1).acknowledged);
  }
  static bool ask(StageClient& client, PageRun run, std::uint64_t tag = 1, std::uint32_t region = 0) {
    return client.frame(wire::make_header(FrameType::kHashRequest, region, run, tag));
  }
  // Two tokens of the session that no connection shows.
  std::vector<KeyedHash> expected(std::uint16_t session) const {
    KeyedHashKey key{};
    for (const std::uint32_t attempt : {0U, 1U}) {
      const wire::Token token = stage_token(image, session, attempt, wire::StageRole::kPopular);
      std::copy(token.begin(), token.end(), key.begin() + attempt * sizeof token);
    }
    std::vector<KeyedHash> hashes(8);
    KeyedHasher(key).pages(pages, system_page_size(), hashes.data());
    return hashes;
  }

  const StageBench bench;
  const ImageId image = image_id(0x31);
  const std::vector<std::byte> pages = random_pages(8, 5);
};

TEST_F(StageHashes, OfContentUnderTheSessionsKey) {
  constexpr std::uint16_t kAnother = 5;
  ASSERT_TRUE(bench.stage->add_session(image, kAnother, role_bit(wire::StageRole::kGather),
                                       stage_tokens(image, kAnother)));
  ASSERT_NE(expected(kAnother), expected(StageBench::kDestination));
  for (const std::uint16_t session : {StageBench::kDestination, kAnother}) {
    const auto client = bench.connect(image, session, wire::StageRole::kGather);
    ASSERT_TRUE(ask(*client, {PageNumber{2}, 20}, 77));
    const auto content = client->receive();
    ASSERT_TRUE(content && content->is(FrameType::kHashes));
    EXPECT_EQ(content->header.first_page, 2u);
    EXPECT_EQ(content->header.page_count, 6u);
    EXPECT_EQ(content->header.tag, 77u);
    const auto hashes = expected(session);
    ASSERT_EQ(content->payload.size(), 6 * sizeof(KeyedHash));
    EXPECT_EQ(std::memcmp(content->payload.data(), &hashes[2], 6 * sizeof(KeyedHash)), 0);
    const auto zeros = client->receive();
    ASSERT_TRUE(zeros && zeros->is(FrameType::kZero));
    EXPECT_EQ(zeros->header.page_count, 8u);
    const auto absent = client->receive();
    ASSERT_TRUE(absent && absent->is(FrameType::kAbsent));
    EXPECT_EQ(absent->header.first_page, 16u);
    EXPECT_EQ(absent->header.page_count, 6u);
    // It goes on as ever.
    EXPECT_EQ(client->read(0, 0, 8).size(), 1u);
  }
}

TEST_F(StageHashes, WhatIsWrongEndsTheConnection) {
  std::uint32_t attempt = 0;
  const auto ends = [&](auto say) {
    const auto client = bench.gather(image, attempt++);
    say(*client);
    EXPECT_TRUE(client->ended()) << attempt;
  };
  ends([&](StageClient& client) { ask(client, {PageNumber{20}, 5}); });
  ends([&](StageClient& client) { ask(client, {PageNumber{0}, 0}); });
  ends([&](StageClient& client) {
    ask(client, {PageNumber{0}, wire::max_run_pages(system_page_size()) + 1});
  });
  ends([&](StageClient& client) { ask(client, {PageNumber{0}, 1}, 1, 1); });
  ends([&](StageClient& client) {
    const std::array<std::byte, 64> payload{};
    client.frame(wire::make_header(FrameType::kHashRequest, 0, {PageNumber{0}, 1}, 1), payload);
  });
  ends([&](StageClient& client) {
    wire::FrameHeader header = wire::make_header(FrameType::kHashRequest, 0, {PageNumber{0}, 1}, 1);
    wire::seal(header);
    ++header.checksum;
    client.wire().raw(&header, sizeof header);
  });
  const auto demand = bench.demand(image);
  ask(*demand, {PageNumber{0}, 1});
  EXPECT_TRUE(demand->ended()) << "not where somebody waits";
  const auto writer = bench.scatter(image, 1);
  ask(*writer, {PageNumber{0}, 1});
  EXPECT_TRUE(writer->ended()) << "not of a writer";
}

TEST_F(StageHashes, ASessionWithoutEnoughTokensHasNoKey) {
  constexpr std::uint16_t kShort = 6;
  ASSERT_TRUE(bench.stage->add_session(image, kShort, role_bit(wire::StageRole::kGather),
                                       stage_tokens(image, kShort, 1)));
  const auto client = bench.connect(image, kShort, wire::StageRole::kGather);
  ask(*client, {PageNumber{0}, 1});
  EXPECT_TRUE(client->ended());
}

}  // namespace
}  // namespace memferry::test
