// References as the destination sees them: what it tells, what it finds, what it says of what it does not find, and a
// source that lies.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <set>

#include "fake_source.h"
#include "share_file_support.h"
#include "transfer/known_pages.h"

namespace memferry {
namespace {

using namespace std::chrono_literals;
using test::key_of;
using test::open_share;
using test::page_of;
using test::ShareFile;
using wire::FrameType;

constexpr std::uint64_t kPages = 64;

PageRun run(std::uint64_t first, std::uint64_t count) { return {PageNumber{first}, count}; }

// A share with page_of(0) to page_of(count - 1), and a receiver whose domain it belongs to.
class KnownReceiver : public testing::Test {
 protected:
  void make(std::uint64_t shared, bool may_page = false) {
    share = open_share(file.path(), 1000 * test::Bench::page_size_of());
    for (std::uint64_t i = 0; i < shared; ++i) {
      share->insert(share->digest(page_of(i)), page_of(i), static_cast<double>(shared - i));
    }
    bench.config.may_page = may_page;
    bench.config.keep_page_hashes = true;
    bench.config.known = known;
    bench.start();
    ASSERT_TRUE(known->wait_idle(test::kPatience));
    bench.connect();
  }
  ContentDigest digest(std::uint64_t number) const { return ContentHasher(key_of(1))(page_of(number)); }
  std::vector<ContentDigest> digests(const std::vector<std::uint64_t>& numbers) const {
    std::vector<ContentDigest> all;
    for (const std::uint64_t number : numbers) all.push_back(digest(number));
    return all;
  }
  bool refer(std::uint64_t first, const std::vector<std::uint64_t>& numbers, unsigned channel = 0) {
    const auto all = digests(numbers);
    return bench.data(channel).frame(FrameType::kKnownReference, 0, run(first, numbers.size()), 0,
                                     std::as_bytes(std::span(all)));
  }
  // The names of so many pages, as the last channel tells them.
  std::vector<std::uint64_t> told(std::size_t count) {
    std::vector<std::uint64_t> names;
    while (names.size() < count) {
      const auto frame = bench.data(1).receive();
      if (!frame || frame->header.type != static_cast<std::uint16_t>(FrameType::kKnown)) break;
      const std::size_t before = names.size();
      names.resize(before + frame->header.page_count);
      std::memcpy(names.data() + before, frame->payload.data(), frame->payload.size());
    }
    return names;
  }
  void expect_unresolved(std::uint64_t first, const std::vector<std::uint64_t>& numbers) {
    const auto frame = bench.data(0).receive();
    ASSERT_TRUE(frame);
    ASSERT_EQ(frame->header.type, static_cast<std::uint16_t>(FrameType::kUnresolved));
    EXPECT_EQ(wire::malformed(frame->header, bench.page_size), nullptr);
    EXPECT_EQ(frame->header.first_page, first);
    ASSERT_EQ(frame->header.page_count, numbers.size());
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      std::uint64_t name = 0;
      std::memcpy(&name, frame->payload.data() + i * sizeof name, sizeof name);
      EXPECT_EQ(name, PageShareReader::name_of(digest(numbers[i])));
    }
  }
  bool page_is(std::uint64_t page, std::uint64_t number) const {
    return std::memcmp(bench.page(page), page_of(number).data(), bench.page_size) == 0;
  }
  bool send_page(std::uint64_t page, std::uint64_t number, unsigned channel = 0) {
    return bench.data(channel).pages(0, page, page_of(number), bench.page_size);
  }

