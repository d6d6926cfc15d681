// A server's shared content against a model that knows every byte: images of several domains that put, name, refer,
// read, forget, go, on servers that die, with lies among what is said. Each schedule comes from a seed.
//
//   MEMFERRY_SEED=N   this one alone
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "os/mapping.h"
#include "page/hash.h"
#include "stage/content_domain.h"
#include "stage/image.h"

namespace memferry::test {
namespace {

constexpr unsigned kSchedules = 400;
constexpr unsigned kSteps = 400;
constexpr unsigned kPages = 24;
constexpr unsigned kContents = 20;
constexpr unsigned kDomains = 2;

std::vector<std::byte> content_bytes(unsigned content) {
  std::vector<std::byte> bytes(system_page_size());
  std::mt19937_64 random(content + 1000);
  for (std::size_t at = 0; at < bytes.size(); at += 8) {
    const std::uint64_t word = random();
    std::memcpy(&bytes[at], &word, 8);
  }
  return bytes;
}

DomainKey key_of(unsigned domain) {
  DomainKey key{};
  key.fill(static_cast<std::uint8_t>(domain + 1));
  return key;
}

// One server with its images and what the model knows of them.
class ModelServer {
 public:
  struct Held {
    std::shared_ptr<Image> image;
    unsigned domain = 0;
    std::uint32_t asker = 0;
    std::map<unsigned, unsigned> content;  // by page; absent where there is none
    bool parked = false;                   // nobody writes it any more
  };

  explicit ModelServer(std::mt19937_64& random)
      : slab(std::make_shared<Slab>((48 + random() % 100) * system_page_size(), system_page_size())),
        hints(std::make_shared<ContentHints>(slab)),
        random_(random) {}
  ~ModelServer() {
    for (auto& each : images) each.image->drop();
    images.clear();
    // Nobody has any count left of anything, however it was shared.
    EXPECT_EQ(hints->bytes(), 0u);
    EXPECT_EQ(slab->free_slots(), slab->slots());
  }
  ModelServer(const ModelServer&) = delete;
  ModelServer& operator=(const ModelServer&) = delete;

