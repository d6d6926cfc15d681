// Page distribution as a whole, over real servers: what guests have in common comes into a share, and nothing else; through
// servers that die, shares that shrink, and servers that lie.
#include "spread/page_spreader.h"

#include <gtest/gtest.h>

#include <cstring>
#include <set>
#include <thread>

#include "page/content_hash.h"
#include "share_file_support.h"
#include "spread/directory_reporter.h"
#include "stage_client.h"
#include "wire/socket.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;
using wire::FrameType;

constexpr std::uint16_t kSession = 1;

bool wait_until(const std::function<bool()>& predicate) {
  const auto end = std::chrono::steady_clock::now() + 60s;
  while (!predicate()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(2ms);
  }
  return true;
}

// A membership of domain 1 at a server.
Directory join(const StageBench& at, std::uint8_t number, std::optional<std::uint8_t> guest) {
  Directory made;
  made.member = image_id(number);
  MemberConfig config{made.member, key_of(1), std::nullopt};
  if (guest) config.guest.emplace().fill(*guest);
  EXPECT_TRUE(at.stage->join(config));
  EXPECT_TRUE(at.stage->add_session(made.member, kSession, role_bit(wire::StageRole::kPopular),
                                    stage_tokens(made.member, kSession)));
  made.server = {.name = "one",
                 .host = "127.0.0.1",
                 .port = at.listener->port(),
                 .session = kSession,
                 .tokens = stage_tokens(made.member, kSession),
                 .identity = at.stage->identity()};
  return made;
}

// A region with these pages, sampled at full speed.
class SampledGuest {
 public:
  explicit SampledGuest(const std::vector<std::uint64_t>& pages)
      : region_(Region::allocate(pages.size() * system_page_size())),
        reporter_(std::make_shared<DirectoryReporter>()) {
    for (std::size_t i = 0; i < pages.size(); ++i) put(i, pages[i]);
    SamplerConfig config;
    config.regions = {region_};
    config.key = key_of(1);
    config.cpu_share = 0.3;
    config.pass_interval = 5ms;
    config.reporter = reporter_;
    sampler_ = std::make_unique<PageSampler>(std::move(config));
  }
  void put(std::size_t at, std::uint64_t page) {
    std::memcpy(region_->address(PageNumber{at}).pointer(), page_of(page).data(), system_page_size());
  }
  DirectoryReporter& reporter() { return *reporter_; }
  PageSampler& sampler() { return *sampler_; }

 private:
  std::shared_ptr<Region> region_;
  std::shared_ptr<DirectoryReporter> reporter_;
  std::unique_ptr<PageSampler> sampler_;
};

