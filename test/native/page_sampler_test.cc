// What a sampler finds of a guest's pages, what it leaves alone, and what it takes of a core.
#include "share/page_sampler.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "fake_source.h"
#include "os/mapping.h"
#include "os/userfaultfd.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;

// Remembers what it is told, and wants every page of it.
class Told final : public SampleReporter {
 public:
  explicit Told(bool wants = true) : wants_(wants) {}
  void report(std::span<const SampledPage> pages, std::vector<bool>& wanted) override {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < pages.size(); ++i) {
      ++reported_[{pages[i].region, pages[i].page.value}];
      wanted[i] = wants_;
    }
    if (at_report) at_report();
    changed_.notify_all();
  }
  std::function<void()> at_report;
  void give(const SampledPage& page, std::span<const std::byte> bytes) override {
    const std::lock_guard lock(mutex_);
    given_[{page.region, page.page.value}].assign(bytes.begin(), bytes.end());
    names_[{page.region, page.page.value}] = page.name;
  }
  void flush() override {
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
  void interrupt() override {}
  template <typename Predicate>
  bool wait_for(const Predicate& predicate) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, 30s, predicate);
  }
  bool wait_given(std::size_t pages) {
    return wait_for([&] { return given_.size() >= pages; });
  }
  using Key = std::pair<std::uint32_t, std::uint64_t>;
  std::map<Key, unsigned> reported() {
    const std::lock_guard lock(mutex_);
    return reported_;
  }
  std::map<Key, std::vector<std::byte>> given() {
    const std::lock_guard lock(mutex_);
    return given_;
  }
  std::map<Key, wire::ContentName> names() {
    const std::lock_guard lock(mutex_);
    return names_;
  }

 private:
  const bool wants_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Key, unsigned> reported_;
  std::map<Key, std::vector<std::byte>> given_;
  std::map<Key, wire::ContentName> names_;
};

SamplerConfig config_of(std::vector<std::shared_ptr<Region>> regions,
                        std::shared_ptr<SampleReporter> reporter) {
  SamplerConfig config;
  config.regions = std::move(regions);
  config.key.fill(3);
  config.cpu_share = 1;
  config.pass_interval = 1ms;
  config.reporter = std::move(reporter);
  return config;
}

void fill(const std::shared_ptr<Region>& region, std::uint64_t first, std::uint64_t count,
          std::uint64_t seed) {
  const auto bytes = random_bytes(static_cast<std::size_t>(count * region->page_size()), seed);
  std::memcpy(region->address(PageNumber{first}).pointer(), bytes.data(), bytes.size());
}

bool wait_until(const std::function<bool()>& predicate) {
  const auto end = std::chrono::steady_clock::now() + 30s;
  while (!predicate()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(1ms);
  }
  return true;
}

std::uint64_t resident_pages(const std::shared_ptr<Region>& region) {
  std::vector<unsigned char> there(static_cast<std::size_t>(region->pages()));
  EXPECT_EQ(::mincore(region->address(PageNumber{0}).pointer(), region->bytes(), there.data()), 0);
  return static_cast<std::uint64_t>(
      std::ranges::count_if(there, [](unsigned char each) { return (each & 1) != 0; }));
}