  ShareFile file;
  std::unique_ptr<PageShare> share;
  std::shared_ptr<KnownPages> known = KnownPages::of_domain(key_of(1), file.path());
  test::Bench bench{kPages};
};

TEST_F(KnownReceiver, WhatTheShareHasIsToldAndResolved) {
  make(20);
  const auto names = told(20);
  ASSERT_EQ(names.size(), 20U);
  // What is worth most comes first.
  for (std::uint64_t i = 0; i < 20; ++i) EXPECT_EQ(names[i], PageShareReader::name_of(digest(i))) << i;
  EXPECT_TRUE(refer(3, {0, 7, 19, 7}));
  EXPECT_TRUE(bench.data(0).zeros(0, 0, 3));
  EXPECT_TRUE(bench.data(0).zeros(0, 7, kPages - 7));
  const auto barrier = bench.data(0).barrier(1);
  EXPECT_TRUE(barrier.answered);
  EXPECT_EQ(barrier.suspect_pages, 0U);
  EXPECT_TRUE(bench.receiver->ready());
  EXPECT_TRUE(page_is(3, 0));
  EXPECT_TRUE(page_is(4, 7));
  EXPECT_TRUE(page_is(5, 19));
  EXPECT_TRUE(page_is(6, 7));
  EXPECT_EQ(bench.receiver->stats().pages_known, 4U);
  // As if they had been sent: the digest is over them, too.
  std::vector<std::uint64_t> hashes(kPages);
  hash_pages(bench.memory(), bench.page_size, hashes.data());
  EXPECT_EQ(bench.receiver->digest(0), xxh3_128(std::as_bytes(std::span(hashes))));
}

TEST_F(KnownReceiver, WhatIsNotThereIsSaidAtOnceAndNothingOlderCounts) {
  make(5);
  (void)told(5);
  EXPECT_TRUE(bench.data(0).zeros(0, 0, kPages));
  EXPECT_TRUE(send_page(11, 1000));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  EXPECT_TRUE(bench.receiver->ready());
  EXPECT_TRUE(refer(10, {1, 900, 901, 2}));
  expect_unresolved(11, {900, 901});
  EXPECT_TRUE(bench.data(0).barrier(2).answered);
  EXPECT_FALSE(bench.receiver->ready()) << "an older copy of page 11 is none";
  EXPECT_FALSE(bench.receiver->seal());
  EXPECT_EQ(bench.receiver->stats().pages_suspect, 2U);
  EXPECT_TRUE(send_page(11, 900));
  EXPECT_TRUE(send_page(12, 901));
  const auto barrier = bench.data(0).barrier(3);
  EXPECT_TRUE(barrier.answered);
  EXPECT_EQ(barrier.suspect_pages, 0U) << "they were named already";
  EXPECT_TRUE(bench.receiver->seal());
  EXPECT_TRUE(page_is(10, 1));
  EXPECT_TRUE(page_is(11, 900));
  EXPECT_TRUE(page_is(12, 901));
  EXPECT_TRUE(page_is(13, 2));
  EXPECT_EQ(bench.receiver->stats().pages_unresolved, 2U);
}

// On whichever channel has room: by the time that it is refused, nobody else is receiving it.
TEST_F(KnownReceiver, ARefusedPageMayComeAtOnceOnAnotherChannel) {
  make(40);
  (void)told(40);
  for (std::uint64_t turn = 0; turn < 200; ++turn) {
    std::vector<std::uint64_t> numbers;
    for (std::uint64_t i = 0; i < kPages; ++i)
      numbers.push_back(i % 2 == 0 ? 1000 + turn * kPages + i : i % 40);
    ASSERT_TRUE(refer(0, numbers));
    for (std::uint64_t i = 0; i < kPages; i += 2) {
      expect_unresolved(i, {numbers[i]});
      ASSERT_TRUE(send_page(i, numbers[i], 1));
    }
    ASSERT_TRUE(bench.data(0).barrier(turn).answered);
    ASSERT_TRUE(bench.data(1).barrier(turn).answered);
  }
  EXPECT_TRUE(bench.receiver->ready());
}

TEST_F(KnownReceiver, APageThatHasLeftTheShareIsNotThere) {
  make(8);
  (void)told(8);
  share->remove(digest(3));
  share->set_budget(6 * bench.page_size);  // leaves what is worth most: 0 to 4, without 3
  EXPECT_TRUE(refer(0, {0, 3, 4, 7}));
  expect_unresolved(1, {3});
  expect_unresolved(3, {7});
  ASSERT_EQ(::truncate(file.path().c_str(), 0), 0);
  EXPECT_TRUE(refer(4, {0}));
  expect_unresolved(4, {0});
  EXPECT_TRUE(page_is(0, 0));
  EXPECT_TRUE(page_is(2, 4));
}

TEST_F(KnownReceiver, PagesThatHaveArrivedAreToldAndFoundAgain) {
  make(0);
  EXPECT_TRUE(send_page(0, 50));
  EXPECT_TRUE(send_page(1, 51));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  // They are told before the next frame of the last channel is read.
  EXPECT_TRUE(bench.data(1).zeros(0, 60, 1));
  EXPECT_TRUE(bench.data(1).zeros(0, 61, 1));
  const auto names = told(2);
  ASSERT_EQ(names.size(), 2U);
  EXPECT_EQ(
      (std::set<std::uint64_t>(names.begin(), names.end())),
      (std::set<std::uint64_t>{PageShareReader::name_of(digest(50)), PageShareReader::name_of(digest(51))}));
  EXPECT_TRUE(refer(10, {51, 50}));
  EXPECT_TRUE(bench.data(0).barrier(2).answered);
  EXPECT_TRUE(page_is(10, 51));
  EXPECT_TRUE(page_is(11, 50));
  // Its place is another page by now: nobody is given that for it.
  EXPECT_TRUE(send_page(0, 70));
  EXPECT_TRUE(bench.data(0).barrier(3).answered);
  EXPECT_TRUE(refer(12, {50}));
  expect_unresolved(12, {50});
  // And one that is to come again is no content.
  EXPECT_TRUE(bench.data(0).discard(0, {{1, 1}}));
  EXPECT_TRUE(refer(13, {51}));
  expect_unresolved(13, {51});
}

TEST_F(KnownReceiver, GuestsOfOneDomainHelpEachOther) {
  make(0);
  test::Bench other(kPages);
  other.config.known = KnownPages::of_domain(key_of(1), file.path());
  ASSERT_EQ(other.config.known, known);
  other.start();
  other.connect();
  EXPECT_TRUE(send_page(5, 50));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  const auto hash = digest(50);
  EXPECT_TRUE(
      other.data(0).frame(FrameType::kKnownReference, 0, run(9, 1), 0, std::as_bytes(std::span(&hash, 1))));
  EXPECT_TRUE(other.data(0).barrier(1).answered);
  EXPECT_EQ(std::memcmp(other.page(9), page_of(50).data(), bench.page_size), 0);
  // When the first one is gone, so is what it had.
  bench.receiver->close();
  EXPECT_TRUE(
      other.data(0).frame(FrameType::kKnownReference, 0, run(10, 1), 0, std::as_bytes(std::span(&hash, 1))));
  const auto answer = other.data(0).receive();
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->header.type, static_cast<std::uint16_t>(FrameType::kUnresolved));
}

