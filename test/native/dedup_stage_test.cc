// A server's side of deduplication over real connections: what is asked, named and referred to, by those who may and
// by those who may not.
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "packed.h"
#include "page/content_hash.h"
#include "stage/content_domain.h"
#include "stage_client.h"

namespace memferry::test {
namespace {

using wire::FrameType;
using wire::Holders;
using wire::KnownHolders;
using wire::StageRole;

constexpr Holders kHere{0, Holders::kNobody};
constexpr std::uint64_t kPages = 64;

DomainKey domain_key(std::uint8_t number) {
  DomainKey key{};
  key.fill(number);
  return key;
}

class DedupStage : public testing::Test {
 protected:
  void SetUp() override {
    make(a, 1);
    make(b, 1);
    make(stranger, 2);
    bench.make(nobodys, {kPages});
  }
  void make(const ImageId& id, std::uint8_t domain) { bench.make(id, {kPages}, 0, domain_key(domain)); }
  std::unique_ptr<StageClient> prober(const ImageId& id, std::uint32_t attempt = 0) const {
    return bench.connect(id, StageBench::kSource, StageRole::kProbe, attempt);
  }
  static std::vector<wire::ContentHash> contents(std::span<const std::byte> bytes, std::uint8_t domain = 1) {
    const ContentHasher hasher(domain_key(domain));
    std::vector<wire::ContentHash> all;
    for (std::size_t at = 0; at < bytes.size(); at += system_page_size())
      all.push_back(hasher(bytes.subspan(at, system_page_size())));
    return all;
  }
  static std::vector<wire::ContentName> names(std::span<const std::byte> bytes, std::uint8_t domain = 1) {
    std::vector<wire::ContentName> all;
    for (const auto& each : contents(bytes, domain)) all.push_back(ContentDomain::name_of(each));
    return all;
  }
  static bool say_names(StageClient& to, std::uint64_t first, const std::vector<wire::ContentName>& all) {
    wire::FrameHeader header = wire::make_header(FrameType::kNames, 0, {PageNumber{first}, all.size()}, 77);
    if (!to.frame(header, std::as_bytes(std::span(all)))) return false;
    const auto answer = to.receive();
    return answer && answer->is(FrameType::kNamed) && answer->header.tag == 77;
  }
  static bool say_held(StageClient& to, KnownHolders holders, const std::vector<wire::ContentName>& all) {
    std::vector<wire::ContentName> payload{{holders.first, holders.second}};
    payload.insert(payload.end(), all.begin(), all.end());
    return to.frame(wire::make_header(FrameType::kHeld, 0, {PageNumber{0}, all.size()}),
                    std::as_bytes(std::span(payload)));
  }
  static std::vector<KnownHolders> probe(StageClient& to, const std::vector<wire::ContentName>& all) {
    if (!to.frame(wire::make_header(FrameType::kProbe, 0, {PageNumber{0}, all.size()}, 5),
                  std::as_bytes(std::span(all))))
      return {};
    const auto answer = to.receive();
    if (!answer) return {};
    EXPECT_TRUE(answer->is(FrameType::kProbed));
    EXPECT_EQ(answer->header.tag, 5u);
    EXPECT_EQ(answer->header.page_count, all.size());
    std::vector<KnownHolders> said(answer->payload.size() / sizeof(KnownHolders));
    std::memcpy(said.data(), answer->payload.data(), answer->payload.size());
    return said;
  }
  static bool refer(StageClient& to, std::uint64_t first, const std::vector<wire::ContentHash>& all,
                    Holders holders = kHere) {
    return to.frame(
        wire::make_header(FrameType::kReference, 0, {PageNumber{first}, all.size()}, holders.tag()),
        std::as_bytes(std::span(all)));
  }
  // Pages 0 .. 15 of image a, named.
  std::vector<std::byte> store_some() {
    const auto bytes = random_pages(16, 4);
    source_a = bench.scatter(a);
    EXPECT_TRUE(source_a->pages(0, 0, bytes, kHere));
    EXPECT_TRUE(source_a->barrier(1).acknowledged);
    prober_a = prober(a);
    EXPECT_TRUE(say_names(*prober_a, 0, names(bytes)));
    return bytes;
  }

