// A server's side of page distribution over real connections: what members tell, give, ask and fetch; those who may not,
// and those who break the rules.
#include <gtest/gtest.h>

#include <bit>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>

#include "page/content_hash.h"
#include "sanitized.h"
#include "stage/content_domain.h"
#include "stage_client.h"

namespace memferry::test {
namespace {

using wire::FrameType;
using wire::StageRole;

constexpr std::uint16_t kSession = 1;

DomainKey domain_key(std::uint8_t number) {
  DomainKey key{};
  key.fill(number);
  return key;
}

class MemberStage : public testing::Test {
 protected:
  ImageId join(std::uint8_t number, std::uint8_t domain, std::optional<std::uint8_t> guest) const {
    const ImageId id = image_id(number);
    MemberConfig config{id, domain_key(domain), std::nullopt};
    if (guest) config.guest.emplace().fill(*guest);
    EXPECT_TRUE(bench.stage->join(config));
    EXPECT_TRUE(
        bench.stage->add_session(id, kSession, role_bit(StageRole::kPopular), stage_tokens(id, kSession)));
    return id;
  }
  std::unique_ptr<StageClient> member(std::uint8_t number, std::uint8_t domain,
                                      std::optional<std::uint8_t> guest) const {
    return bench.connect(join(number, domain, guest), kSession, StageRole::kPopular);
  }
  static std::vector<wire::ContentName> names(std::span<const std::byte> bytes, std::uint8_t domain = 1) {
    const ContentHasher hasher(domain_key(domain));
    std::vector<wire::ContentName> all;
    for (std::size_t at = 0; at < bytes.size(); at += system_page_size())
      all.push_back(ContentDomain::name_of(hasher(bytes.subspan(at, system_page_size()))));
    return all;
  }
  // The bits of what is wanted; nullopt: the connection was ended.
  static std::optional<std::vector<bool>> report(StageClient& to, const std::vector<wire::ContentName>& all) {
    if (!to.frame(wire::make_header(FrameType::kReport, 0, {PageNumber{0}, all.size()}, 9),
                  std::as_bytes(std::span(all))))
      return std::nullopt;
    const auto answer = to.receive();
    if (!answer) return std::nullopt;
    EXPECT_TRUE(answer->is(FrameType::kReported));
    EXPECT_EQ(answer->header.tag, 9u);
    EXPECT_EQ(answer->header.page_count, all.size());
    std::vector<bool> wanted;
    for (std::size_t i = 0; i < all.size(); ++i)
      wanted.push_back((std::to_integer<unsigned>(answer->payload[i / 8]) >> (i % 8) & 1U) != 0);
    return wanted;
  }
  static std::size_t count(const std::vector<bool>& bits) {
    return static_cast<std::size_t>(std::ranges::count(bits, true));
  }
  static bool give(StageClient& to, std::span<const std::byte> pages) {
    return to.frame(
        wire::make_header(FrameType::kPopularContent, 0, {PageNumber{0}, pages.size() / system_page_size()}),
        pages);
  }
  static std::vector<wire::PopularName> popular(StageClient& to, std::uint32_t least = 0) {
    std::vector<wire::PopularName> all;
    std::uint64_t cursor = 0;
    do {
      EXPECT_TRUE(to.frame(wire::make_header(FrameType::kPopularAsk, least, {PageNumber{cursor}, 5}, 3)));
      const auto answer = to.receive();
      if (!answer) return all;
      EXPECT_TRUE(answer->is(FrameType::kPopularNames));
      cursor = answer->header.first_page;
      const std::size_t before = all.size();
      all.resize(before + static_cast<std::size_t>(answer->header.page_count));
      if (!answer->payload.empty()) std::memcpy(&all[before], answer->payload.data(), answer->payload.size());
    } while (cursor != 0);
    return all;
  }
  static std::optional<StageClient::Frame> fetch(StageClient& to, const std::vector<wire::ContentName>& all) {
    if (!to.frame(wire::make_header(FrameType::kPopularRead, 0, {PageNumber{0}, all.size()}, 4),
                  std::as_bytes(std::span(all))))
      return std::nullopt;
    return to.receive();
  }
  // Two guests of the domain have these pages, and the server as well.
  void hold(std::span<const std::byte> pages, std::uint8_t number = 1, std::uint8_t domain = 1) {
    const auto first = member(number, domain, number);
    const auto second =
        member(static_cast<std::uint8_t>(number + 1), domain, static_cast<std::uint8_t>(number + 1));
    EXPECT_EQ(count(report(*first, names(pages, domain)).value()), 0u);
    const auto wanted = report(*second, names(pages, domain)).value();
    EXPECT_EQ(count(wanted), wanted.size());
    EXPECT_TRUE(give(*second, pages));
    EXPECT_TRUE(report(*second, names(pages, domain)));  // after it, what was given is there
  }