TEST_F(KnownReceiver, AnotherDomainIsToldNothingAndFindsNothing) {
  make(0);
  EXPECT_TRUE(send_page(5, 50));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  test::Bench other(kPages);
  other.config.known = KnownPages::of_domain(key_of(2), file.path());
  other.start();
  ASSERT_TRUE(other.config.known->wait_idle(test::kPatience));
  other.connect();
  const auto hash = digest(50);
  EXPECT_TRUE(
      other.data(1).frame(FrameType::kKnownReference, 0, run(9, 1), 0, std::as_bytes(std::span(&hash, 1))));
  const auto answer = other.data(1).receive();
  ASSERT_TRUE(answer);
  EXPECT_EQ(answer->header.type, static_cast<std::uint16_t>(FrameType::kUnresolved)) << "no names come first";
}

TEST_F(KnownReceiver, WhilePagingAReferenceIsInstalledAndWakes) {
  make(10, true);
  (void)told(10);
  EXPECT_TRUE(send_page(0, 100));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  EXPECT_TRUE(bench.data(1).barrier(1).answered);
  EXPECT_TRUE(bench.data(0).switch_over());
  std::atomic<bool> read{false};
  std::thread guest([&] {
    EXPECT_TRUE(page_is(5, 4));
    read = true;
  });
  const auto request = bench.demand().request();
  ASSERT_TRUE(request);
  EXPECT_EQ(request->first_page, 5U);
  EXPECT_FALSE(read);
  EXPECT_TRUE(refer(3, {3, 999, 4, 5}));
  expect_unresolved(4, {999});
  guest.join();
  EXPECT_TRUE(page_is(3, 3));
  EXPECT_TRUE(page_is(6, 5));
  // Never overwritten, by whatever it is said to be.
  EXPECT_TRUE(refer(3, {7}));
  EXPECT_TRUE(bench.data(0).barrier(2).answered);
  EXPECT_TRUE(page_is(3, 3));
  EXPECT_TRUE(send_page(4, 999));
  EXPECT_TRUE(bench.data(0).zeros(0, 1, 2));
  EXPECT_TRUE(bench.data(0).zeros(0, 7, kPages - 7));
  bench.log.wait(EngineEventKind::kComplete);
  EXPECT_TRUE(page_is(4, 999));
  std::vector<std::uint64_t> hashes(kPages);
  hash_pages(bench.memory(), bench.page_size, hashes.data());
  EXPECT_EQ(bench.receiver->digest(0), xxh3_128(std::as_bytes(std::span(hashes))));
}