  // With another image's pages.
  void fill_up() {
    const ImageId filler = image_id(5);
    const std::uint64_t many = bench.stage->stats().free_bytes / system_page_size();
    bench.make(filler, {many});
    const auto filling = bench.scatter(filler);
    ASSERT_TRUE(filling->pages(0, 0, random_pages(many, 23), kHere));
    ASSERT_TRUE(filling->barrier(1).acknowledged);
    ASSERT_EQ(bench.stage->stats().free_bytes, 0u);
  }
  // What server 1 passes on.
  std::unique_ptr<StageClient> chain_into_a() {
    const auto session = static_cast<std::uint16_t>(wire::kFirstChainSession + 1);
    EXPECT_TRUE(bench.stage->add_session(a, session, role_bit(StageRole::kChain), stage_tokens(a, session)));
    return bench.connect(a, session, StageRole::kChain);
  }

  StageBench bench;
  const ImageId a = image_id(1);
  const ImageId b = image_id(2);
  const ImageId stranger = image_id(3);
  const ImageId nobodys = image_id(4);
  std::unique_ptr<StageClient> source_a;
  std::unique_ptr<StageClient> prober_a;
};

// In rounds a page comes again and again. What others have of it is what it was when they referred to it.
TEST_F(DedupStage, APageThatIsSentAgainIsNobodyElsesMatter) {
  const auto bytes = store_some();
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(refer(*source_b, 0, contents(bytes)));
  ASSERT_TRUE(source_b->barrier(1).refused.empty());
  // Plainly, as zeros, as a reference to something else, torn.
  const auto newer = random_pages(8, 9);
  ASSERT_TRUE(source_a->pages(0, 0, newer, kHere));
  ASSERT_TRUE(source_a->zeros(0, 8, 2, kHere));
  const std::vector<wire::ContentHash> all = contents(bytes);
  ASSERT_TRUE(refer(*source_a, 10, {all[0], all[1]}));
  ASSERT_TRUE(source_a->barrier(2).acknowledged);
  ImageOracle oracle_b{{kPages}};
  oracle_b.content(0, 0, bytes);
  oracle_b.check(*bench.gather(b));
  ImageOracle oracle_a{{kPages}};
  oracle_a.content(0, 0, newer);
  oracle_a.zeros(0, 8, 2);
  const std::size_t size = system_page_size();
  // The first two pages of what it had are only b's by now.
  const auto here = std::span<const std::byte>(bytes);
  oracle_a.content(0, 10, here.first(2 * size));
  oracle_a.content(0, 12, here.subspan(12 * size));
  const auto gather_a = bench.gather(a);
  oracle_a.check(*gather_a);
  // And the other way round.
  ASSERT_TRUE(source_b->pages(0, 0, random_pages(16, 10), kHere));
  ASSERT_TRUE(source_b->barrier(2).acknowledged);
  oracle_a.check(*gather_a);
}

// What is parked does not change any more, so all of it can be shared; it goes when its last owner does.
TEST_F(DedupStage, ASealedImageIsSharedAndOutlived) {
  const auto bytes = store_some();
  ASSERT_TRUE(bench.stage->seal(a));
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(refer(*source_b, 3, contents(bytes)));
  EXPECT_TRUE(source_b->barrier(1).refused.empty());
  ASSERT_TRUE(bench.stage->drop(a));
  ImageOracle oracle{{kPages}};
  oracle.content(0, 3, bytes);
  oracle.check(*bench.gather(b));
  // Somebody else still finds it there.
  make(a, 1);
  const auto again = bench.scatter(a);
  ASSERT_TRUE(refer(*again, 0, contents(bytes)));
  EXPECT_TRUE(again->barrier(1).refused.empty());
}

TEST_F(DedupStage, AReferenceIsAPageOfItsOwn) {
  const auto bytes = store_some();
  const auto free_before = bench.stage->stats().free_bytes;
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(refer(*source_b, 20, contents(bytes)));
  const auto barrier = source_b->barrier(1);
  EXPECT_TRUE(barrier.acknowledged);
  EXPECT_TRUE(barrier.refused.empty());
  EXPECT_EQ(bench.stage->image(b)->pages_held, 16u);
  EXPECT_EQ(bench.stage->image(b)->pages_shared, 16u);
  EXPECT_EQ(bench.stage->stats().shared_pages, 16u);
  EXPECT_EQ(bench.stage->stats().free_bytes, free_before) << "one copy";
  ImageOracle oracle{{kPages}};
  oracle.content(0, 20, bytes);
  oracle.check(*bench.gather(b));
  // The one that brought it goes, and takes nothing along.
  ASSERT_TRUE(bench.stage->drop(a));
  oracle.check(*bench.gather(b, 1));
  // A third one still finds it.
  make(image_id(5), 1);
  const auto third = bench.scatter(image_id(5));
  ASSERT_TRUE(refer(*third, 0, contents(bytes)));
  EXPECT_TRUE(third->barrier(1).refused.empty());
  ASSERT_TRUE(bench.stage->drop(b));
  ImageOracle last{{kPages}};
  last.content(0, 0, bytes);
  last.check(*bench.gather(image_id(5)));
}

// A slot that two guests have is changed by neither: a delta of one makes it a page of its own.
TEST_F(DedupStage, ADeltaLeavesASharedPageToTheOthers) {
  const auto bytes = store_some();
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(refer(*source_b, 0, contents(bytes)));
  const auto newer = changed_bytes(bytes, 3);
  const auto payload = delta_of(bytes, newer, system_page_size());
  const wire::FrameHeader header =
      encoded_header(wire::kFlagDelta, 0, 0, newer, payload.size(), system_page_size(), kHere.tag());
  ASSERT_TRUE(source_b->wire().raw(&header, sizeof header));
  ASSERT_TRUE(source_b->wire().raw(payload.data(), payload.size()));
  const auto barrier = source_b->barrier(1);
  ASSERT_TRUE(barrier.acknowledged);
  EXPECT_TRUE(barrier.refused.empty());
  ImageOracle first{{kPages}};
  first.content(0, 0, bytes);
  first.check(*bench.gather(a));
  ImageOracle second{{kPages}};
  second.content(0, 0, newer);
  second.check(*bench.gather(b));
  // What it came to is content of the domain like any other.
  const auto prober_b = prober(b);
  EXPECT_TRUE(say_names(*prober_b, 0, names(newer)));
  ASSERT_TRUE(refer(*source_a, 32, contents(newer)));
  EXPECT_TRUE(source_a->barrier(2).refused.empty());
  first.content(0, 32, newer);
  first.check(*bench.gather(a, 1));
}

TEST_F(DedupStage, WhatIsNotHereIsRefusedAndForgotten) {
  const auto bytes = store_some();
  const auto other = random_pages(4, 9);
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(source_b->pages(0, 0, other, kHere));
  auto all = contents(bytes);
  all.resize(8);
  all[2] = contents(other)[0];  // held by b itself, but nobody has named it
  all[3][31] ^= 1;
  all[6] = {};
  ASSERT_TRUE(refer(*source_b, 0, all));
  const auto barrier = source_b->barrier(1);
  EXPECT_TRUE(barrier.acknowledged);
  EXPECT_EQ(barrier.refused, (std::vector<StageClient::Refused>{{0, 2, 2}, {0, 6, 1}}));
  ImageOracle oracle{{kPages}};
  oracle.content(0, 0, bytes);
  oracle.absent(0, 2, 2);
  oracle.absent(0, 6, kPages - 6);
  oracle.content(0, 7, std::span(bytes).subspan(7 * system_page_size(), system_page_size()));
  oracle.check(*bench.gather(b));
}

// What a slow server passes on when its source has sent it another way and said for good where it is: there is no room
// for it, since the slots that it has are others' too.
TEST_F(DedupStage, WhatIsSettledOutlivesALateCopyThatIsRefused) {
  const auto bytes = store_some();
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(refer(*source_b, 0, contents(bytes)));
  ASSERT_TRUE(source_b->barrier(1).refused.empty());
  ASSERT_TRUE(source_a->map(0, 0, hashes_of(bytes), {0, 2}, wire::kFlagFinal));
  const auto elsewhere = random_pages(4, 22);
  ASSERT_TRUE(source_a->map(0, 40, hashes_of(elsewhere), {2, 3}, wire::kFlagFinal));
  ASSERT_TRUE(source_a->barrier(2).acknowledged);
  ASSERT_NO_FATAL_FAILURE(fill_up());
  const auto late = chain_into_a();
  ASSERT_TRUE(late->pages(0, 0, bytes, {1, 0}));
  EXPECT_EQ(late->barrier(1).refused, (std::vector<StageClient::Refused>{{0, 0, 16}}));
  // To what is not here any more, or by no name.
  ASSERT_TRUE(refer(*late, 40, contents(elsewhere), {1, 0}));
  EXPECT_EQ(late->barrier(2).refused, (std::vector<StageClient::Refused>{{0, 40, 4}}));

  const auto gather = bench.gather(a);
  ImageOracle oracle{{kPages}};
  oracle.content(0, 0, bytes);
  oracle.check(*gather);
  const auto map = gather->read_map();
  ASSERT_EQ(map.runs.size(), 2u);
  EXPECT_EQ(map.runs[0].header.page_count, 16u);
  EXPECT_EQ(map.runs[0].header.tag, (Holders{0, 2}).tag());
  EXPECT_EQ(map.runs[1].header.first_page, 40u);
  EXPECT_EQ(map.runs[1].header.page_count, 4u);
  EXPECT_EQ(map.runs[1].header.tag, (Holders{2, 3}).tag());
  for (const auto& run : map.runs) EXPECT_EQ(run.header.flags, wire::kFlagFinal);
}

// The same before the record has come: the page is here by another way, and has been acknowledged.
TEST_F(DedupStage, WhatIsHeldOutlivesTheSameThatIsRefused) {
  const auto bytes = store_some();
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(refer(*source_b, 0, contents(bytes)));
  ASSERT_TRUE(source_b->barrier(1).refused.empty());
  ASSERT_NO_FATAL_FAILURE(fill_up());
  // Some are here, some are not, and one is not the same.
  const std::size_t size = system_page_size();
  auto mixed = random_pages(16, 24);
  std::copy(bytes.begin() + static_cast<std::ptrdiff_t>(8 * size), bytes.end(), mixed.begin());
  mixed[5] ^= std::byte{1};
  const auto late = chain_into_a();
  ASSERT_TRUE(late->pages(0, 8, mixed, {1, 0}));
  EXPECT_EQ(late->barrier(1).refused, (std::vector<StageClient::Refused>{{0, 8, 16}}));
  ImageOracle oracle{{kPages}};
  oracle.content(0, 0, bytes);
  oracle.absent(0, 8, 1);
  oracle.check(*bench.gather(a));
  EXPECT_EQ(bench.stage->image(a)->pages_held, 15u);
}

// Its source may have sent it plainly and count on it, and heard of a name since that leads nowhere.
TEST_F(DedupStage, WhatThePageIsAlreadyIsHeldThoughNobodyNamedIt) {
  const auto bytes = random_pages(8, 21);
  const auto source = bench.scatter(b);
  ASSERT_TRUE(source->pages(0, 4, bytes, kHere));
  ASSERT_TRUE(source->barrier(1).acknowledged);
  auto all = contents(bytes);
  std::swap(all[2], all[3]);  // older than what they are meant to be
  ASSERT_TRUE(refer(*source, 4, all));
  const auto barrier = source->barrier(2);
  EXPECT_TRUE(barrier.acknowledged);
  EXPECT_EQ(barrier.refused, (std::vector<StageClient::Refused>{{0, 6, 2}}));
  EXPECT_EQ(bench.stage->image(b)->pages_held, 6u);
  EXPECT_EQ(bench.stage->image(b)->pages_shared, 0u);
  ImageOracle oracle{{kPages}};
  oracle.absent(0, 0, kPages);
  oracle.content(0, 4, bytes);
  oracle.absent(0, 6, 2);
  oracle.check(*bench.gather(b));
  // Counted once: all of it is free again.
  const auto free_before = bench.stage->stats().free_bytes;
  ASSERT_TRUE(source->zeros(0, 4, 8, kHere));
  ASSERT_TRUE(source->barrier(3).acknowledged);
  // Whoever has read them lets go of them in its own time.
  const auto free_after = free_before + 6 * system_page_size();
  for (int i = 0; i < 2000 && bench.stage->stats().free_bytes != free_after; ++i)
    std::this_thread::sleep_for(10ms);
  EXPECT_EQ(bench.stage->stats().free_bytes, free_after);
}

TEST_F(DedupStage, ALieAboutANameCostsATransferAndNoPage) {
  const auto bytes = store_some();
  const auto other = random_pages(16, 5);
  // These pages, it says, are others'.
  ASSERT_TRUE(say_names(*prober_a, 0, names(other)));
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(refer(*source_b, 0, contents(other)));
  EXPECT_EQ(source_b->barrier(1).refused, (std::vector<StageClient::Refused>{{0, 0, 16}}));
  EXPECT_EQ(bench.stage->image(b)->pages_held, 0u);
  // What it named rightly before is still known.
  ASSERT_TRUE(refer(*source_b, 0, contents(bytes)));
  EXPECT_TRUE(source_b->barrier(2).refused.empty());
}

TEST_F(DedupStage, AnotherDomainNeitherAsksNorRefers) {
  const auto bytes = store_some();
  ASSERT_TRUE(say_held(*prober_a, {bench.stage->identity(), 0}, names(bytes)));
  // That is not answered; what is asked behind it on the same connection is.
  (void)probe(*prober_a, names(bytes));
  const auto mine = prober(b);
  for (const auto& each : probe(*mine, names(bytes)))
    EXPECT_EQ(each, (KnownHolders{bench.stage->identity(), 0}));
  // With the very names and hashes, overheard.
  const auto theirs = prober(stranger);
  for (const auto& each : probe(*theirs, names(bytes))) EXPECT_EQ(each, KnownHolders{});
  const auto scatter = bench.scatter(stranger);
  ASSERT_TRUE(refer(*scatter, 0, contents(bytes)));
  EXPECT_EQ(scatter->barrier(1).refused, (std::vector<StageClient::Refused>{{0, 0, 16}}));
  // With its own key for the same bytes.
  ASSERT_TRUE(refer(*scatter, 0, contents(bytes, 2)));
  EXPECT_EQ(scatter->barrier(2).refused, (std::vector<StageClient::Refused>{{0, 0, 16}}));
  EXPECT_EQ(bench.stage->image(stranger)->pages_held, 0u);
  // It said that it would send them: that holds up nobody of another domain.
  for (const auto& each : probe(*mine, names(bytes)))
    EXPECT_EQ(each, (KnownHolders{bench.stage->identity(), 0}));
}

// A slot that was one domain's and is another's now, with a name that is out of date: no way to ask what is in it.
TEST_F(DedupStage, ASlotThatChangedItsDomainIsNotFound) {
  const auto bytes = store_some();
  ASSERT_TRUE(source_a->zeros(0, 0, 16, kHere));  // frees its slots
  ASSERT_TRUE(source_a->barrier(2).acknowledged);
  const auto theirs = bench.scatter(stranger);
  ASSERT_TRUE(theirs->pages(0, 0, bytes, kHere));  // takes them
  ASSERT_TRUE(theirs->barrier(1).acknowledged);
  const auto source_b = bench.scatter(b);
  ASSERT_TRUE(refer(*source_b, 0, contents(bytes)));
  EXPECT_EQ(source_b->barrier(1).refused, (std::vector<StageClient::Refused>{{0, 0, 16}}));
}

TEST_F(DedupStage, TheFirstToAskIsToSendAndTheOthersWait) {
  const auto bytes = random_pages(8, 11);
  const auto first = prober(a);
  const auto second = prober(b);
  const auto asked = std::chrono::steady_clock::now();
  for (const auto& each : probe(*first, names(bytes))) EXPECT_EQ(each, KnownHolders{});
  const auto to_second = probe(*second, names(bytes));
  if (std::chrono::steady_clock::now() - asked >= std::chrono::milliseconds(ContentDomain::kPatienceMs))
    GTEST_SKIP() << "the first one's turn was over before the second had asked";
  for (const auto& each : to_second) EXPECT_EQ(each.first, KnownHolders::kOnItsWay);
  for (const auto& each : probe(*first, names(bytes))) EXPECT_EQ(each, KnownHolders{}) << "it knows";
  ASSERT_TRUE(say_held(*first, {}, names(bytes)));
  ASSERT_EQ(probe(*first, names(random_pages(1, 99))).size(), 1u);  // it has been read
  for (const auto& each : probe(*second, names(bytes))) EXPECT_EQ(each, KnownHolders{}) << "not after all";
}

TEST_F(DedupStage, AnImageOfNoDomainHasNoPartInIt) {
  const auto bytes = store_some();
  const auto probing = prober(nobodys);
  const auto all = names(bytes);
  (void)probing->frame(wire::make_header(FrameType::kProbe, 0, {PageNumber{0}, all.size()}, 5),
                       std::as_bytes(std::span(all)));
  EXPECT_TRUE(probing->ended());
  const auto scatter = bench.scatter(nobodys);
  (void)refer(*scatter, 0, contents(bytes));
  EXPECT_TRUE(scatter->ended());
  EXPECT_EQ(bench.stage->image(nobodys)->pages_held, 0u);
}

TEST_F(DedupStage, MalformedFramesEndTheConnection) {
  const auto bytes = store_some();
  std::uint32_t attempt = 0;
  const auto bad = [&](const char* what, StageRole role, FrameType type, std::uint64_t first,
                       std::uint64_t count, std::size_t payload_bytes, std::uint64_t tag,
                       bool sealed = true) {
    SCOPED_TRACE(what);
    const auto client = bench.connect(b, StageBench::kSource, role, attempt++);
    std::vector<std::byte> payload(payload_bytes);
    wire::FrameHeader header = wire::make_header(type, 0, {PageNumber{first}, count}, tag);
    wire::seal(header, payload);
    if (!sealed) header.checksum ^= 1;
    ASSERT_TRUE(client->wire().raw(&header, sizeof header));
    (void)client->wire().raw(payload.data(), payload.size());
    EXPECT_TRUE(client->ended());
  };
  const auto probe_role = StageRole::kProbe;
  bad("no name", probe_role, FrameType::kProbe, 0, 0, 0, 1);
  bad("names missing", probe_role, FrameType::kProbe, 0, 2, 16, 1);
  bad("a half", probe_role, FrameType::kProbe, 0, 1, 8, 1);
  bad("too many", probe_role, FrameType::kProbe, 0, wire::kMostNames + 1, (wire::kMostNames + 1) * 16, 1);
  bad("checksum", probe_role, FrameType::kProbe, 0, 1, 16, 1, false);
  bad("an answer", probe_role, FrameType::kProbed, 0, 1, 16, 1);
  bad("an answer to names", probe_role, FrameType::kNamed, 0, 0, 0, 1);
  bad("holders missing", probe_role, FrameType::kHeld, 0, 1, 16, 1);
  bad("no held name", probe_role, FrameType::kHeld, 0, 0, 16, 1);
  bad("checksum of held", probe_role, FrameType::kHeld, 0, 1, 32, 1, false);
  bad("names beyond the end", probe_role, FrameType::kNames, kPages - 1, 2, 32, 1);
  bad("names far off", probe_role, FrameType::kNames, ~0ULL, 2, 32, 1);
  bad("names of nothing", probe_role, FrameType::kNames, 0, 0, 0, 1);
  bad("a reference here", probe_role, FrameType::kReference, 0, 1, 32, kHere.tag());
  bad("pages here", probe_role, FrameType::kPages, 0, 1, system_page_size(), kHere.tag());
  attempt = 0;
  const auto scatter_role = StageRole::kScatter;
  bad("reference beyond the end", scatter_role, FrameType::kReference, kPages - 1, 2, 64, kHere.tag());
  bad("reference far off", scatter_role, FrameType::kReference, ~0ULL - 1, 4, 128, kHere.tag());
  bad("half a hash", scatter_role, FrameType::kReference, 0, 1, 16, kHere.tag());
  bad("no hash", scatter_role, FrameType::kReference, 0, 0, 0, kHere.tag());
  bad("too many hashes", scatter_role, FrameType::kReference, 0, wire::kMostNames + 1, 0, kHere.tag(), false);
  bad("held elsewhere", scatter_role, FrameType::kReference, 0, 1, 32, Holders{1, Holders::kNobody}.tag());
  bad("held twice here", scatter_role, FrameType::kReference, 0, 1, 32, Holders{0, 0}.tag());
  bad("checksum of a reference", scatter_role, FrameType::kReference, 0, 1, 32, kHere.tag(), false);
  bad("a probe there", scatter_role, FrameType::kProbe, 0, 1, 16, 1);
  bad("names there", scatter_role, FrameType::kNames, 0, 1, 16, 1);
  ImageOracle oracle{{kPages}};
  oracle.content(0, 0, bytes);
  oracle.check(*bench.gather(a));
  EXPECT_EQ(bench.stage->image(b)->pages_held, 0u);
}

// What is written and read on many connections while images come and go: for the thread sanitizer, and every byte.
TEST_F(DedupStage, ManyAtOnce) {
  const auto bytes = random_pages(16, 4);
  const auto all = contents(bytes);
  std::vector<std::thread> guests;
  for (std::uint8_t guest = 0; guest < 4; ++guest) {
    guests.emplace_back([&, guest] {
      for (std::uint8_t turn = 0; turn < 20; ++turn) {
        const ImageId id = image_id(static_cast<std::uint8_t>(10 + guest * 20 + turn));
        bench.make(id, {kPages}, 0, domain_key(1));
        const auto scatter = bench.scatter(id);
        const auto probing = prober(id);
        ASSERT_TRUE(refer(*scatter, 0, all));
        const auto barrier = scatter->barrier(1);
        ASSERT_TRUE(barrier.acknowledged);
        for (const auto& each : barrier.refused) {
          const auto part =
              std::span(bytes).subspan(each.first * system_page_size(), each.count * system_page_size());
          ASSERT_TRUE(scatter->pages(0, each.first, part, kHere));
        }
        ASSERT_TRUE(scatter->barrier(2).acknowledged);
        ASSERT_TRUE(say_names(*probing, 0, names(bytes)));
        ImageOracle oracle{{kPages}};
        oracle.content(0, 0, bytes);
        oracle.check(*bench.gather(id));
        ASSERT_TRUE(bench.stage->drop(id));
      }
    });
  }
  for (auto& each : guests) each.join();
}

}  // namespace
}  // namespace memferry::test