std::vector<std::uint64_t> numbers(std::uint64_t from, std::uint64_t count) {
  std::vector<std::uint64_t> all;
  for (std::uint64_t i = 0; i < count; ++i) all.push_back(from + i);
  return all;
}
std::vector<std::uint64_t> operator+(std::vector<std::uint64_t> a, const std::vector<std::uint64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

class PageSpread : public testing::Test {
 protected:
  PageSpread() {
    for (int i = 0; i < 2; ++i) servers.push_back(std::make_unique<StageBench>());
  }
  std::vector<Directory> join_all(std::optional<std::uint8_t> guest) {
    std::vector<Directory> all;
    for (const auto& server : servers) all.push_back(join(*server, ++member_, guest));
    return all;
  }
  SampledGuest& guest(const std::vector<std::uint64_t>& pages) {
    guests.push_back(std::make_unique<SampledGuest>(pages));
    guests.back()->reporter().set_directories(join_all(static_cast<std::uint8_t>(guests.size())));
    return *guests.back();
  }
  void spread_into(std::shared_ptr<PageShare> into) {
    share = std::move(into);
    SpreaderConfig config;
    config.share = share;
    config.interval = 10ms;
    spreader = std::make_unique<PageSpreader>(std::move(config));
    spreader->set_directories(join_all(std::nullopt));
  }
  bool holds(std::uint64_t page) { return share->holds(share->digest(page_of(page))); }
  std::size_t held(const std::vector<std::uint64_t>& pages) {
    return static_cast<std::size_t>(
        std::ranges::count_if(pages, [&](std::uint64_t page) { return holds(page); }));
  }
  static std::uint64_t budget_of(std::uint64_t pages) {
    return (pages + pages / 80 + 4) * system_page_size();
  }

  std::vector<std::unique_ptr<StageBench>> servers;
  std::vector<std::unique_ptr<SampledGuest>> guests;
  ShareFile file;
  std::shared_ptr<PageShare> share;
  std::unique_ptr<PageSpreader> spreader;

 private:
  std::uint8_t member_ = 0;
};

TEST_F(PageSpread, WhatGuestsHaveInCommonIsInTheShareAndNothingElse) {
  const auto base_a = numbers(1000, 150);
  const auto base_b = numbers(2000, 100);
  (void)guest(base_a + numbers(10'000, 60));
  (void)guest(base_a + numbers(20'000, 60));
  (void)guest(base_b + numbers(30'000, 60));
  (void)guest(base_b + numbers(40'000, 60));
  spread_into(open_share(file.path(), 8 << 20));
  ASSERT_TRUE(wait_until([&] { return share->stats().pages >= 250; }));
  EXPECT_EQ(held(base_a + base_b), 250u);
  for (const auto& server : servers)
    EXPECT_GT(server->stage->stats().popular_pages, 60u) << "divided by name";
  const std::uint64_t rounds = spreader->stats().rounds;
  ASSERT_TRUE(wait_until([&] { return spreader->stats().rounds > rounds + 3; }));
  EXPECT_EQ(share->stats().pages, 250u);
  EXPECT_EQ(spreader->stats().fetched, 250u) << "each once";
  EXPECT_EQ(spreader->stats().held, 250u);
}

TEST_F(PageSpread, WithinTheBudgetAreThoseThatMostGuestsHave) {
  const auto two = numbers(1000, 100);
  const auto four = numbers(2000, 100);
  (void)guest(two + four);
  (void)guest(two + four);
  (void)guest(four);
  (void)guest(four);
  ASSERT_TRUE(wait_until([&] {
    return servers[0]->stage->stats().popular_pages + servers[1]->stage->stats().popular_pages >= 200;
  }));
  // And each page is known to be in as many guests as it is in.
  ASSERT_TRUE(wait_until([&] {
    return guests[2]->sampler().stats().reported >= 100 && guests[3]->sampler().stats().reported >= 100;
  }));
  spread_into(open_share(file.path(), budget_of(120)));
  ASSERT_TRUE(wait_until([&] { return held(four) == 100 && share->stats().pages >= 110; }));
  EXPECT_LE(share->stats().bytes_used, budget_of(120));
  share->set_budget(budget_of(50));
  EXPECT_LE(share->stats().bytes_used, budget_of(50));
  EXPECT_EQ(held(two), 0u) << "the least useful left first";
  EXPECT_GE(held(four), 40u);
  const std::uint64_t rounds = spreader->stats().rounds;
  ASSERT_TRUE(wait_until([&] { return spreader->stats().rounds > rounds + 3; }));
  EXPECT_LE(share->stats().bytes_used, budget_of(50));
  EXPECT_EQ(held(two), 0u);
  share->set_budget(budget_of(220));
  EXPECT_TRUE(wait_until([&] { return held(two + four) == 200; })) << "and comes again with the room";
}

TEST_F(PageSpread, AServerThatWasRestartedIsFilledAgain) {
  const auto base = numbers(1000, 120);
  (void)guest(base + numbers(10'000, 10));
  (void)guest(base + numbers(20'000, 10));
  spread_into(open_share(file.path(), 8 << 20));
  ASSERT_TRUE(wait_until([&] { return held(base) == 120; }));
  servers[1].reset();
  const auto one_is_lost = [](const std::vector<bool>& lost) { return std::ranges::count(lost, true) == 1; };
  ASSERT_TRUE(wait_until([&] {
    return one_is_lost(spreader->lost()) && one_is_lost(guests[0]->reporter().lost()) &&
           one_is_lost(guests[1]->reporter().lost());
  }));
  // What was the lost one's is counted by the other from now on.
  EXPECT_TRUE(wait_until([&] { return servers[0]->stage->stats().popular_pages == 120; }));
  EXPECT_EQ(held(base), 120u) << "nothing is scored down by a server that is silent";
  servers[1] = std::make_unique<StageBench>();
  for (std::size_t i = 0; i < guests.size(); ++i)
    guests[i]->reporter().set_directories(join_all(static_cast<std::uint8_t>(i + 1)));
  spreader->set_directories(join_all(std::nullopt));
  EXPECT_TRUE(wait_until([&] { return servers[1]->stage->stats().popular_pages > 20; }));
  EXPECT_EQ(held(base), 120u);
}

TEST_F(PageSpread, AShareThatWasTakenOverIsNotFetchedAgain) {
  const auto base = numbers(1000, 60);
  (void)guest(base);
  (void)guest(base);
  spread_into(open_share(file.path(), 8 << 20));
  ASSERT_TRUE(wait_until([&] { return held(base) == 60; }));
  spreader.reset();
  share.reset();
  spread_into(open_share(file.path(), 8 << 20));
  ASSERT_TRUE(wait_until([&] { return spreader->stats().held == 60; }));
  EXPECT_EQ(spreader->stats().fetched, 0u);
}

TEST_F(PageSpread, AGuestThatChangesWhileItIsSampledGivesNothingWrong) {
  const auto base = numbers(1000, 100);
  SampledGuest& changing = guest(base);
  (void)guest(base + numbers(5000, 100));
  spread_into(open_share(file.path(), 8 << 20));
  for (std::uint64_t i = 0; i < 200; ++i) {
    changing.put(i % 100, i % 3 == 0 ? 1000 + i % 100 : 5000 + i % 100);
    std::this_thread::sleep_for(1ms);
  }
  const std::uint64_t rounds = spreader->stats().rounds;
  ASSERT_TRUE(wait_until([&] { return spreader->stats().rounds > rounds + 3; }));
  spreader.reset();  // which may be about to put one in
  EXPECT_EQ(held(base + numbers(5000, 100)), share->stats().pages) << "a page that neither guest ever had";
}

TEST_F(PageSpread, EndsInTheMiddleOfWhateverItDoes) {
  for (unsigned i = 0; i < 12; ++i) {
    servers.clear();
    for (int each = 0; each < 2; ++each) servers.push_back(std::make_unique<StageBench>());
    const auto base = numbers(1000, 200);
    (void)guest(base);
    (void)guest(base);
    const ShareFile other;
    spread_into(open_share(other.path(), 8 << 20));
    std::this_thread::sleep_for(std::chrono::milliseconds(10 * i));
    spreader.reset();
    guests.clear();
    share.reset();
  }
}

// A server that answers as a test wants it to: gives its popular names, and then what it likes.
class LyingServer {
 public:
  enum class Lie { kAnotherPage, kBitsNotAskedFor, kGoesBackward, kEndlessNames, kHalfAnAnswer };
  explicit LyingServer(Lie lie)
      : lie_(lie), listening_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))) {
    port_ = wire::SocketAddress::local(listening_.get()).port();
    thread_ = std::thread([this] { run(); });
  }
  ~LyingServer() {
    stop_ = true;
    thread_.join();
  }
  LyingServer(const LyingServer&) = delete;
  LyingServer& operator=(const LyingServer&) = delete;
  [[nodiscard]] Directory directory() const {
    Directory made;
    made.member = image_id(1);
    made.server = {.name = "liar",
                   .host = "127.0.0.1",
                   .port = port_,
                   .session = kSession,
                   .tokens = stage_tokens(made.member, kSession),
                   .identity = 77};
    return made;
  }
  [[nodiscard]] unsigned asked() const { return asked_; }

 private:
  void run() {
    while (!stop_) {
      UniqueFd fd(::accept(listening_.get(), nullptr, nullptr));
      if (!fd) {
        std::this_thread::sleep_for(1ms);
        continue;
      }
      const timeval patience{20, 0};  // the client is gone before that
      ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
      // An answer is two writes.
      wire::configure_connection(fd.get());
      StageClient client(std::move(fd));
      wire::Hello hello{};
      const wire::HelloReply reply{wire::kFrameMagic,
                                   static_cast<std::uint32_t>(wire::HelloStatus::kAccepted)};
      if (!client.wire().read(&hello, sizeof hello) || !client.wire().raw(&reply, sizeof reply)) continue;
      while (!stop_ && serve(client)) {
      }
    }
  }
  bool serve(StageClient& client) {
    wire::FrameHeader header{};
    if (!client.wire().read(&header, sizeof header)) return false;
    std::vector<std::byte> payload(header.payload_bytes);
    if (!payload.empty() && !client.wire().read(payload.data(), payload.size())) return false;
    ++asked_;
    if (header.type == static_cast<std::uint16_t>(FrameType::kPopularAsk)) {
      const std::uint64_t next = lie_ == Lie::kGoesBackward   ? (header.first_page == 0 ? 5 : 3)
                                 : lie_ == Lie::kEndlessNames ? header.first_page + 1
                                                              : 0;
      std::vector<wire::PopularName> names;
      const ContentHasher hasher(key_of(1));
      for (std::uint64_t page = 0; page < 10; ++page) {
        const ContentDigest digest = hasher(page_of(page + 100 * header.first_page));
        wire::PopularName name{{}, ~0U, 0};
        std::memcpy(name.name.data(), digest.data(), sizeof name.name);
        names.push_back(name);
      }
      return client.frame(
          wire::make_header(FrameType::kPopularNames, 0, {PageNumber{next}, names.size()}, header.tag),
          std::as_bytes(std::span(names)));
    }
    if (lie_ == Lie::kHalfAnAnswer) {
      wire::FrameHeader half = wire::make_header(FrameType::kPopularPages, 0, {PageNumber{1}, 1}, header.tag);
      wire::seal(half, page_of(0));
      (void)client.wire().raw(&half, sizeof half);
      return false;
    }
    const auto page = page_of(lie_ == Lie::kAnotherPage ? 4711 : 0);
    const std::uint64_t bits = lie_ == Lie::kBitsNotAskedFor ? std::uint64_t{1} << 40 : 1;
    return client.frame(wire::make_header(FrameType::kPopularPages, 0, {PageNumber{bits}, 1}, header.tag),
                        page);
  }

  const Lie lie_;
  UniqueFd listening_;
  std::uint16_t port_ = 0;
  std::atomic<bool> stop_{false};
  std::atomic<unsigned> asked_{0};
  std::thread thread_;
};

TEST(PageSpreadLies, AServerThatLiesIsLostAndTheShareHasNothingOfIt) {
  using Lie = LyingServer::Lie;
  for (const Lie lie : {Lie::kAnotherPage, Lie::kBitsNotAskedFor, Lie::kGoesBackward, Lie::kHalfAnAnswer}) {
    const LyingServer server(lie);
    const ShareFile file;
    SpreaderConfig config;
    config.share = open_share(file.path(), 8 << 20);
    config.interval = 10ms;
    PageSpreader spreader(std::move(config));
    spreader.set_directories({server.directory()});
    ASSERT_TRUE(wait_until([&] { return spreader.lost() == std::vector{true}; })) << static_cast<int>(lie);
    EXPECT_EQ(spreader.stats().fetched, 0u);
  }
}

TEST(PageSpreadLies, AServerWhoseListHasNoEndIsLostAndHoldsUpNobodyWhoWantsToGo) {
  const LyingServer server(LyingServer::Lie::kEndlessNames);
  const ShareFile file;
  SpreaderConfig config;
  config.share = open_share(file.path(), 8 << 20);
  PageSpreader spreader(std::move(config));
  spreader.set_directories({server.directory()});
  ASSERT_TRUE(wait_until([&] { return server.asked() > 50; }));
  const LyingServer another(LyingServer::Lie::kEndlessNames);
  SpreaderConfig other;
  const ShareFile other_file;
  other.share = open_share(other_file.path(), 8 << 20);
  {
    PageSpreader leaving(std::move(other));
    leaving.set_directories({another.directory()});
    ASSERT_TRUE(wait_until([&] { return another.asked() > 10; }));
  }
  EXPECT_TRUE(wait_until([&] { return spreader.lost() == std::vector{true}; }));
}

}  // namespace
}  // namespace memferry::test
