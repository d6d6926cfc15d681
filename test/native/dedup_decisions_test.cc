// What deduplication decides without asking anybody: who is the directory for a content, whether looking pays, how
// far ahead, how long to wait. And the content hash, against libcrypto's own HMAC.
#include <gtest/gtest.h>
#include <openssl/hmac.h>

#include <cstring>
#include <map>
#include <random>

#include "page/content_hash.h"
#include "transfer/dedup_pace.h"
#include "transfer/directory_range.h"

namespace memferry::test {
namespace {

TEST(ContentHash, IsHmacSha256) {
  std::mt19937_64 random(7);
  for (const std::size_t bytes : {0UL, 1UL, 55UL, 64UL, 100UL, 4096UL, 65536UL}) {
    ContentKey key{};
    for (auto& each : key) each = static_cast<std::uint8_t>(random());
    std::vector<std::byte> content(bytes);
    for (auto& each : content) each = static_cast<std::byte>(random());
    ContentDigest expected{};
    unsigned length = 0;
    ASSERT_NE(::HMAC(::EVP_sha256(), key.data(), static_cast<int>(key.size()),
                     reinterpret_cast<const unsigned char*>(content.data()), content.size(), expected.data(),
                     &length),
              nullptr);
    const ContentHasher hasher(key);
    EXPECT_EQ(hasher(content), expected) << bytes;
    EXPECT_EQ(hasher(content), expected) << "a second time";
    ContentKey other = key;
    other[31] ^= 1;
    EXPECT_FALSE(equal_digests(ContentHasher(other)(content), expected));
  }
}

std::vector<wire::ContentName> names(std::size_t count) {
  std::mt19937_64 random(3);
  std::vector<wire::ContentName> all(count);
  for (auto& each : all) each = {random(), random()};
  return all;
}

TEST(DirectoryRange, EverySourceAsksTheSameServerWhateverItsListLooksLike) {
  const std::vector<std::uint64_t> a{11, 22, 33, 44};
  const std::vector<std::uint64_t> b{44, 11, 33, 22};
  for (const auto& name : names(2000)) {
    EXPECT_EQ(a[*directory_of(name, a)], b[*directory_of(name, b)]);
  }
}

TEST(DirectoryRange, AServerLessMovesOnlyItsOwnNames) {
  const std::vector<std::uint64_t> all{11, 22, 33, 44};
  std::vector<std::uint64_t> fewer = all;
  fewer[2] = 0;  // it has no part any more
  for (const auto& name : names(2000)) {
    const std::uint64_t before = all[*directory_of(name, all)];
    const std::uint64_t after = fewer[*directory_of(name, fewer)];
    if (before != 33) {
      EXPECT_EQ(after, before);
    } else {
      EXPECT_NE(after, 33u);
    }
  }
}

TEST(DirectoryRange, SharesTheNamesOut) {
  // Identities that differ in a bit as well.
  const std::vector<std::uint64_t> all{1, 2, 3, 0x8000000000000001ULL, 0xffffffff00000000ULL};
  std::map<std::size_t, unsigned> shares;
  for (const auto& name : names(20000)) ++shares[*directory_of(name, all)];
  for (const auto& [server, share] : shares) EXPECT_NEAR(share, 4000, 400) << server;
  EXPECT_EQ(shares.size(), 5u);
}

TEST(DirectoryRange, NobodyToAsk) {
  EXPECT_EQ(directory_of({1, 2}, {}), std::nullopt);
  const std::vector<std::uint64_t> none{0, 0};
  EXPECT_EQ(directory_of({1, 2}, none), std::nullopt);
}

constexpr double kGigabit = 119e6;
constexpr double kHash = 1.6e9;

TEST(DedupPays, OverASlowLinkWhateverIsFound) {
  EXPECT_TRUE(dedup_pays({kGigabit, kHash, 100000, 0}));
  EXPECT_TRUE(dedup_pays({kGigabit, kHash, 100000, 100000}));
}

TEST(DedupPays, NotWhereTheLinkIsAsFastAsTheHash) {
  EXPECT_FALSE(dedup_pays({kHash, kHash, 5000, 0}));
  EXPECT_FALSE(dedup_pays({kHash, kHash, 5000, 5000}));
  EXPECT_FALSE(dedup_pays({10 * kHash, kHash, 5000, 5000}));
}

TEST(DedupPays, InBetweenByWhatIsFound) {
  const double link = kHash / 3;
  EXPECT_FALSE(dedup_pays({link, kHash, 5000, 0}));
  EXPECT_FALSE(dedup_pays({link, kHash, 5000, 3000}));
  EXPECT_TRUE(dedup_pays({link, kHash, 5000, 4000}));
}

TEST(DedupPays, ABusyCpuIsASlowHash) {
  EXPECT_TRUE(dedup_pays({kGigabit, 4.1 * kGigabit, 5000, 0}));
  EXPECT_FALSE(dedup_pays({kGigabit, 3.9 * kGigabit, 5000, 0}));
}

TEST(DedupPays, OfAnUnknownLinkOnlyAFirstLook) {
  EXPECT_TRUE(dedup_pays({std::nullopt, kHash, 0, 0}));
  EXPECT_FALSE(dedup_pays({std::nullopt, kHash, kFirstLookPages, kFirstLookPages}));
}

TEST(DedupLead, IsAQuarterOfASecondWithinBounds) {
  EXPECT_EQ(dedup_lead_pages(40.96e6, 4096), 2500u);
  EXPECT_EQ(dedup_lead_pages(1.0, 4096), kLeastLeadPages);
  EXPECT_EQ(dedup_lead_pages(1e12, 4096), kMostLeadPages);
  EXPECT_EQ(dedup_lead_pages(std::nullopt, 4096), kFirstLookPages);
}

TEST(DedupLook, IsMoreWhereEachTimeTakesLongAndWhereMostIsFound) {
  using std::chrono::milliseconds;
  const auto found = [](std::uint64_t hits) {
    DedupMeasured measured;
    measured.examined_pages = 1000;
    measured.hits = hits;
    return measured;
  };
  EXPECT_EQ(dedup_look_pages({}, 10'000, 0, milliseconds(1)), kLeastLookPages);
  EXPECT_EQ(dedup_look_pages({}, 10'000, 0, milliseconds(20)), 2 * kLeastLookPages);
  EXPECT_EQ(dedup_look_pages({}, 10'000, 0, milliseconds(1'000'000)), kMostLookPages);
  // Never more than may wait to be sent plainly, as far as is known.
  EXPECT_EQ(dedup_look_pages({}, 1000, 900, milliseconds(100)), 100u);
  EXPECT_EQ(dedup_look_pages({}, 1000, 1000, milliseconds(100)), 0u);
  EXPECT_EQ(dedup_look_pages({}, 1000, 5000, milliseconds(100)), 0u);
  EXPECT_EQ(dedup_look_pages(found(750), 1000, 900, milliseconds(100)), 400u);
  EXPECT_EQ(dedup_look_pages(found(1000), 1000, 900, milliseconds(100)), 800u);
  EXPECT_EQ(dedup_look_pages(found(1000), 1000, 0, milliseconds(1'000'000)), kMostLookPages);
}

TEST(DedupWait, IsPaidForByWhatWasSaved) {
  using std::chrono::microseconds;
  const auto tenth = static_cast<std::uint64_t>(kGigabit / 10);
  EXPECT_EQ(dedup_wait(0, 0, kGigabit), microseconds{0});
  EXPECT_EQ(dedup_wait(1 << 20, 0, std::nullopt), microseconds{0});
  EXPECT_EQ(dedup_wait(tenth, 0, kGigabit), microseconds{25000});
  EXPECT_EQ(dedup_wait(1ULL << 40, 0, kGigabit), microseconds(kLongestWait));
  EXPECT_EQ(dedup_wait(0, tenth, kGigabit), microseconds{25000});
  EXPECT_EQ(dedup_wait(0, 1ULL << 40, kGigabit), microseconds(kLongestTwinWait));
  EXPECT_EQ(dedup_wait(0, 4096, std::nullopt), microseconds(kLongestTwinWait));
}

TEST(DedupRounds, AShortOneIsNotLookedAt) {
  EXPECT_TRUE(dedup_round_is_long(4096, std::nullopt));
  EXPECT_FALSE(dedup_round_is_long(static_cast<std::uint64_t>(kGigabit / 11), kGigabit));
  EXPECT_TRUE(dedup_round_is_long(static_cast<std::uint64_t>(kGigabit / 9), kGigabit));
}

TEST(DedupWaiting, GoesOnWhereItWasInterrupted) {
  using std::chrono::milliseconds;
  const DedupWaiting::Clock::time_point start{};
  const milliseconds allowed{100};
  DedupWaiting waiting;
  EXPECT_FALSE(waiting.too_long(start, start + milliseconds(60), allowed));
  waiting.interrupted(start + milliseconds(60));
  waiting.interrupted(start + milliseconds(500));
  // Again nothing is left to send, since 510 ms.
  EXPECT_FALSE(waiting.too_long(start + milliseconds(510), start + milliseconds(550), allowed));
  EXPECT_TRUE(waiting.too_long(start + milliseconds(510), start + milliseconds(551), allowed));
  // However often it begins anew.
  waiting.interrupted(start + milliseconds(551));
  EXPECT_TRUE(waiting.too_long(start + milliseconds(600), start + milliseconds(600), allowed));
}

}  // namespace
}  // namespace memferry::test