TEST(PageSampler, ReportsAndGivesWhatStandsStillAndNothingElse) {
  const auto region = Region::allocate(4096 * system_page_size());
  const auto other = Region::allocate(64 * system_page_size());
  fill(region, 10, 100, 1);
  fill(region, 3000, 50, 2);
  fill(other, 0, 5, 3);
  std::memset(region->address(PageNumber{2000}).pointer(), 0, 20 * system_page_size());  // touched, and zeros
  const std::uint64_t resident = resident_pages(region);
  const auto told = std::make_shared<Told>();
  PageSampler sampler(config_of({region, other}, told));
  ASSERT_TRUE(told->wait_given(155));
  sampler.close();
  const auto given = told->given();
  EXPECT_EQ(given.size(), 155u);
  const ContentHasher hasher([] {
    ContentKey key;
    key.fill(3);
    return key;
  }());
  for (const auto& [key, bytes] : given) {
    const auto& its = key.first == 0 ? region : other;
    EXPECT_EQ(std::memcmp(bytes.data(), its->address(PageNumber{key.second}).pointer(), bytes.size()), 0);
    const ContentDigest digest = hasher(bytes);
    EXPECT_EQ(std::memcmp(digest.data(), told->names()[key].data(), sizeof(wire::ContentName)), 0);
  }
  EXPECT_EQ(resident_pages(region), resident) << "nothing was touched that was not there";
  EXPECT_EQ(sampler.stats().memory_bytes, 3 * 512 * 8u);
}

TEST(PageSampler, APageThatIsWrittenInEveryPassIsNotReported) {
  const auto region = Region::allocate(64 * system_page_size());
  fill(region, 0, 64, 1);
  const auto told = std::make_shared<Told>();
  // Each pass from the second one on ends with a report.
  told->at_report = [&] { ++*reinterpret_cast<std::uint64_t*>(region->address(PageNumber{7}).pointer()); };
  PageSampler sampler(config_of({region}, told));
  ASSERT_TRUE(told->wait_given(63));
  ASSERT_TRUE(wait_until([&] { return sampler.stats().passes > 20; }));
  sampler.close();
  auto reported = told->reported();
  EXPECT_LE((reported[{0, 7}]), 1u) << "when nobody had written it yet";
  EXPECT_GE((reported[{0, 8}]), 15u);
}

TEST(PageSampler, LooksAwayWhileTheRegionIsOnItsWay) {
  const auto region = Region::allocate(64 * system_page_size());
  fill(region, 0, 64, 1);
  const auto told = std::make_shared<Told>();
  ASSERT_TRUE(region->claim());
  PageSampler sampler(config_of({region}, told));
  ASSERT_TRUE(wait_until([&] { return sampler.stats().passes > 3; }));
  EXPECT_EQ(sampler.stats().hashed, 0u);
  EXPECT_GT(sampler.stats().looked_away, 0u);
  region->release();
  ASSERT_TRUE(told->wait_given(64));
  // Claimed and released in the middle of looks, all the time; each claim is one moment in which nobody looks.
  for (int i = 0; i < 2000; ++i) {
    ASSERT_TRUE(region->claim());
    const std::uint64_t hashed = sampler.stats().hashed;
    if (i % 100 == 0) std::this_thread::sleep_for(1ms);
    ASSERT_EQ(sampler.stats().hashed, hashed);
    region->release();
  }
  {
    const RegionArrival arrival(region);
    const std::uint64_t hashed = sampler.stats().hashed;
    std::this_thread::sleep_for(5ms);
    EXPECT_EQ(sampler.stats().hashed, hashed);
  }
  const std::uint64_t hashed = sampler.stats().hashed;
  EXPECT_TRUE(wait_until([&] { return sampler.stats().hashed > hashed; }));
}

TEST(PageSampler, NeverTouchesAPageThatIsMissing) {
  const auto region = Region::allocate(64 * system_page_size());
  fill(region, 0, 20, 1);
  auto uffd = Userfaultfd::open(0);
  uffd.register_missing(region->address(PageNumber{0}), region->bytes());
  const auto told = std::make_shared<Told>();
  PageSampler sampler(config_of({region}, told));
  ASSERT_TRUE(told->wait_given(20));
  ASSERT_TRUE(wait_until([&] { return sampler.stats().passes > 10; })) << "it waits for a page";
  EXPECT_EQ(told->given().size(), 20u);
}

