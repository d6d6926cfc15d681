// What a server counts of its domains' pages: against rules one by one, and against a model that knows every report.
//
//   MEMFERRY_SEED=N   this schedule alone
#include "stage/popularity.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <set>

#include "os/mapping.h"
#include "stage/popular_pages.h"

namespace memferry::test {
namespace {

constexpr std::uint64_t kPeriodMs = 100'000;
constexpr std::uint32_t kGuest = 256;  // of a score

wire::ContentName name_of(unsigned content) {
  std::mt19937_64 random(content + 77);
  return {random(), random()};
}

std::vector<std::byte> page_of(unsigned content) {
  std::vector<std::byte> bytes(system_page_size());
  std::mt19937_64 random(content + 1000);
  for (std::size_t at = 0; at < bytes.size(); at += 8) {
    const std::uint64_t word = random();
    std::memcpy(&bytes[at], &word, 8);
  }
  return bytes;
}

class PopularityTest : public testing::Test {
 protected:
  void make(std::uint64_t slots, PopularityConfig config) {
    slab = std::make_shared<Slab>(slots * system_page_size(), system_page_size());
    config.period_ms = kPeriodMs;
    table = std::make_unique<Popularity>(slab, config);
    slab->set_relief([this](std::uint64_t wanted) { table->relieve(wanted); });
  }
  bool report(unsigned content, unsigned seat, std::uint16_t domain = 1) {
    const wire::ContentName name = name_of(content);
    std::uint64_t wanted = 0;
    table->report(domain, std::span(&name, 1), seat, now, std::span(&wanted, 1));
    return wanted == 1;
  }
  bool give(unsigned content, std::uint16_t domain = 1) {
    return table->give(domain, name_of(content), page_of(content), now);
  }
  std::uint32_t guests(unsigned content, std::uint16_t domain = 1) {
    return table->score(domain, name_of(content), now) / kGuest;
  }
  // Reported by so many guests, and given.
  bool hold(unsigned content, unsigned by) {
    bool wanted = false;
    for (unsigned seat = 0; seat < by; ++seat) wanted = report(content, seat) || wanted;
    return wanted && give(content);
  }
  std::set<wire::ContentName> listed(std::uint16_t domain = 1, std::uint32_t least = 0) {
    std::set<wire::ContentName> all;
    std::uint64_t cursor = 0;
    do {
      std::vector<wire::PopularName> some;
      table->list(domain, cursor, least, 7, now, some);
      EXPECT_LE(some.size(), 7u);
      for (const auto& each : some) EXPECT_TRUE(all.insert(each.name).second);
    } while (cursor != 0);
    return all;
  }