// A page that arrived in a round, is known, and is missing after the switch: nobody waits for it to resolve another.
TEST_F(KnownReceiver, APageThatIsMissingIsNotWaitedFor) {
  make(0, true);
  EXPECT_TRUE(send_page(0, 50));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  EXPECT_TRUE(bench.data(0).discard(0, {{0, 1}}));
  EXPECT_TRUE(bench.data(0).switch_over());
  EXPECT_TRUE(refer(1, {50}));
  expect_unresolved(1, {50});
  EXPECT_TRUE(send_page(0, 50));
  EXPECT_TRUE(send_page(1, 50));
  EXPECT_TRUE(bench.data(0).zeros(0, 2, kPages - 2));
  bench.log.wait(EngineEventKind::kComplete);
}

// Whoever read a page that was being discarded has put memory behind it: that is not taken for the page.
TEST_F(KnownReceiver, ADiscardedPageThatWasReadIsMissingAfterTheSwitch) {
  make(0, true);
  EXPECT_TRUE(send_page(0, 50));
  EXPECT_TRUE(bench.data(0).discard(0, {{0, 1}}));
  EXPECT_TRUE(bench.data(0).barrier(1).answered);
  for (const std::uint64_t page : {0U, 7U}) {
    EXPECT_EQ(*static_cast<const volatile unsigned char*>(static_cast<const void*>(bench.page(page))), 0U);
  }
  EXPECT_TRUE(bench.data(0).switch_over());
  std::thread guest([&] { EXPECT_TRUE(page_is(0, 51)); });
  const auto request = bench.demand().request();
  EXPECT_TRUE(request);
  EXPECT_TRUE(send_page(0, 51));
  guest.join();
  EXPECT_TRUE(bench.data(0).zeros(0, 1, kPages - 1));
  bench.log.wait(EngineEventKind::kComplete);
}

// The names of page_of(first) to page_of(end - 1).
std::vector<std::uint64_t> names_of(const ContentKey& key, std::uint64_t first, std::uint64_t end) {
  std::vector<std::uint64_t> names;
  for (std::uint64_t i = first; i < end; ++i)
    names.push_back(PageShareReader::name_of(ContentHasher(key)(page_of(i))));
  return names;
}

void put(PageShare& share, std::uint64_t first, std::uint64_t end) {
  for (std::uint64_t i = first; i < end; ++i)
    share.insert(share.digest(page_of(i)), page_of(i), static_cast<double>(1000 - i));
}

TEST(KnownPagesTest, AGuestIsToldAtOnceWhatTheShareListedBefore) {
  const ShareFile file;
  const auto share = open_share(file.path(), 1000 * test::Bench::page_size_of(), key_of(3));
  put(*share, 0, 10);
  const auto known = KnownPages::of_domain(key_of(3), file.path());
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  const auto first = known->join({});
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  EXPECT_EQ(first->next_names(100), names_of(key_of(3), 0, 10)) << "and once, though it was read again";
  put(*share, 10, 14);
  const auto second = known->join({});
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  EXPECT_EQ(second->next_names(9), names_of(key_of(3), 0, 9));
  EXPECT_EQ(second->next_names(100), names_of(key_of(3), 9, 14)) << "what is new comes behind it";
  // Nobody can read it now: what is told was known before.
  ASSERT_EQ(::unlink(file.path().c_str()), 0);
  const auto third = known->join({});
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  EXPECT_EQ(third->next_names(100), names_of(key_of(3), 0, 14));
}