TEST(PageSampler, EndsWhereverItIs) {
  for (unsigned i = 0; i < 40; ++i) {
    const auto region = Region::allocate(2048 * system_page_size());
    fill(region, 0, 512, i);
    PageSampler sampler(config_of({region}, std::make_shared<Told>()));
    std::this_thread::sleep_for(std::chrono::microseconds(100 * i));
    if (i % 3 == 0) region->retire();
    if (i % 3 == 1) sampler.close();
    sampler.close();
  }
}

TEST(PageSampler, LetsGoOfARegionWithItsOwners) {
  auto region = Region::allocate(512 * system_page_size());
  fill(region, 0, 512, 1);
  const std::weak_ptr<Region> gone = region;
  PageSampler sampler(config_of({region}, std::make_shared<Told>()));
  ASSERT_TRUE(wait_until([&] { return sampler.stats().hashed > 0; }));
  region.reset();
  EXPECT_TRUE(wait_until([&] { return gone.expired(); }));
  const std::uint64_t passes = sampler.stats().passes;
  EXPECT_TRUE(wait_until([&] { return sampler.stats().passes > passes + 2; }));
}

TEST(PageSampler, FollowsARegionThatGrows) {
  const std::uint64_t page = system_page_size();
  Mapping memory = Mapping::anonymous(1024 * page);
  const auto region = Region::adopt({Extent{memory.start(), 16 * page}}, 1024 * page);
  const auto bytes = random_bytes(static_cast<std::size_t>(1024 * page), 5);
  std::memcpy(memory.data(), bytes.data(), bytes.size());
  const auto told = std::make_shared<Told>();
  PageSampler sampler(config_of({region}, told));
  ASSERT_TRUE(told->wait_given(16));
  EXPECT_EQ(told->given().size(), 16u);
  region->grow(1000);
  EXPECT_TRUE(told->wait_given(1000));
  sampler.close();
  EXPECT_EQ(told->given().size(), 1000u);
  region->retire();
}

TEST(PageSampler, RemembersNoMorePagesThanItMay) {
  const auto region = Region::allocate(2048 * system_page_size());
  fill(region, 0, 2048, 1);
  auto config = config_of({region}, std::make_shared<Told>());
  config.most_pages = 1024;
  PageSampler sampler(std::move(config));
  ASSERT_TRUE(wait_until([&] { return sampler.stats().passes > 3; }));
  EXPECT_EQ(sampler.stats().memory_bytes, 1024 * 8u);
}

// By CPU time, with a bound that is far above the share and far below what it takes without one.
TEST(PageSampler, TakesNoMoreThanItsShareOfACore) {
  const auto region = Region::allocate(16384 * system_page_size());
  fill(region, 0, 16384, 1);
  auto config = config_of({region}, std::make_shared<Told>(false));
  config.cpu_share = 0.02;
  PageSampler sampler(std::move(config));
  ASSERT_TRUE(wait_until([&] { return sampler.stats().hashed > 0; }));
  const std::uint64_t former = sampler.stats().cpu_ns;
  const auto began = std::chrono::steady_clock::now();
  std::this_thread::sleep_for(1s);
  const auto cpu = static_cast<double>(sampler.stats().cpu_ns - former);
  const auto wall = static_cast<double>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - began).count());
  EXPECT_LT(cpu / wall, 0.08);
}

TEST(CpuShareTest, WhatIsUsedIsWaitedForAndWhatIsNotUsedIsCreditedForAMoment) {
  CpuShare share(0.01, 0);
  EXPECT_EQ(share.wait_ns(1'000'000, 0), 100'000'000u);
  EXPECT_EQ(share.wait_ns(1'000'000, 100'000'000), 100'000'000u);
  // After an hour without work a millisecond goes at once, and no more.
  const std::uint64_t hour = 3'600'000'000'000;
  EXPECT_EQ(share.wait_ns(1'000'000, hour), 0u);
  EXPECT_EQ(share.wait_ns(1'000'000, hour), 100'000'000u);
}

}  // namespace
}  // namespace memferry::test