  std::shared_ptr<Slab> slab;
  std::unique_ptr<Popularity> table;
  std::uint64_t now = 5 * kPeriodMs;
};

TEST_F(PopularityTest, OneGuestAloneMakesNothingPopularHoweverOftenItReports) {
  make(256, {.most_tables = 2, .most_contents = 32});
  for (int i = 0; i < 1000; ++i) EXPECT_FALSE(report(1, 5));
  EXPECT_EQ(guests(1), 1u);
  EXPECT_FALSE(give(1)) << "nobody has asked for it";
  EXPECT_TRUE(report(1, 6)) << "now two have it";
}

TEST_F(PopularityTest, OneIsAskedAtATimeAndAnotherWhenItDoesNotCome) {
  make(256, {.most_tables = 2, .most_contents = 32});
  (void)report(1, 1);
  EXPECT_TRUE(report(1, 2));
  EXPECT_FALSE(report(1, 3));
  now += Popularity::kPatienceMs + 1000;
  EXPECT_TRUE(report(1, 3));
  EXPECT_TRUE(give(1));
  EXPECT_FALSE(give(1)) << "it is there";
  now += Popularity::kPatienceMs + 1000;
  EXPECT_FALSE(report(1, 4));
  EXPECT_EQ(table->stats().contents, 1u);
}

TEST_F(PopularityTest, WhatNobodyReportsAnyMoreFadesAndGivesItsPageBack) {
  make(256, {.most_tables = 2, .most_contents = 32});
  const std::uint64_t free = slab->free_slots();
  ASSERT_TRUE(hold(1, 3));
  now += kPeriodMs;
  EXPECT_EQ(guests(1), 3u) << "a period later it still counts";
  (void)report(1, 0);
  now += kPeriodMs;
  EXPECT_EQ(guests(1), 1u) << "by who has it still";
  EXPECT_EQ(listed().size(), 1u);
  now += kPeriodMs;
  EXPECT_EQ(guests(1), 0u);
  EXPECT_TRUE(listed().empty());
  EXPECT_EQ(table->stats().names, 0u);
  EXPECT_EQ(slab->free_slots(), free - table->stats().tables);
}

TEST_F(PopularityTest, TheSweepFreesWhatNobodyAsksFor) {
  make(1024, {.most_tables = 4, .most_contents = 64});
  for (unsigned content = 0; content < 40; ++content) ASSERT_TRUE(hold(content, 2));
  now += 3 * kPeriodMs;
  (void)report(1000, 1);
  table->tend(now);
  EXPECT_EQ(table->stats().contents, 0u);
  EXPECT_EQ(table->stats().names, 1u);
}

TEST_F(PopularityTest, AFloodOfOneGuestPushesOutNothingPopular) {
  make(1024, {.most_tables = 1, .most_contents = 64});  // 80 names or so
  for (unsigned content = 0; content < 20; ++content) ASSERT_TRUE(hold(content, 2));
  for (unsigned content = 100; content < 20'000; ++content) (void)report(content, 9);
  for (unsigned content = 0; content < 20; ++content) EXPECT_EQ(guests(content), 2u) << content;
  EXPECT_EQ(table->stats().tables, 1u);
  EXPECT_EQ(table->stats().contents, 20u);
}

TEST_F(PopularityTest, AMorePopularPageTakesThePlaceOfALessPopularOne) {
  make(1024, {.most_tables = 8, .most_contents = 8});
  for (unsigned content = 0; content < 8; ++content) ASSERT_TRUE(hold(content, 2));
  EXPECT_TRUE(hold(50, 5));
  EXPECT_EQ(table->stats().contents, 8u);
  EXPECT_FALSE(hold(51, 2)) << "no better than what is there";
  EXPECT_EQ(table->stats().contents, 8u);
}

TEST_F(PopularityTest, ContentsAreForRoomThatNobodyNeeds) {
  make(256, {.most_tables = 4, .most_contents = 128});
  for (unsigned content = 0; content < 100; ++content) ASSERT_TRUE(hold(content, 2 + content % 5));
  std::vector<Slab::Slot> taken;
  const std::uint64_t free = slab->free_slots();
  EXPECT_EQ(slab->take(free + 20, taken), free + 20) << "an image gets what the pages had";
  EXPECT_LE(table->stats().contents, 80u);
  // What is left is the more popular part.
  std::size_t of_many = 0;
  for (unsigned content = 4; content < 100; content += 5)
    of_many += listed().contains(name_of(content)) ? 1 : 0;
  EXPECT_EQ(of_many, 20u);
  (void)slab->take(256, taken);
  EXPECT_EQ(taken.size() + table->stats().tables, 256u) << "all of it, when images need it";
  EXPECT_EQ(table->stats().contents, 0u);
  EXPECT_FALSE(hold(200, 3)) << "none is taken in where images need the room";
  slab->release(taken);
  now += Popularity::kPatienceMs + 1000;
  EXPECT_TRUE(hold(200, 3));
}

TEST_F(PopularityTest, AllOrNothingTakesWhatPagesHad) {
  make(256, {.most_tables = 1, .most_contents = 128});
  for (unsigned content = 0; content < 40; ++content) ASSERT_TRUE(hold(content, 2));
  std::vector<Slab::Slot> taken;
  EXPECT_TRUE(slab->take_all_zeroed(slab->free_slots() + 10, taken));
  for (const Slab::Slot slot : taken) {
    for (std::uint64_t i = 0; i < slab->slot_bytes(); ++i) ASSERT_EQ(slab->data(slot)[i], std::byte{0});
  }
  slab->release(taken);
}

TEST_F(PopularityTest, APageThatIsBeingReadOutlivesItsGivingUp) {
  make(64, {.most_tables = 1, .most_contents = 16});
  ASSERT_TRUE(hold(1, 2));
  const auto slot = table->pin(1, name_of(1), now);
  ASSERT_TRUE(slot);
  table->relieve(16);
  EXPECT_EQ(table->stats().contents, 0u);
  EXPECT_EQ(std::memcmp(slab->data(*slot), page_of(1).data(), system_page_size()), 0);
  slab->release(std::span(&*slot, 1));
  EXPECT_FALSE(table->pin(1, name_of(1), now));
}

TEST_F(PopularityTest, DomainsDoNotMeet) {
  make(256, {.most_tables = 2, .most_contents = 32});
  (void)report(1, 1, 1);
  EXPECT_FALSE(report(1, 2, 2)) << "the same name, of somebody else";
  EXPECT_EQ(guests(1, 1), 1u);
  ASSERT_TRUE(report(1, 2, 1));
  EXPECT_FALSE(give(1, 2));
  ASSERT_TRUE(give(1, 1));
  EXPECT_TRUE(listed(2).empty());
  EXPECT_FALSE(table->pin(2, name_of(1), now));
  table->forget(1);
  EXPECT_EQ(guests(1, 1), 0u);
  EXPECT_EQ(guests(1, 2), 1u);
  EXPECT_EQ(table->stats().contents, 0u);
}

TEST(PopularPagesTest, AGuestHasOneSeatWhereverItComesFrom) {
  const auto slab = std::make_shared<Slab>(256 * system_page_size(), system_page_size());
  const auto pages = std::make_shared<PopularPages>(
      slab, PopularityConfig{.most_tables = 2, .most_contents = 32, .period_ms = kPeriodMs});
  DomainKey key{};
  const auto domain = pages->domain(key, 0);
  MemberGuest guest{};
  guest[0] = 1;
  MemberGuest other{};
  other[0] = 2;
  const unsigned seat = domain->enter(guest, 1);
  EXPECT_NE(domain->enter(other, 2), seat);
  EXPECT_EQ(domain->enter(guest, 3), seat);
  std::set<unsigned> seats;
  for (unsigned i = 0; i < 200; ++i) {
    guest[1] = static_cast<std::uint8_t>(i + 1);
    seats.insert(domain->enter(guest, 4 + i));
  }
  EXPECT_EQ(seats.size(), Popularity::kSeats);
}

TEST(PopularPagesTest, ADomainIsRememberedUntilItsCountsHaveFadedOrItsPlaceIsNeeded) {
  const auto slab = std::make_shared<Slab>(256 * system_page_size(), system_page_size());
  const auto pages = std::make_shared<PopularPages>(
      slab, PopularityConfig{.most_tables = 2, .most_contents = 32, .period_ms = kPeriodMs});
  const auto key = [](std::uint8_t number) {
    DomainKey made{};
    made.fill(number);
    return made;
  };
  std::vector<wire::ContentName> names{name_of(1)};
  std::uint64_t wanted = 0;
  pages->domain(key(1), 0)->report(names, 1, 1, std::span(&wanted, 1));
  names = {name_of(1)};
  pages->domain(key(1), 10)->report(names, 2, 11, std::span(&wanted, 1));
  EXPECT_EQ(wanted, 1u) << "what was counted before is still known";
  std::vector<std::shared_ptr<PopularDomain>> in;
  for (std::uint8_t number = 2; in.size() < PopularPages::kMostDomains; ++number) {
    in.push_back(pages->domain(key(number), 20));
    ASSERT_TRUE(in.back());
  }
  EXPECT_EQ(pages->stats().names, 0u) << "the one that nobody is in made room";
  EXPECT_FALSE(pages->domain(key(1), 30)) << "somebody is in all of them";
}

// More joins than there are numbers, each with a key of its own: a domain that comes after them finds nothing of those
// that had its number, and one that stays keeps what is its own.
TEST(PopularPagesTest, AFloodOfDomainsMixesNothingUp) {
  const auto slab = std::make_shared<Slab>(4096 * system_page_size(), system_page_size());
  const auto pages = std::make_shared<PopularPages>(
      slab, PopularityConfig{.most_tables = 64, .most_contents = 32, .period_ms = kPeriodMs});
  const auto key = [](std::uint32_t number) {
    DomainKey made{};
    std::memcpy(made.data(), &number, sizeof number);
    return made;
  };
  const auto stays = pages->domain(key(0), 0);
  const auto tell = [](PopularDomain& domain, unsigned content, unsigned seat) {
    std::vector<wire::ContentName> names{name_of(content)};
    std::uint64_t wanted = 0;
    domain.report(names, seat, 1, std::span(&wanted, 1));
    return wanted == 1;
  };
  EXPECT_FALSE(tell(*stays, 1, 1));
  std::set<std::uint16_t> numbers;
  for (std::uint32_t number = 1; number <= 70'000; ++number) {
    const auto domain = pages->domain(key(number), 1);
    ASSERT_TRUE(domain);
    ASSERT_NE(domain->number(), stays->number());
    numbers.insert(domain->number());
    if (number % 64 == 0) {
      ASSERT_FALSE(tell(*domain, 2, 1)) << "nobody of this domain has said so";
    }
  }
  EXPECT_GT(numbers.size(), 60'000u);
  EXPECT_TRUE(tell(*stays, 1, 2));
}

// Not at once, and nobody waits for it: entries of a domain that is gone count for nothing from that moment on.
TEST_F(PopularityTest, WhatIsForgottenIsGoneAtOnceAndSweptByAndBy) {
  make(4096, {.most_tables = 256, .most_contents = 64});
  for (unsigned content = 0; content < 400; ++content) (void)report(content, 1);
  ASSERT_TRUE(hold(1000, 2));
  table->forget(1);
  EXPECT_GT(table->stats().names, 0u) << "no pass over the whole table";
  EXPECT_FALSE(table->forgotten(1));
  EXPECT_EQ(guests(1000), 0u);
  EXPECT_TRUE(listed().empty());
  EXPECT_FALSE(give(1000));
  for (int i = 0; i < 256 && !table->forgotten(1); ++i) table->tend(now);
  EXPECT_TRUE(table->forgotten(1));
  EXPECT_EQ(table->stats().names, 0u);
  EXPECT_EQ(table->stats().contents, 0u);
}

// The table may know less than the model (what found no room), never more, and never a wrong page.
void run_schedule(std::uint32_t seed) {
  std::mt19937_64 random(seed);
  const auto slab = std::make_shared<Slab>((48 + random() % 100) * system_page_size(), system_page_size());
  const PopularityConfig config{
      .most_tables = 1 + random() % 3, .most_contents = random() % 24, .period_ms = kPeriodMs};
  Popularity table(slab, config);
  slab->set_relief([&](std::uint64_t wanted) { table.relieve(wanted); });
  std::uint64_t now = random() % (3 * kPeriodMs);
  // When each guest has said so last, by domain and content; and whose page was asked for.
  std::map<std::pair<unsigned, unsigned>, std::map<unsigned, std::uint64_t>> said;
  std::vector<Slab::Slot> images;
  constexpr unsigned kContents = 300;
  const auto counted = [&](unsigned domain, unsigned content) {
    unsigned guests = 0;
    for (const auto& [seat, at] : said[{domain, content}])
      guests += now / kPeriodMs - at / kPeriodMs <= 1 ? 1 : 0;
    return guests;
  };
  for (unsigned step = 0; step < 600; ++step) {
    const unsigned domain = 1 + static_cast<unsigned>(random() % 2);
    const unsigned content = static_cast<unsigned>(random() % 4 == 0 ? random() % kContents : random() % 20);
    switch (random() % 10) {
      case 0:
        now += random() % (kPeriodMs / 2);
        break;
      case 1: {
        const std::size_t before = images.size();
        const std::uint64_t free = slab->free_slots() + table.stats().contents;
        const std::uint64_t asked = random() % 60;
        ASSERT_EQ(slab->take(asked, images), std::min(asked, free)) << "pages never stand in an image's way";
        for (std::size_t i = before; i < images.size(); ++i)
          std::memset(slab->data(images[i]), 0xee, slab->slot_bytes());
        break;
      }
      case 2:
        slab->drop(images);
        images.clear();
        break;
      case 3: {
        const auto slot = table.pin(static_cast<std::uint16_t>(domain), name_of(content), now);
        if (!slot) break;
        ASSERT_GE(counted(domain, content), 1u);
        ASSERT_EQ(std::memcmp(slab->data(*slot), page_of(content).data(), system_page_size()), 0);
        slab->release(std::span(&*slot, 1));
        break;
      }
      default: {
        const unsigned seat = static_cast<unsigned>(random() % 6);
        const wire::ContentName name = name_of(content);
        std::uint64_t wanted = 0;
        table.report(static_cast<std::uint16_t>(domain), std::span(&name, 1), seat, now,
                     std::span(&wanted, 1));
        said[{domain, content}][seat] = now;
        if (wanted == 0) break;
        ASSERT_GE(counted(domain, content), Popularity::kPopularFrom);
        if (random() % 4 != 0)
          (void)table.give(static_cast<std::uint16_t>(domain), name, page_of(content), now);
        break;
      }
    }
    const std::uint32_t score = table.score(static_cast<std::uint16_t>(domain), name_of(content), now);
    ASSERT_LE(score / kGuest, counted(domain, content));
    const PopularityStats stats = table.stats();
    ASSERT_LE(stats.contents, config.most_contents);
    ASSERT_LE(stats.tables, config.most_tables);
    ASSERT_EQ(slab->slots(), slab->free_slots() + images.size() + stats.contents + stats.tables);
  }
}

TEST(PopularityModel, KnowsNothingThatWasNotReportedAndHoldsUpNobody) {
  const char* only = std::getenv("MEMFERRY_SEED");
  const std::uint32_t first =
      only != nullptr ? static_cast<std::uint32_t>(std::strtoul(only, nullptr, 10)) : 1;
  const std::uint32_t last = only != nullptr ? first : 120;
  for (std::uint32_t seed = first; seed <= last; ++seed) {
    run_schedule(seed);
    if (testing::Test::HasFatalFailure()) FAIL() << "MEMFERRY_SEED=" << seed;
  }
}

}  // namespace
}  // namespace memferry::test