  void create() {
    if (images.size() >= 6) return;
    Held held;
    held.domain = static_cast<unsigned>(random_() % kDomains);
    auto domain = hints->domain(key_of(held.domain));
    held.asker = domain->new_asker();
    ImageConfig config;
    config.id.fill(static_cast<std::uint8_t>(random_()));
    config.region_pages = {kPages};
    held.image = Image::create(slab, config, std::move(domain));
    if (held.image) images.push_back(std::move(held));
  }
  void put(Held& to) {
    if (to.parked) return;
    const unsigned page = any_page();
    const auto content = static_cast<unsigned>(random_() % kContents);
    std::vector<Slab::Slot> slots;
    if (slab->take(1, slots) == 0) return forget(to, page);
    // As a connection does it: what lay in a slot before is overwritten while it is not settled.
    const auto bytes = content_bytes(content);
    std::memcpy(slab->data(slots[0]), bytes.data(), bytes.size() / 2);
    share_nothing_unsettled(to, slots[0]);
    std::memcpy(slab->data(slots[0]), bytes.data(), bytes.size());
    slab->settle(slots, to.image->domain()->number());
    const std::uint64_t hash = xxh3_64(bytes);
    to.image->store(0, {PageNumber{page}, 1}, slots, std::span(&hash, 1), kHere);
    to.content[page] = content;
    if (random_() % 4 != 0) say_names(to, page);
  }
  void say_names(Held& of, unsigned page) {
    std::vector<Image::Place> places;
    of.image->places(0, {PageNumber{page}, 1}, places);
    ASSERT_EQ(places.size(), of.content.count(page));
    for (const auto& each : places) of.image->domain()->name(name(of, of.content[page]), each.slot);
  }
  // Somebody of the domain says what is not so.
  void lie(Held& of) {
    of.image->domain()->name(name(of, static_cast<unsigned>(random_() % kContents)),
                             static_cast<Slab::Slot>(random_() % (2 * slab->slots())));
  }
  void park(Held& of) {
    of.parked = true;
    of.image->seal();
  }
  void refer(Held& to) {
    if (to.parked) return;
    const unsigned page = any_page();
    const auto content = static_cast<unsigned>(random_() % kContents);
    wire::ContentHash hash = ContentHasher(key_of(to.domain))(content_bytes(content));
    // A hash of another domain, or of nothing.
    const unsigned forgery = random_() % 8;
    if (forgery == 0) hash = ContentHasher(key_of(1 - to.domain))(content_bytes(content));
    if (forgery == 1) hash[31] ^= 1;
    const bool there = anybody_put(to.domain, content);
    Slab::Slot slot = 0;
    std::uint64_t xxh3 = 0;
    if (!to.image->domain()->share(hash, slot, xxh3)) return forget(to, page);
    ASSERT_GT(forgery, 1u) << "a forged hash was taken";
    ++shared;
    const auto bytes = content_bytes(content);
    ASSERT_EQ(std::memcmp(slab->data(slot), bytes.data(), bytes.size()), 0) << "content " << content;
    ASSERT_EQ(xxh3, xxh3_64(bytes));
    to.image->store(0, {PageNumber{page}, 1}, std::span(&slot, 1), std::span(&xxh3, 1), kHere, true);
    to.content[page] = content;
    // Even where another domain holds the same, and its slot was said to be ours.
    ASSERT_TRUE(there) << "content " << content << " of nobody in domain " << to.domain;
  }
  void forget(Held& of, unsigned page) {
    if (of.parked) return;
    of.image->forget(0, {PageNumber{page}, 1});
    of.content.erase(page);
  }
  void read(Held& of) {
    Image::Reading reading(slab);
    of.image->read(0, {PageNumber{0}, kPages}, reading);
    std::size_t at = 0;
    unsigned pages = 0;
    for (const auto& piece : reading.pieces()) {
      for (std::uint64_t i = 0; i < piece.run.count; ++i, ++pages) {
        const auto expected = of.content.find(pages);
        if (piece.kind != Image::Reading::Kind::kContent) {
          ASSERT_EQ(expected, of.content.end()) << "page " << pages << " is gone";
          continue;
        }
        ASSERT_NE(expected, of.content.end());
        const auto bytes = content_bytes(expected->second);
        ASSERT_EQ(std::memcmp(slab->data(reading.slots()[at]), bytes.data(), bytes.size()), 0);
        ASSERT_EQ(reading.hashes()[at], xxh3_64(bytes));
        ++at;
      }
    }
    ASSERT_EQ(pages, kPages);
    // Held while everything else goes on: who reads slowly still reads this.
    if (random_() % 3 == 0 && images.size() > 1) {
      const std::size_t victim = random_() % images.size();
      if (&images[victim] != &of) dissolve(victim);
    }
    for (std::size_t i = 0; i < reading.slots().size(); ++i)
      ASSERT_EQ(xxh3_64({slab->data(reading.slots()[i]), system_page_size()}), reading.hashes()[i]);
  }
  // A dissolve, a drop, a lease's end.
  void dissolve(std::size_t at) {
    images[at].image->drop();
    images.erase(images.begin() + static_cast<std::ptrdiff_t>(at));
  }
  void check_all() {
    for (std::size_t i = 0; i < images.size(); ++i) {
      Image::Reading reading(slab);
      const auto stats = images[i].image->stats();
      ASSERT_EQ(stats.pages_held, images[i].content.size());
      ASSERT_LE(stats.pages_shared, stats.pages_held);
      images[i].image->read(0, {PageNumber{0}, kPages}, reading);
      ASSERT_EQ(reading.slots().size(), images[i].content.size());
      std::size_t at = 0;
      for (const auto& [page, content] : images[i].content)
        ASSERT_EQ(reading.hashes()[at++], xxh3_64(content_bytes(content))) << "page " << page;
    }
  }

  std::shared_ptr<Slab> slab;
  std::shared_ptr<ContentHints> hints;
  std::vector<Held> images;
  std::uint64_t shared = 0;