TEST(KnownPagesTest, AShareThatWasMadeAnewIsRead) {
  const ShareFile file;
  auto share = open_share(file.path(), 1000 * test::Bench::page_size_of(), key_of(2));
  put(*share, 0, 4);
  const auto known = KnownPages::of_domain(key_of(2), file.path());
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  share.reset();
  ASSERT_EQ(::unlink(file.path().c_str()), 0);
  share = open_share(file.path(), 1000 * test::Bench::page_size_of(), key_of(2));
  put(*share, 100, 104);
  const auto guest = known->join({});
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  (void)guest->next_names(4);
  EXPECT_EQ(guest->next_names(100), names_of(key_of(2), 100, 104));
  std::vector<std::byte> into(test::Bench::page_size_of());
  EXPECT_TRUE(guest->resolve(ContentHasher(key_of(2))(page_of(101)), into));
  EXPECT_EQ(into, page_of(101));
}

TEST(KnownPagesTest, NothingIsReadWhileHashingIsStopped) {
  const auto known = KnownPages::of_domain(key_of(7), "");
  const auto region = Region::allocate(4 * test::Bench::page_size_of());
  ArrivalMap map(region, true, false);
  map.received.set_run(run(0, 4));
  map.present.set_run(run(0, 4));
  const auto guest = known->join({&map});
  guest->stop_hashing();
  guest->arrived(0, run(0, 4));
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  guest->wait_for_hash(0, run(0, 4));
  guest->wait_for_hash_of_missing();
  EXPECT_EQ(guest->next_names(10).size(), 0U);
  guest->resume_hashing();
  guest->arrived(0, run(0, 4));
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  EXPECT_EQ(guest->next_names(10).size(), 1U);
}

TEST(KnownPagesTest, WhoDiscardsIsNotKeptWaitingByReaders) {
  const auto known = KnownPages::of_domain(key_of(6), "");
  const std::uint64_t page_size = test::Bench::page_size_of();
  const auto region = Region::allocate(page_size);
  ArrivalMap map(region, true, false);
  std::memcpy(region->address(PageNumber{0}).pointer(), page_of(1).data(), page_size);
  map.received.set_run(run(0, 1));
  map.present.set_run(run(0, 1));
  const auto guest = known->join({&map});
  guest->arrived(0, run(0, 1));
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  const ContentDigest digest = ContentHasher(key_of(6))(page_of(1));
  std::vector<std::byte> into(page_size);
  ASSERT_TRUE(guest->resolve(digest, into));
  {
    const auto alone = guest->alone();
    EXPECT_FALSE(guest->resolve(digest, into)) << "and it does not wait";
  }
  guest->arrived(0, run(0, 1));
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  EXPECT_TRUE(guest->resolve(digest, into));
}

TEST(KnownPagesTest, WhatIsNotThereAnyMoreIsNotTold) {
  const auto known = KnownPages::of_domain(key_of(5), "");
  const std::uint64_t page_size = test::Bench::page_size_of();
  const auto region = Region::allocate(2 * page_size);
  ArrivalMap map(region, true, false);
  for (std::uint64_t i = 0; i < 2; ++i) {
    std::memcpy(region->address(PageNumber{i}).pointer(), page_of(i).data(), page_size);
  }
  map.received.set_run(run(0, 2));
  map.present.set_run(run(0, 2));
  const auto guest = known->join({&map});
  guest->arrived(0, run(0, 2));
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  std::memcpy(region->address(PageNumber{0}).pointer(), page_of(9).data(), page_size);
  const ContentHasher hasher(key_of(5));
  std::vector<std::byte> into(page_size);
  EXPECT_FALSE(guest->resolve(hasher(page_of(0)), into));
  const auto names = guest->next_names(10);
  ASSERT_EQ(names.size(), 1U);
  EXPECT_EQ(names[0], PageShareReader::name_of(hasher(page_of(1))));
  const auto other = known->join({});
  guest->close();
  EXPECT_EQ(other->next_names(10).size(), 0U);
}