  StageBench bench;
};

TEST_F(MemberStage, WhatTwoGuestsHaveIsCountedGivenListedAndFetched) {
  const auto pages = random_pages(20, 1);
  hold(pages);
  EXPECT_EQ(bench.stage->stats().popular_pages, 20u);
  const auto host = member(10, 1, std::nullopt);
  const auto all = popular(*host);
  ASSERT_EQ(all.size(), 20u);
  for (const auto& each : all) EXPECT_EQ(each.score / 256, 2u);
  EXPECT_TRUE(popular(*host, 3 * 256).empty());
  auto asked = names(pages);
  asked.insert(asked.begin() + 3, wire::ContentName{1, 2});
  const auto came = fetch(*host, asked);
  ASSERT_TRUE(came);
  EXPECT_TRUE(came->is(FrameType::kPopularPages));
  EXPECT_EQ(came->header.first_page, ((std::uint64_t{1} << 21) - 1) & ~(std::uint64_t{1} << 3));
  EXPECT_EQ(came->payload, pages);
}

TEST_F(MemberStage, OneGuestOverManySessionsIsOneGuest) {
  const auto pages = random_pages(4, 2);
  for (std::uint8_t number = 1; number < 12; ++number) {
    const auto one = member(number, 1, 77);
    EXPECT_EQ(count(report(*one, names(pages)).value()), 0u) << "session " << int{number};
  }
}

TEST_F(MemberStage, AForgedPageIsNotTaken) {
  const auto pages = random_pages(4, 3);
  const auto first = member(1, 1, 1);
  const auto second = member(2, 1, 2);
  (void)report(*first, names(pages));
  ASSERT_EQ(count(report(*second, names(pages)).value()), 4u);
  const auto forged = random_pages(4, 99);
  ASSERT_TRUE(give(*second, forged));
  ASSERT_TRUE(report(*second, names(forged))) << "no fault of the connection's: a page may change";
  EXPECT_EQ(bench.stage->stats().popular_pages, 0u);
}

TEST_F(MemberStage, PagesThatWereNotAskedForEndTheConnection) {
  const auto pages = random_pages(4, 4);
  const auto one = member(1, 1, 1);
  ASSERT_TRUE(give(*one, pages));
  EXPECT_TRUE(one->ended());
  EXPECT_EQ(bench.stage->stats().popular_pages, 0u);
}

TEST_F(MemberStage, WhoIsNoGuestReportsNothing) {
  const auto host = member(1, 1, std::nullopt);
  EXPECT_FALSE(report(*host, names(random_pages(1, 5))));
}

TEST_F(MemberStage, AnotherDomainLearnsNothing) {
  const auto pages = random_pages(8, 6);
  hold(pages);
  // With the names overheard, and even with a guest that says that it has them.
  const auto stranger = member(10, 2, 10);
  EXPECT_TRUE(popular(*stranger).empty());
  const auto came = fetch(*stranger, names(pages));
  ASSERT_TRUE(came);
  EXPECT_EQ(came->header.first_page, 0u);
  EXPECT_TRUE(came->payload.empty());
  EXPECT_EQ(count(report(*stranger, names(pages)).value()), 0u);
  const auto other = member(11, 2, 11);
  const auto wanted = report(*other, names(pages));
  EXPECT_EQ(count(wanted.value()), 8u) << "two of its own: it is asked as if nobody had them";
  ASSERT_TRUE(give(*other, pages));
  ASSERT_TRUE(report(*other, names(random_pages(1, 7))));
  EXPECT_EQ(bench.stage->stats().popular_pages, 8u) << "under its own key these pages have other names";
}

TEST_F(MemberStage, RolesDoNotMix) {
  const ImageId id = join(1, 1, 1);
  for (const StageRole role :
       {StageRole::kScatter, StageRole::kGather, StageRole::kDemand, StageRole::kChain, StageRole::kProbe}) {
    EXPECT_EQ(bench.say(stage_hello(id, kSession, role, 0)), wire::HelloStatus::kRefused);
  }
  EXPECT_THROW(bench.stage->add_session(id, 2, role_bit(StageRole::kScatter), stage_tokens(id, 2)),
               std::invalid_argument);
  const ImageId image = image_id(9);
  bench.make(image, {8}, 0, domain_key(1));
  EXPECT_EQ(bench.say(stage_hello(image, StageBench::kSource, StageRole::kPopular, 0)),
            wire::HelloStatus::kRefused);
  EXPECT_THROW(bench.stage->add_session(image, 7, role_bit(StageRole::kPopular), stage_tokens(image, 7)),
               std::invalid_argument);
  EXPECT_THROW((void)bench.stage->join({image, domain_key(1), std::nullopt}), std::invalid_argument);
  EXPECT_THROW((void)bench.stage->create_image({id, {8}, 0, {}}), std::invalid_argument);
  EXPECT_EQ(bench.stage->image(id), std::nullopt);
}

TEST_F(MemberStage, AMembershipEndsWithItsConnection) {
  const ImageId id = join(1, 1, 1);
  const auto client = bench.connect(id, kSession, StageRole::kPopular);
  EXPECT_EQ(bench.stage->stats().members, 1u);
  EXPECT_TRUE(bench.stage->drop(id));
  EXPECT_TRUE(client->ended());
  EXPECT_EQ(bench.stage->stats().members, 0u);
  EXPECT_EQ(bench.say(stage_hello(id, kSession, StageRole::kPopular, 1)), wire::HelloStatus::kLost);
}

TEST_F(MemberStage, ImagesGetTheRoomAndAreNotDisturbed) {
  const auto pages = random_pages(60, 8);
  hold(pages);
  ASSERT_EQ(bench.stage->stats().popular_pages, 60u);
  const std::uint64_t free = bench.stage->stats().free_bytes / system_page_size();
  const ImageId image = image_id(20);
  bench.make(image, {free});
  const std::uint64_t left = bench.stage->stats().free_bytes / system_page_size();
  const auto content = random_pages(left, 9);
  const auto source = bench.scatter(image);
  ASSERT_TRUE(source->pages(0, 0, content, {0, wire::Holders::kNobody}));
  const auto barrier = source->barrier(1);
  EXPECT_TRUE(barrier.acknowledged);
  EXPECT_TRUE(barrier.refused.empty()) << "what was announced as free is";
  EXPECT_EQ(bench.stage->stats().popular_pages, 0u);
  ImageOracle oracle{{free}};
  oracle.content(0, 0, content);
  oracle.check(*bench.gather(image));
}

TEST_F(MemberStage, TheCapHolds) {
  // Far more than an eighth of the slab, from two guests.
  const std::uint64_t most = bench.stage->stats().slab_bytes / system_page_size() / 8;
  const auto first = member(1, 1, 1);
  const auto second = member(2, 1, 2);
  for (std::uint64_t seed = 100; seed < 100 + 2 * most / 64; ++seed) {
    const auto pages = random_pages(64, seed);
    (void)report(*first, names(pages));
    const auto wanted = report(*second, names(pages));
    ASSERT_TRUE(wanted);
    std::vector<std::byte> given;
    for (std::size_t i = 0; i < 64; ++i) {
      if (!(*wanted)[i]) continue;
      const auto page = std::span(pages).subspan(i * system_page_size(), system_page_size());
      given.insert(given.end(), page.begin(), page.end());
    }
    ASSERT_TRUE(given.empty() || give(*second, given));
  }
  ASSERT_TRUE(report(*second, {wire::ContentName{5, 6}}));
  const StageStats stats = bench.stage->stats();
  EXPECT_LE(stats.popular_pages, most);
  EXPECT_GT(stats.popular_pages, most / 2);
  EXPECT_LE(stats.popular_table_bytes, stats.slab_bytes / 64);
}

TEST_F(MemberStage, WhateverComesInsteadEndsTheConnectionAndNothingElse) {
  const auto pages = random_pages(2, 11);
  hold(pages);
  const auto good = names(pages);
  std::uint8_t number = 30;
  const auto ended = [&](const auto& say) {
    const auto client = member(number, 1, number);
    ++number;
    say(*client);
    return client->ended();
  };
  const auto payload = std::as_bytes(std::span(good));
  EXPECT_TRUE(ended([&](StageClient& to) {  // fewer names than it says
    (void)to.frame(wire::make_header(FrameType::kReport, 0, {PageNumber{0}, 3}, 1), payload);
  }));
  EXPECT_TRUE(ended([&](StageClient& to) {  // none
    (void)to.frame(wire::make_header(FrameType::kReport, 0, {PageNumber{0}, 0}, 1));
  }));
  EXPECT_TRUE(ended([&](StageClient& to) {  // far too many
    (void)to.frame(wire::make_header(FrameType::kReport, 0, {PageNumber{0}, ~std::uint64_t{0}}, 1), payload);
  }));
  EXPECT_TRUE(ended([&](StageClient& to) {  // a wrong checksum
    wire::FrameHeader header = wire::make_header(FrameType::kReport, 0, {PageNumber{0}, 2}, 1);
    wire::seal(header, payload);
    header.checksum ^= 1;
    (void)to.wire().raw(&header, sizeof header);
    (void)to.wire().raw(payload.data(), payload.size());
  }));
  EXPECT_TRUE(ended([&](StageClient& to) {  // more reads than an answer has bits
    const std::vector<wire::ContentName> many(65);
    (void)to.frame(wire::make_header(FrameType::kPopularRead, 0, {PageNumber{0}, 65}, 1),
                   std::as_bytes(std::span(many)));
  }));
  EXPECT_TRUE(ended([&](StageClient& to) {  // a server's own word
    const std::uint64_t word = 1;
    (void)to.frame(wire::make_header(FrameType::kReported, 0, {PageNumber{0}, 1}, 1),
                   std::as_bytes(std::span(&word, 1)));
  }));
  for (const FrameType type : {FrameType::kBarrier, FrameType::kGoodbye, FrameType::kMapRequest}) {
    EXPECT_TRUE(ended([&](StageClient& to) { (void)to.frame(wire::make_header(type)); }));
  }
  EXPECT_TRUE(ended([&](StageClient& to) {  // pages of no image
    (void)to.pages(0, 0, pages, {0, wire::Holders::kNobody});
  }));
  const auto host = member(200, 1, std::nullopt);
  EXPECT_EQ(popular(*host).size(), 2u) << "what was there is there";
  // A cursor from nowhere is the end, not a place in memory.
  ASSERT_TRUE(
      host->frame(wire::make_header(FrameType::kPopularAsk, 0, {PageNumber{~std::uint64_t{0} - 5}, 5}, 3)));
  const auto answer = host->receive();
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->header.first_page, 0u);
  EXPECT_EQ(answer->header.page_count, 0u);
}

TEST_F(MemberStage, AFloodOfNamesPushesOutNothingThatIsPopular) {
  const auto pages = random_pages(16, 12);
  hold(pages);
  const auto flood = member(50, 1, 50);
  std::mt19937_64 random(13);
  for (int frame = 0; frame < 40; ++frame) {
    std::vector<wire::ContentName> many(wire::kMostNames);
    for (auto& each : many) each = {random(), random()};
    ASSERT_TRUE(report(*flood, many));
  }
  const auto host = member(60, 1, std::nullopt);
  EXPECT_EQ(popular(*host).size(), 16u);
  EXPECT_LE(bench.stage->stats().popular_table_bytes, bench.stage->stats().slab_bytes / 64);
}

// As many members as one server takes connections of, each of which has sent and been sent the longest frames: beside the
// slab, all of which is in use, they stay within the reserve.
TEST(MemberDesks, ManyConnectionsStayWithinTheReserve) {
  constexpr std::uint64_t kMemory = 32ULL << 20U;
  constexpr std::uint64_t kReserve = kMemory / 4;
  StageBench bench(kMemory);
  bench.stage->preallocate();
  const auto connect = [&](std::uint16_t number) {
    ImageId id = image_id(1);
    std::memcpy(&id[2], &number, sizeof number);
    EXPECT_TRUE(bench.stage->join({id, domain_key(1), MemberGuest{}}));
    EXPECT_TRUE(
        bench.stage->add_session(id, kSession, role_bit(StageRole::kPopular), stage_tokens(id, kSession, 1)));
    std::unique_ptr<StageClient> client;
    return bench.say(stage_hello(id, kSession, StageRole::kPopular, 0), &client) ==
                   wire::HelloStatus::kAccepted
               ? std::move(client)
               : nullptr;
  };
  std::vector<wire::ContentName> names(wire::kMostNames);
  std::mt19937_64 random(1);
  for (auto& each : names) each = {random(), random()};
  const auto use = [&](StageClient& client) {
    ASSERT_TRUE(client.frame(wire::make_header(FrameType::kReport, 0, {PageNumber{0}, names.size()}, 1),
                             std::as_bytes(std::span(names))));
    ASSERT_TRUE(client.receive());
    ASSERT_TRUE(
        client.frame(wire::make_header(FrameType::kPopularAsk, 0, {PageNumber{0}, wire::kMostNames}, 2)));
    ASSERT_TRUE(client.receive());
  };
  std::vector<std::unique_ptr<StageClient>> clients;
  clients.push_back(connect(0));
  ASSERT_TRUE(clients.back());
  ASSERT_NO_FATAL_FAILURE(use(*clients.back()));  // what the test itself takes for it
  const std::uint64_t before = resident_bytes();
  for (std::uint16_t number = 1;; ++number) {
    auto client = connect(number);
    if (!client) break;
    clients.push_back(std::move(client));
    ASSERT_NO_FATAL_FAILURE(use(*clients.back()));
    ASSERT_LE(clients.size(), 256u) << "there is a bound";
  }
  EXPECT_GE(clients.size(), 128u);
  if (!kSanitized) {
    EXPECT_LT(resident_bytes(), before + kReserve);
  }
  // An image finds a place beside them, and who goes makes room.
  const ImageId image = image_id(9);
  bench.make(image, {8});
  EXPECT_TRUE(bench.scatter(image)->barrier(1).acknowledged);
  clients.pop_back();
  // The image's has ended as well.
  while (bench.stage->stats().connections > clients.size()) std::this_thread::yield();
  EXPECT_TRUE(connect(1000));
}

class StallingMembers : public testing::Test {
 protected:
  std::unique_ptr<StageClient> member(const StageBench& bench, std::uint8_t number) {
    const ImageId id = image_id(number);
    EXPECT_TRUE(bench.stage->join({id, domain_key(1), MemberGuest{number}}));
    EXPECT_TRUE(
        bench.stage->add_session(id, kSession, role_bit(StageRole::kPopular), stage_tokens(id, kSession)));
    return bench.connect(id, kSession, StageRole::kPopular);
  }
  bool begin_report(StageClient& to, std::size_t sent) {
    wire::FrameHeader header = wire::make_header(FrameType::kReport, 0, {PageNumber{0}, names.size()}, 1);
    wire::seal(header, std::as_bytes(std::span(names)));
    // In one piece: a whole report is never one that stalls.
    std::vector<std::byte> bytes;
    for (const auto part :
         {std::as_bytes(std::span(&header, 1)), std::as_bytes(std::span(names)).first(sent)})
      bytes.insert(bytes.end(), part.begin(), part.end());
    return to.wire().raw(bytes.data(), bytes.size());
  }
  std::vector<wire::ContentName> names = std::vector<wire::ContentName>(64, wire::ContentName{1, 2});
};

TEST_F(StallingMembers, WithinAFrameAreCutAndTheOthersComeToTheirTurn) {
  const StageBench bench(StageConfig{.memory_bytes = 16ULL << 20U, .member_timeout_ms = 200});
  const auto quiet = member(bench, 1);
  std::vector<std::unique_ptr<StageClient>> stalled;
  for (std::uint8_t number = 2; number < 12; ++number) {
    stalled.push_back(member(bench, number));
    ASSERT_TRUE(begin_report(*stalled.back(), 100));
  }
  const auto other = member(bench, 20);
  ASSERT_TRUE(begin_report(*other, names.size() * sizeof names[0]));
  EXPECT_TRUE(other->receive()) << "behind those that stand still";
  for (const auto& each : stalled) EXPECT_TRUE(each->ended());
  // Between frames: it has been quiet for longer than they.
  ASSERT_TRUE(begin_report(*quiet, names.size() * sizeof names[0]));
  EXPECT_TRUE(quiet->receive());
}

TEST_F(StallingMembers, WhoTricklesIsCutAsWell) {
  const StageBench bench(StageConfig{.memory_bytes = 16ULL << 20U, .member_timeout_ms = 200});
  const auto slow = member(bench, 1);
  ASSERT_TRUE(begin_report(*slow, 0));
  bool cut = false;
  const auto* const bytes = reinterpret_cast<const std::byte*>(names.data());
  for (std::size_t at = 0; at < names.size() * sizeof names[0] && !cut; ++at) {
    cut = !slow->wire().raw(bytes + at, 1);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_TRUE(cut);
}

// Whoever ends a membership that waits for its turn does not wait for those before it.
TEST_F(StallingMembers, WhoWaitsBehindThemCanLeave) {
  const StageBench bench(StageConfig{.memory_bytes = 16ULL << 20U, .member_timeout_ms = 600'000});
  std::vector<std::unique_ptr<StageClient>> stalled;
  for (std::uint8_t number = 2; number < 12; ++number) {
    stalled.push_back(member(bench, number));
    ASSERT_TRUE(begin_report(*stalled.back(), 100));
  }
  for (std::uint8_t number = 11; number >= 2; --number) EXPECT_TRUE(bench.stage->drop(image_id(number)));
  for (const auto& each : stalled) EXPECT_TRUE(each->ended());
}

}  // namespace
}  // namespace memferry::test