 private:
  static constexpr wire::Holders kHere{0, wire::Holders::kNobody};
  unsigned any_page() { return static_cast<unsigned>(random_() % kPages); }
  static wire::ContentName name(const Held& of, unsigned content) {
    return ContentDomain::name_of(ContentHasher(key_of(of.domain))(content_bytes(content)));
  }
  [[nodiscard]] bool anybody_put(unsigned domain, unsigned content) const {
    for (const auto& each : images) {
      if (each.domain != domain) continue;
      for (const auto& [page, of] : each.content)
        if (of == content) return true;
    }
    return false;
  }
  // Whatever lay in it, and whatever is said of it.
  void share_nothing_unsettled(Held& of, Slab::Slot slot) {
    EXPECT_FALSE(slab->share(slot, of.image->domain()->number()));
    of.image->domain()->name(name(of, 0), slot);
  }
  std::mt19937_64& random_;
};

void run(std::uint64_t seed, std::uint64_t& shared, std::uint64_t& deaths) {
  std::mt19937_64 random(seed);
  std::vector<std::unique_ptr<ModelServer>> servers;
  for (unsigned i = 0; i < 2; ++i) servers.push_back(std::make_unique<ModelServer>(random));
  for (unsigned step = 0; step < kSteps && !testing::Test::HasFailure(); ++step) {
    auto& server = servers[random() % servers.size()];
    if (random() % 100 == 0) {
      // It dies with all that it holds, and comes back empty.
      shared += server->shared;
      server = std::make_unique<ModelServer>(random);
      ++deaths;
    }
    if (server->images.empty() || random() % 20 == 0) server->create();
    if (server->images.empty()) continue;
    const std::size_t at = random() % server->images.size();
    auto& image = server->images[at];
    switch (random() % 12) {
      case 0:
      case 1:
      case 2:
        server->put(image);
        break;
      case 3:
      case 4:
      case 5:
      case 6:
        server->refer(image);
        break;
      case 7:
        server->forget(image, static_cast<unsigned>(random() % kPages));
        break;
      case 8:
        server->lie(image);
        break;
      case 9:
      case 10:
        server->read(image);
        break;
      case 11:
        if (const auto what = random() % 8; what < 2)
          server->dissolve(at);
        else if (what == 2)
          server->park(image);
        break;
    }
    server->check_all();
  }
  for (const auto& each : servers) shared += each->shared;
}

TEST(ContentModel, NoPageIsEverAnothersAndNoCountIsLeft) {
  std::uint64_t shared = 0;
  std::uint64_t deaths = 0;
  if (const char* seed = std::getenv("MEMFERRY_SEED"); seed != nullptr && *seed != 0) {
    return run(std::strtoull(seed, nullptr, 10), shared, deaths);
  }
  for (std::uint64_t seed = 1; seed <= kSchedules; ++seed) {
    run(seed, shared, deaths);
    ASSERT_FALSE(HasFailure()) << "alone: MEMFERRY_SEED=" << seed;
  }
  // What never happens here is not tested here.
  EXPECT_GT(shared, 1000u);
  EXPECT_GT(deaths, 100u);
}

// What a directory says was said by somebody of the same domain, or is a question that is open.
TEST(ContentModel, ADirectorySaysWhatItWasToldByItsDomain) {
  for (std::uint64_t seed = 1; seed <= kSchedules; ++seed) {
    std::mt19937_64 random(seed);
    const auto slab = std::make_shared<Slab>(256 * system_page_size(), system_page_size());
    const auto hints = std::make_shared<ContentHints>(slab);
    std::vector<std::shared_ptr<ContentDomain>> domains{hints->domain(key_of(0)), hints->domain(key_of(1))};
    std::vector<std::vector<std::uint32_t>> askers(2);
    for (unsigned i = 0; i < 6; ++i) askers[i % 2].push_back(domains[i % 2]->new_asker());
    struct Known {
      std::optional<wire::KnownHolders> holders;
      std::optional<std::pair<std::uint32_t, std::uint64_t>> on_its_way;  // who, since when
    };
    // Names are the same in both: overheard on the wire, say.
    std::map<std::pair<unsigned, unsigned>, Known> model;
    std::uint64_t now = random() % 10000 + 0xfffff000;  // the clock's lower half runs over
    for (unsigned step = 0; step < kSteps; ++step) {
      now += random() % 50;
      const unsigned domain = random() % 2;
      const auto content = static_cast<unsigned>(random() % 40);
      const wire::ContentName name{content * 7919ULL, content * 104729ULL};
      const std::uint32_t asker = askers[domain][random() % askers[domain].size()];
      Known& known = model[{domain, content}];
      switch (random() % 4) {
        case 0: {
          const wire::KnownHolders holders{1 + random() % 5, random() % 3};
          domains[domain]->held(name, holders, asker);
          known = {holders, std::nullopt};
          break;
        }
        case 1:
          domains[domain]->held(name, {}, asker);
          if (known.on_its_way && known.on_its_way->first == asker) known.on_its_way.reset();
          break;
        default: {
          const wire::KnownHolders answer = domains[domain]->probe(name, asker, now);
          if (known.holders) {
            ASSERT_EQ(answer, *known.holders) << seed;
            break;
          }
          const bool waits = known.on_its_way && known.on_its_way->first != asker &&
                             now - known.on_its_way->second < ContentDomain::kPatienceMs;
          ASSERT_EQ(answer.first, waits ? wire::KnownHolders::kOnItsWay : wire::KnownHolders::kNobody)
              << seed;
          if (!waits) known.on_its_way = {asker, now};
        }
      }
    }
    domains.clear();
    ASSERT_EQ(slab->free_slots(), slab->slots());
  }
}

TEST(HintTable, TheOldestLeavesAndNothingGrowsBeyondItsBound) {
  const auto slab = std::make_shared<Slab>(64 * system_page_size(), system_page_size());
  HintTable table(slab, 2);
  const std::uint64_t entries = 2 * system_page_size() / 32;
  std::mt19937_64 random(1);
  std::vector<wire::ContentName> names(10 * entries);
  for (std::size_t i = 0; i < names.size(); ++i) {
    names[i] = {random(), random()};
    table.put(names[i], {i + 1, i});
    ASSERT_EQ(table.find(names[i]), (HintTable::Value{i + 1, i}));
    // One that is used stays.
    ASSERT_TRUE(table.find(names[0])) << i;
  }
  EXPECT_LE(table.slots_used(), 2u);
  std::uint64_t left = 0;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto found = table.find(names[i]);
    if (!found) continue;
    EXPECT_EQ(*found, (HintTable::Value{i + 1, i}));
    ++left;
  }
  EXPECT_LE(left, entries);
  EXPECT_GT(left, entries * 9 / 10);
  table.erase(names[0]);
  EXPECT_FALSE(table.find(names[0]));
  table.clear();
  EXPECT_EQ(slab->free_slots(), slab->slots());
}

TEST(HintTable, WithoutRoomItKnowsNothing) {
  const auto slab = std::make_shared<Slab>(4 * system_page_size(), system_page_size());
  std::vector<Slab::Slot> all;
  ASSERT_TRUE(slab->take_all(4, all));
  HintTable table(slab, 4);
  table.put({1, 2}, {3, 4});
  EXPECT_FALSE(table.find({1, 2}));
  slab->release(all);
}

TEST(SharedSlots, ASlotIsSharedOnlySoOften) {
  Slab slab(4 * system_page_size(), system_page_size());
  std::vector<Slab::Slot> slots;
  ASSERT_EQ(slab.take(1, slots), 1u);
  EXPECT_FALSE(slab.share(slots[0], 3)) << "what is not settled may still change";
  slab.settle(slots, 3);
  EXPECT_FALSE(slab.share(slots[0], 2)) << "another domain's";
  for (std::uint32_t counts = 1; counts < Slab::kMostCounts; ++counts) ASSERT_TRUE(slab.share(slots[0], 3));
  EXPECT_FALSE(slab.share(slots[0], 3));
  // Readers have room beyond that.
  slab.pin(slots[0]);
  slab.release(slots);
  EXPECT_FALSE(slab.share(slots[0], 3));
  for (std::uint32_t counts = 0; counts < Slab::kMostCounts; ++counts) {
    ASSERT_EQ(slab.free_slots(), 3u);
    slab.release(slots);
  }
  EXPECT_EQ(slab.free_slots(), 4u);
  EXPECT_FALSE(slab.share(slots[0], 3)) << "what is free is nobody's";
  std::vector<Slab::Slot> again;
  ASSERT_EQ(slab.take(4, again), 4u);
  for (const Slab::Slot each : again) EXPECT_FALSE(slab.share(each, 3)) << "nor is what was settled once";
  EXPECT_FALSE(slab.share(4000, 3));
}

}  // namespace
}  // namespace memferry::test