TEST(KnownPagesTest, WhoLeavesMakesRoom) {
  const auto known = KnownPages::of_domain(key_of(4), "");
  known->limit_places(8);
  const std::uint64_t page_size = test::Bench::page_size_of();
  const auto region = Region::allocate(24 * page_size);
  ArrivalMap map(region, true, false);
  for (std::uint64_t i = 0; i < 24; ++i) {
    std::memcpy(region->address(PageNumber{i}).pointer(), page_of(i).data(), page_size);
  }
  map.received.set_run(run(0, 24));
  map.present.set_run(run(0, 24));
  const auto told_to = [&](KnownPages::Guest& guest) {
    const auto names = guest.next_names(100);
    return std::set<std::uint64_t>(names.begin(), names.end());
  };
  const auto names_of = [&](std::uint64_t first, std::uint64_t end) {
    std::set<std::uint64_t> names;
    for (std::uint64_t i = first; i < end; ++i)
      names.insert(PageShareReader::name_of(ContentHasher(key_of(4))(page_of(i))));
    return names;
  };
  const auto staying = known->join({&map});
  const auto leaving = known->join({&map});
  const auto arrives = [&](KnownPages::Guest& guest, std::uint64_t first, std::uint64_t count) {
    for (std::uint64_t i = first; i < first + count; ++i) guest.arrived(0, run(i, 1));
    EXPECT_TRUE(known->wait_idle(test::kPatience));
  };
  arrives(*leaving, 0, 2);
  arrives(*staying, 2, 2);
  EXPECT_EQ(told_to(*staying), names_of(0, 4));
  arrives(*leaving, 4, 10);
  EXPECT_EQ(told_to(*staying), names_of(4, 8)) << "it is full";
  arrives(*staying, 14, 1);
  EXPECT_TRUE(told_to(*staying).empty());
  leaving->close();
  arrives(*staying, 15, 1);
  EXPECT_EQ(told_to(*staying), names_of(15, 16)) << "and nothing is told again";
  arrives(*staying, 16, 8);
  EXPECT_EQ(told_to(*staying), names_of(16, 21));
  const auto late = known->join({&map});
  auto all = names_of(2, 4);
  all.merge(names_of(15, 21));
  EXPECT_EQ(told_to(*late), all);
}

struct Attack {
  const char* name;
  std::function<void(test::Bench&)> act;
};

TEST(KnownHostile, EveryLieOfASourceEndsTheMigrationClearly) {
  const std::vector<std::byte> hashes(100 * sizeof(wire::ContentHash));
  const auto part = [&](std::size_t count) {
    return std::span<const std::byte>(hashes).first(count * sizeof(wire::ContentHash));
  };
  const std::uint64_t huge = ~std::uint64_t{0};
  const std::uint64_t most = wire::max_run_pages(test::Bench::page_size_of());
  const auto says = [&](PageRun pages, std::size_t count, std::uint32_t region = 0, unsigned channel = 0) {
    return [=](test::Bench& bench) {
      bench.data(channel).frame(FrameType::kKnownReference, region, pages, 0, part(count));
    };
  };
  const std::vector<Attack> attacks = {
      {"outside the region", says(run(kPages, 1), 1)},
      {"beyond its end", says(run(kPages - 1, 2), 2)},
      {"that overflow", says(run(huge, 2), 2)},
      {"of no region", says(run(0, 1), 1, 7)},
      {"of no pages", says(run(0, 0), 0)},
      {"too many", says(run(0, most + 1), std::min<std::size_t>(most + 1, 100))},
      {"fewer hashes than pages", says(run(0, 2), 1)},
      {"more hashes than pages", says(run(0, 1), 2)},
      {"half a hash",
       [&](test::Bench& bench) {
         bench.data(0).frame(FrameType::kKnownReference, 0, run(0, 1), 0,
                             std::span<const std::byte>(hashes).first(16));
       }},
      {"on the demand channel",
       [&](test::Bench& bench) {
         bench.demand().frame(FrameType::kKnownReference, 0, run(0, 1), 0, part(1));
       }},
      {"names, as if it were the destination",
       [&](test::Bench& bench) {
         bench.data(0).frame(FrameType::kKnown, 0, run(0, 1), 0, std::span<const std::byte>(hashes).first(8));
       }},
      {"a refusal, as if it were the destination",
       [&](test::Bench& bench) {
         bench.data(0).frame(FrameType::kUnresolved, 0, run(0, 1), 0,
                             std::span<const std::byte>(hashes).first(8));
       }},
  };
  for (const Attack& attack : attacks) {
    SCOPED_TRACE(attack.name);
    test::Bench bench(kPages);
    bench.config.known = KnownPages::of_domain(key_of(1), "");
    bench.start();
    bench.connect();
    attack.act(bench);
    const EngineEvent failed = bench.log.wait(EngineEventKind::kFailed);
    EXPECT_EQ(failed.code, "PROTOCOL") << failed.message;
    EXPECT_FALSE(bench.receiver->ready());
  }
  {
    SCOPED_TRACE("a checksum that does not fit");
    test::Bench bench(kPages);
    bench.config.known = KnownPages::of_domain(key_of(1), "");
    bench.start();
    bench.connect();
    wire::FrameHeader header = wire::make_header(FrameType::kKnownReference, 0, run(0, 1));
    wire::seal(header, part(1));
    header.checksum ^= 1;
    bench.data(0).raw(&header, sizeof header);
    bench.data(0).raw(hashes.data(), sizeof(wire::ContentHash));
    EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "CHECKSUM");
  }
  {
    SCOPED_TRACE("not agreed on");
    test::Bench bench(kPages);
    bench.start();
    bench.connect();
    bench.data(0).frame(FrameType::kKnownReference, 0, run(0, 1), 0, part(1));
    EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "PROTOCOL");
  }
}

TEST(KnownPagesTest, ArrivalsFasterThanTheHashAreLetGo) {
  const auto known = KnownPages::of_domain(key_of(9), "");
  const std::uint64_t page_size = test::Bench::page_size_of();
  const std::uint64_t pages = 2 * KnownPages::kMostWaitingBytes / page_size;
  const auto region = Region::allocate(pages * page_size);
  ArrivalMap map(region, true, false);
  for (std::uint64_t i = 0; i < pages; ++i) region->address(PageNumber{i}).pointer()[0] = std::byte{1};
  map.received.set_run(run(0, pages));
  map.present.set_run(run(0, pages));
  const auto guest = known->join({&map});
  for (std::uint64_t i = 0; i < pages; i += 64)
    guest->arrived(0, run(i, std::min<std::uint64_t>(64, pages - i)));
  ASSERT_TRUE(known->wait_idle(test::kPatience));
  EXPECT_LE(known->memory_bytes(), 64U << 20U);
  guest->close();
  EXPECT_EQ(guest->next_names(10).size(), 0U);
}

// Guests come, are hashed, resolve each other's pages, write them meanwhile and go.
TEST(KnownPagesTest, GuestsThatComeAndGoFindWholePagesOrNone) {
  const auto known = KnownPages::of_domain(key_of(8), "");
  const std::uint64_t page_size = test::Bench::page_size_of();
  const ContentHasher hasher(key_of(8));
  constexpr std::uint64_t kContents = 40;
  std::vector<ContentDigest> digests;
  for (std::uint64_t i = 0; i < kContents; ++i) digests.push_back(hasher(page_of(i)));
  std::atomic<std::uint64_t> found{0};
  const auto live = [&](std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int life = 0; life < 15; ++life) {
      const auto region = Region::allocate(kContents * page_size);
      ArrivalMap map(region, true, false);
      const auto guest = known->join({&map});
      for (std::uint64_t at = 0; at < kContents; ++at) {
        const auto content = page_of(random() % kContents);
        std::memcpy(region->address(PageNumber{at}).pointer(), content.data(), page_size);
        map.present.set(PageNumber{at});
        map.received.set(PageNumber{at});
        guest->arrived(0, run(at, 1));
      }
      // Once everything that this one has brought so far is known, so that there is something to find.
      if (life == 0) {
        EXPECT_TRUE(known->wait_idle(test::kPatience));
      }
      std::vector<std::byte> into(page_size);
      for (int i = 0; i < 200; ++i) {
        const std::uint64_t wanted = random() % kContents;
        if (guest->resolve(digests[wanted], into)) {
          ++found;
          EXPECT_EQ(into, page_of(wanted));
        }
        (void)guest->next_names(8);
        if (i % 20 == 0) {
          const auto alone = guest->alone();
          map.received.clear(PageNumber{random() % kContents});
        }
      }
      guest->close();
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 0; seed < 3; ++seed) threads.emplace_back(live, seed);
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(found, 0U);
}

}  // namespace
}  // namespace memferry
