// A whole scatter in one process over real sockets: source, VMD servers and destination, a guest that touches its
// memory at the destination meanwhile, servers that end at chosen moments. Every byte is compared.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <atomic>
#include <random>
#include <set>
#include <thread>

#include "fault/pager.h"
#include "forwarder.h"
#include "scatter_rig.h"
#include "transfer/receiver.h"
#include "transfer/scatter.h"
#include "transfer/sender.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;

class ScatterGatherTest : public testing::Test {
 protected:
  static std::uint64_t page_size() { return static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)); }
  static constexpr unsigned kChannels = 2;

  void make(std::uint64_t pages, unsigned servers, unsigned replicas = 1) {
    pages_ = pages;
    source = Region::allocate(pages * page_size());
    target = Region::allocate(pages * page_size());
    const auto bytes = source->contiguous({PageNumber{0}, pages});
    std::mt19937_64 random(3);
    for (std::size_t i = 0; i < bytes.size(); i += 8) {
      const std::uint64_t word = i / page_size() % 32 == 5 ? 0 : random();
      std::memcpy(bytes.data() + i, &word, 8);
    }
    for (unsigned i = 0; i < servers; ++i) vmd.push_back(Vmd::start(256ULL << 20));
    for (unsigned i = 0; i < servers; ++i) {
      ASSERT_TRUE(give_image(*vmd[i].stage, image, {pages}, static_cast<std::uint8_t>(i), ports()));
    }
    replicas_ = replicas;
  }
  std::vector<std::uint16_t> ports() const {
    std::vector<std::uint16_t> all;
    for (const Vmd& each : vmd) all.push_back(each.listener->port());
    return all;
  }
  void receive(std::uint64_t bandwidth, std::uint64_t gather_limit = 0,
               std::chrono::milliseconds recover = 5s, bool sourceless = false) {
    ReceiverConfig config;
    config.regions = {target};
    config.migration = image;
    config.channels = kChannels;
    config.tokens = direct_tokens(kChannels);
    config.may_page = true;
    config.keep_page_hashes = true;
    config.recover_timeout = recover;
    config.loss_grace = 50ms;
    config.servers =
        server_addresses(image, kDestinationSession, destination_ports.empty() ? ports() : destination_ports);
    config.gather_limit = gather_limit;
    config.bandwidth = bandwidth;
    config.sourceless = sourceless;
    config.on_event = arrivals.callback();
    receiver = Receiver::create(std::move(config));
    listener = std::make_unique<Listener>(Listener::Config{"127.0.0.1", 0, {}});
    listener->add(receiver);
  }
  void send(bool direct = true, std::shared_ptr<DirtyTracker> tracker = nullptr) {
    SenderConfig config;
    config.regions = {source};
    config.trackers = {std::move(tracker)};
    config.host = "127.0.0.1";
    config.port = direct ? listener->port() : 0;
    config.migration = image;
    config.channels = kChannels;
    config.tokens = direct_tokens(kChannels);
    config.servers = server_addresses(image, kSourceSession, source_ports.empty() ? ports() : source_ports);
    config.replicas = replicas_;
    config.direct = direct;
    config.stall_timeout = stall_timeout;
    config.on_event = departures.callback();
    sender = std::make_unique<Sender>(std::move(config));
    sender->connect();
    departures.await(kConnected);
  }
  // All of it, with no destination: the source is gone.
  void park() {
    send(false);
    sender->queue_populated();
    sender->start_round(1);
    departures.await(kRoundDone);
    sender->close(true);
  }
  void into_postcopy() {
    sender->queue_populated();
    sender->switch_over();
    departures.await(kSwitched);
    arrivals.await(kSwitched);
  }
  void evict() {
    sender->start_push();
    departures.await(kEvicted);
    sender->close(true);
  }
  const std::byte* at(const Region& region, std::uint64_t page) const {
    return const_cast<Region&>(region).address(PageNumber{page}).pointer();
  }
  void expect_equal() {
    for (std::uint64_t page = 0; page < pages_; ++page) {
      ASSERT_EQ(std::memcmp(at(*source, page), at(*target, page), page_size()), 0) << "page " << page;
    }
    const Hash128 here = receiver->digest(0);
    const Hash128 there = sender->digest(0);
    EXPECT_EQ(here.high, there.high);
    EXPECT_EQ(here.low, there.low);
  }
  void TearDown() override {
    if (sender) sender->close(false);
    if (receiver) receiver->close();
    if (listener) listener->close();
    for (auto& each : vmd) each.end();
  }

  std::uint64_t pages_ = 0;
  unsigned replicas_ = 1;
  std::chrono::milliseconds stall_timeout = 60s;
  const ImageId image = own_image_id(0x42);
  std::shared_ptr<Region> source;
  std::shared_ptr<Region> target;
  std::vector<Vmd> vmd;
  std::vector<std::uint16_t> destination_ports;  // where they are not the servers' own
  std::vector<std::uint16_t> source_ports;
  EventBox departures;
  EventBox arrivals;
  std::unique_ptr<Sender> sender;
  std::shared_ptr<Receiver> receiver;
  std::unique_ptr<Listener> listener;
};

TEST_F(ScatterGatherTest, TheSourceLeavesLongBeforeASlowDestinationHasEverything) {
  make(8192, 2);
  receive(128 << 10, 128 << 10);
  send();
  into_postcopy();
  evict();
  // 32 MiB at 128 + 128 KiB/s there, as fast as it goes here.
  EXPECT_FALSE(arrivals.any(kComplete));
  EXPECT_GT(receiver->stats().pages_missing, pages_ / 4);
  receiver->set_bandwidth(0);
  receiver->set_gather_limit(0);
  arrivals.await(kComplete);
  expect_equal();
  const auto stats = receiver->stats();
  EXPECT_GT(stats.pages_gathered, 4096u);
  EXPECT_FALSE(arrivals.any(kPaused));
}

TEST_F(ScatterGatherTest, FaultsAreServedBeforeDuringAndAfterTheSource) {
  make(8192, 2);
  receive(4 << 20, 4 << 20);
  send();
  into_postcopy();
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> touched{0};
  std::atomic<std::uint64_t> wrong{0};
  std::thread guest([&] {
    std::mt19937 random(9);
    while (!stop) {
      const std::uint64_t page = random() % pages_;
      if (std::memcmp(at(*source, page), at(*target, page), page_size()) != 0) ++wrong;
      ++touched;
    }
  });
  evict();
  const std::uint64_t before = touched;
  receiver->set_gather_limit(0);
  arrivals.await(kComplete);
  stop = true;
  guest.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_GT(touched, before);
  expect_equal();
  EXPECT_GT(receiver->stats().faults.count, 0u);
}

// Everything has left, much of it to servers; the source is still there, and the destination gathers next to nothing.
class ScatterFaultsTest : public ScatterGatherTest {
 protected:
  void evict_and_stay() {
    receive(2 << 20, 1, 60s);
    send();
    into_postcopy();
    sender->start_push();
    departures.await(kEvicted);
    receiver->set_bandwidth(0);  // what says where pages are comes behind pages
    // Until that is known, and beyond what reading ahead is given without a limit at first.
    await_asked(200);
  }
  // Until servers were asked for so many pages more. Not in a hurry: one that is late once, as others on this machine may
  // make it, is left alone for a while, and pages must be left until then.
  void await_asked(std::uint64_t pages) {
    const std::uint64_t enough = receiver->stats().pages_gathered + pages;
    const auto limit = std::chrono::steady_clock::now() + 60s;
    while (receiver->stats().pages_gathered < enough && std::chrono::steady_clock::now() < limit) {
      touch(1);
      std::this_thread::sleep_for(1ms);
    }
    ASSERT_GE(receiver->stats().pages_gathered, enough) << "servers were not asked";
  }
  void touch(int times) {
    for (int i = 0; i < times; ++i) {
      const std::uint64_t page = random_() % pages_;
      ASSERT_EQ(std::memcmp(at(*source, page), at(*target, page), page_size()), 0) << "page " << page;
    }
  }
  void leave() {
    sender->close(true);
    receiver->set_gather_limit(0);
    arrivals.await(kComplete);
    expect_equal();
  }

 private:
  std::mt19937_64 random_{17};
};

TEST_F(ScatterFaultsTest, WhatAServerHasIsAskedForThereWhileTheSourceLives) {
  make(8192, 2);
  evict_and_stay();
  await_asked(100);
  leave();
}

TEST_F(ScatterFaultsTest, AServerThatIsSilentIsNoneToWaitForWhileTheSourceLives) {
  make(8192, 2);
  Forwarder network(vmd[0].listener->port());
  Forwarder other(vmd[1].listener->port());
  destination_ports = {network.port(), other.port()};
  evict_and_stay();
  // Nobody waits until the silence is noticed, which takes two seconds for each of the servers, and few until a server
  // is late. As many more as that are late for want of a CPU are late before the silence, too.
  struct Waits {
    unsigned late = 0;
    unsigned long_ones = 0;
  };
  const auto touch_many = [this] {
    Waits waits;
    for (int i = 0; i < 300; ++i) {
      const auto began = std::chrono::steady_clock::now();
      touch(1);
      const auto took = std::chrono::steady_clock::now() - began;
      if (took >= Pager::kTriedWithin) ++waits.late;
      if (took >= 1500ms) ++waits.long_ones;
    }
    return waits;
  };
  const Waits control = touch_many();
  const std::uint64_t sent_twice = sender->stats().pages_resent;
  network.silence(true);
  other.silence(true);
  const Waits silent = touch_many();
  EXPECT_GT(sender->stats().pages_resent, sent_twice);
  network.silence(false);
  other.silence(false);
  const Waits after = touch_many();
  // Nearly all 300, where each is tried at a server first.
  EXPECT_LE(silent.late, std::max(control.late, after.late) + 150);
  EXPECT_LE(silent.long_ones, std::max(control.long_ones, after.long_ones) + 1)
      << "one for each server, where they are waited for";
  leave();
}

TEST_F(ScatterGatherTest, ASourceThatIsKilledAfterEvictionLosesNothing) {
  make(4096, 2);
  receive(4 << 20, 8 << 20);
  send();
  into_postcopy();
  sender->start_push();
  departures.await(kEvicted);
  sender->close(false);  // as if killed: no goodbye
  arrivals.await(kComplete);
  expect_equal();
}

TEST_F(ScatterGatherTest, WithReplicasALostServerLosesNothing) {
  for (const unsigned victim : {0u, 1u, 2u}) {
    SCOPED_TRACE(victim);
    make(4096, 3, 2);
    receive(2 << 20, 8 << 20);
    send();
    into_postcopy();
    evict();
    vmd[victim].end();
    arrivals.await(kComplete);
    expect_equal();
    TearDown();
    vmd.clear();
  }
}

TEST_F(ScatterGatherTest, AServerThatEndsInTheMiddleOfTheScatterLosesNothing) {
  for (const unsigned replicas : {1u, 2u}) {
    SCOPED_TRACE(replicas);
    make(16384, 3, replicas);
    receive(4 << 20, 0);
    stall_timeout = 2s;
    send();
    into_postcopy();
    // Slowly, so that it is in the middle whenever this thread gets to end it.
    sender->set_bandwidth(8 << 20);
    sender->start_push();
    for (int i = 0; i < 20'000 && sender->stats().servers[1].pages < 200; ++i)
      std::this_thread::sleep_for(1ms);
    ASSERT_GE(sender->stats().servers[1].pages, 200u);
    vmd[1].end();
    sender->set_bandwidth(0);
    departures.await(kEvicted);
    sender->close(true);
    arrivals.await(kComplete);
    std::string account = "missing " + std::to_string(receiver->stats().pages_missing);
    for (const auto& each : receiver->stats().servers)
      account += "; " + std::to_string(each.pages) + " " + each.failed;
    for (const auto& each : sender->stats().servers)
      account += "; source: " + std::to_string(each.pages) + " " + each.failed;
    SCOPED_TRACE(account);
    ASSERT_EQ(receiver->stats().pages_missing, 0u);
    expect_equal();
    TearDown();
    vmd.clear();
  }
}

// What goes out while one of two is away for a moment waits for it.
TEST_F(ScatterGatherTest, WithReplicasACutServerIsWaitedForAndTheOtherOneMayBeLost) {
  make(16384, 2, 2);
  Forwarder network(vmd[1].listener->port());
  source_ports = {vmd[0].listener->port(), network.port()};
  receive(2 << 20, 8 << 20);
  stall_timeout = 20s;
  send();
  into_postcopy();
  // Slowly, so that it is in the middle whenever this thread gets to cut it.
  sender->set_bandwidth(8 << 20);
  sender->start_push();
  for (int i = 0; i < 20'000 && sender->stats().servers[1].pages < 200; ++i) std::this_thread::sleep_for(1ms);
  ASSERT_GE(sender->stats().servers[1].pages, 200u);
  network.refuse();
  sender->set_bandwidth(0);
  std::this_thread::sleep_for(1s);
  EXPECT_FALSE(departures.any(kEvicted));
  network.welcome(vmd[1].listener->port());
  departures.await(kEvicted);
  for (const auto& each : sender->stats().servers) EXPECT_EQ(each.failed, "");
  sender->close(true);
  vmd[0].end();
  arrivals.await(kComplete);
  expect_equal();
}

TEST_F(ScatterGatherTest, WithoutAnyServerThatHasTheMapTheDestinationFindsEverything) {
  constexpr unsigned kServers = 6;
  make(16384, kServers);
  receive(4 << 20, 1 << 20);
  stall_timeout = 2s;
  send();
  into_postcopy();
  sender->set_bandwidth(8 << 20);
  sender->start_push();
  const auto held = [&] {
    const auto servers = sender->stats().servers;
    return std::all_of(servers.begin(), servers.end(), [](const auto& each) { return each.pages >= 100; });
  };
  for (int i = 0; i < 20'000 && !held(); ++i) std::this_thread::sleep_for(1ms);
  ASSERT_TRUE(held());
  for (unsigned i = 0; i < Scatter::kIndexServers; ++i) vmd[i].end();
  sender->set_bandwidth(0);
  departures.await(kEvicted);
  const auto stats = sender->stats();
  for (unsigned i = 0; i < kServers; ++i)
    EXPECT_EQ(stats.servers[i].failed.empty(), i >= Scatter::kIndexServers);
  sender->close(false);  // as if killed: what the destination has not been told nobody tells it any more
  EXPECT_GT(receiver->stats().pages_missing, 0u);
  receiver->set_gather_limit(0);
  arrivals.await(kComplete);
  expect_equal();
}

TEST_F(ScatterGatherTest, ALostServerWithoutReplicasLosesItsPagesAndNoOthers) {
  make(4096, 2);
  receive(1 << 20, 1 << 20, 3s);
  send();
  into_postcopy();
  evict();
  vmd[1].end();
  receiver->set_gather_limit(0);
  const EngineEvent lost = arrivals.await(kLost);
  EXPECT_NE(lost.message.find("s1"), std::string::npos) << lost.message;
  EXPECT_EQ(lost.message.find("s0"), std::string::npos) << lost.message;
  std::set<std::uint64_t> gone;
  for (const RegionRun& each : lost.lost) {
    for (std::uint64_t i = 0; i < each.run.count; ++i) gone.insert(each.run.first.value + i);
  }
  ASSERT_FALSE(gone.empty());
  ASSERT_LT(gone.size(), pages_);
  receiver->acknowledge_loss();
  for (int i = 0; i < 20'000 && receiver->stats().pages_missing > gone.size(); ++i)
    std::this_thread::sleep_for(1ms);
  EXPECT_EQ(receiver->stats().pages_missing, gone.size());
  for (std::uint64_t page = 0; page < pages_; ++page) {
    if (gone.count(page) > 0) continue;
    ASSERT_EQ(std::memcmp(at(*source, page), at(*target, page), page_size()), 0) << "page " << page;
  }
  // A lost page fails to be read: the kernel says so without dying.
  UniqueFd file(::memfd_create("probe", MFD_CLOEXEC));
  EXPECT_EQ(::pwrite(file.get(), at(*target, *gone.begin()), page_size(), 0), -1);
  EXPECT_EQ(errno, EFAULT);
}

TEST_F(ScatterGatherTest, WhatWasParkedIsGatheredWithoutASource) {
  make(4096, 2);
  park();
  for (auto& each : vmd) EXPECT_EQ(each.stage->whole(image, std::array<std::uint64_t, 1>{pages_}), true);
  receive(0, 16 << 20, 5s, true);
  arrivals.await(kSwitched);
  EXPECT_EQ(std::memcmp(at(*source, 3000), at(*target, 3000), page_size()), 0);
  arrivals.await(kComplete);
  expect_equal();
}

// Each cut takes a token of its table, which is bounded; a gather over a bad link may last for hours.
TEST_F(ScatterGatherTest, AGatherOutlivesMoreCutsThanItsTableHasTokens) {
  make(4096, 1);
  park();
  Forwarder network(vmd[0].listener->port());
  destination_ports = {network.port()};
  receive(0, 8 << 20, 2s, true);
  const auto gathered = [&] { return receiver->stats().pages_gathered; };
  const std::size_t attempts =
      server_addresses(image, kDestinationSession, ports())[0].tokens.size() / wire::kStageRoles;
  for (std::uint64_t cuts = 0, came = 0; cuts < 2 * attempts; ++cuts) {
    for (int i = 0; i < 10'000 && gathered() == came; ++i) std::this_thread::sleep_for(1ms);
    ASSERT_NE(gathered(), came) << "after " << cuts << " cuts";
    came = gathered();
    network.cut();
  }
  receiver->set_gather_limit(0);
  arrivals.await(kComplete);
  EXPECT_EQ(receiver->stats().pages_lost, 0U);
  expect_equal();
}

// A server that its source gave up knows where pages were until then, and may be there when a destination asks. What it
// tells first is no reason to think that nobody has them.
class StaleMapTest : public ScatterGatherTest {
 protected:
  // As its source: it tells of the image's pages, all but zeros, what `tell` says to it.
  template <typename Tell>
  void at_server(unsigned ordinal, const Tell& tell) {
    StageClient client(dial_loopback(vmd[ordinal].listener->port()));
    const wire::Hello hello = stage_hello(image, kObserverSession, wire::StageRole::kScatter, 0);
    wire::HelloReply reply{};
    ASSERT_TRUE(client.wire().raw(&hello, sizeof hello) && client.wire().read(&reply, sizeof reply));
    ASSERT_EQ(reply.status, static_cast<std::uint32_t>(wire::HelloStatus::kAccepted));
    const wire::Holders it{static_cast<std::uint8_t>(ordinal), wire::Holders::kNobody};
    for (std::uint64_t page = 0; page < pages_; ++page) {
      if (page % 32 == 5) continue;
      ASSERT_TRUE(tell(client, page, source->contiguous({PageNumber{page}, 1}), it));
    }
    ASSERT_TRUE(client.barrier(1).acknowledged);
  }
  // It tells that it has everything, and has what it had.
  void claims(unsigned ordinal) {
    at_server(ordinal, [&](StageClient& client, std::uint64_t page, auto bytes, wire::Holders it) {
      std::uint64_t hash = 0;
      hash_pages(bytes, page_size(), &hash);
      return client.map(0, page, std::span(&hash, 1), it);
    });
  }
  // And has it.
  void holds(unsigned ordinal) {
    at_server(ordinal, [](StageClient& client, std::uint64_t page, auto bytes, wire::Holders it) {
      return client.pages(0, page, bytes, it);
    });
  }
  // The last server's map comes after the others' ones.
  void gather_all(std::chrono::milliseconds recover) {
    Forwarder network(vmd.back().listener->port());
    network.silence(true);
    destination_ports = ports();
    destination_ports.back() = network.port();
    receive(0, 1, recover, true);
    arrivals.await(kSwitched);
    const auto limit = EventBox::Clock::now() + 20s;
    while (receiver->stats().pages_zero < pages_ / 32 && EventBox::Clock::now() < limit)
      std::this_thread::sleep_for(1ms);
    std::this_thread::sleep_for(200ms);
    network.silence(false);
    std::this_thread::sleep_for(300ms);
    receiver->set_gather_limit(0);
    const auto end = arrivals.take({kComplete, kLost, kFailed}, EventBox::Clock::now() + 30s);
    ASSERT_TRUE(end);
    ASSERT_EQ(end->kind, kComplete) << end->message;
    EXPECT_GT(receiver->stats().servers.back().pages, 0U);
    expect_equal();
    receiver->close();
  }
};

TEST_F(StaleMapTest, HidesNothingFromOneThatDeniesWhatItTells) {
  make(4096, 2);
  park();
  claims(0);
  gather_all(30s);
}

// More of them than places are kept for a page.
TEST_F(StaleMapTest, HidesNothingWhereSeveralAreWrong) {
  make(4096, 4);
  park();
  holds(3);
  for (const unsigned ordinal : {0U, 1U, 2U}) claims(ordinal);
  gather_all(30s);
}

TEST_F(StaleMapTest, HidesNothingWhereItTellsOfOneThatIsGone) {
  make(4096, 3);
  park();
  holds(2);
  vmd[1].end();
  gather_all(30s);
}

// One that walks through it all, one that touches here and there, and servers that go away meanwhile: what was on its way
// from them, and waited for, comes from elsewhere.
TEST_F(ScatterGatherTest, AWalkGoesOnWhenWhatWasOnItsWayDoesNotCome) {
  make(8192, 2, 2);
  park();
  Forwarder network(vmd[0].listener->port());
  network.silence_after(Forwarder::kDown, (2 << 20) + 1234);
  destination_ports = {network.port(), vmd[1].listener->port()};
  receive(0, 0, 60s, true);
  arrivals.await(kSwitched);
  std::atomic<std::uint64_t> wrong{0};
  std::vector<std::thread> guest;
  guest.emplace_back([&] {
    for (std::uint64_t page = 0; page < pages_; ++page)
      wrong += std::memcmp(at(*source, page), at(*target, page), page_size()) != 0 ? 1 : 0;
  });
  guest.emplace_back([&] {
    std::mt19937_64 random(8);
    for (int i = 0; i < 500; ++i) {
      const std::uint64_t page = random() % pages_;
      wrong += std::memcmp(at(*source, page), at(*target, page), page_size()) != 0 ? 1 : 0;
    }
  });
  for (std::thread& thread : guest) thread.join();
  EXPECT_EQ(wrong, 0U);
  arrivals.await(kComplete);
  expect_equal();
}

// In the middle of a frame, so that nobody waits for its beginning: the other copies are gathered all the same.
TEST_F(ScatterGatherTest, AServerThatFallsSilentInTheMiddleOfAPageIsRoutedAround) {
  make(4096, 2, 2);
  park();
  Forwarder network(vmd[0].listener->port());
  network.silence_after(Forwarder::kDown, (1 << 20) + 1234);
  destination_ports = {network.port(), vmd[1].listener->port()};
  // Far longer than the test waits for anything: it is not for being given up that the others are asked. So slowly
  // that it falls silent long before the end.
  receive(0, 2 << 20, 60s, true);
  arrivals.await(kSwitched);
  for (int i = 0; i < 20'000 && !network.silent(); ++i) std::this_thread::sleep_for(1ms);
  EXPECT_TRUE(network.silent());
  receiver->set_gather_limit(0);
  arrivals.await(kComplete);
  expect_equal();
}

// The rounds of pre-copy through servers: an older version of a page must never be the one that counts.
TEST_F(ScatterGatherTest, RoundsThroughServersEndWithTheNewestVersionOfEveryPage) {
  const std::uint64_t pages = 4096;
  make(pages, 2);
  receive(2 << 20, 24 << 20);  // until servers have pages, whatever the speed of this machine
  const std::shared_ptr<DirtyTracker> tracker = make_tracker(TrackerKind::kHashDiff, source);
  tracker->arm();
  send(true, tracker);
  std::atomic<bool> stop{false};
  std::thread guest([&] {
    std::mt19937_64 random(21);
    while (!stop) {
      const std::uint64_t page = random() % (pages_ / 4);
      const std::uint64_t word = random();
      std::memcpy(source->address(PageNumber{page}).pointer() + 8 * (random() % 512), &word, 8);
      std::this_thread::sleep_for(20us);
    }
  });
  sender->queue_populated();
  for (std::uint64_t tag = 1; tag <= 4; ++tag) {
    sender->start_round(tag);
    if (tag == 1) {
      const auto by = std::chrono::steady_clock::now() + kPatience;
      while (receiver->stats().pages_gathered == 0 && std::chrono::steady_clock::now() < by)
        std::this_thread::sleep_for(1ms);
      EXPECT_GT(receiver->stats().pages_gathered, 0u);
      receiver->set_bandwidth(24 << 20);
    }
    departures.await(kRoundDone);
    sender->queue_dirty();
  }
  stop = true;
  guest.join();
  sender->queue_dirty();
  sender->start_round(9);
  EXPECT_EQ(departures.await(kRoundDone).suspects, 0u);
  receiver->await_filled();
  arrivals.await(kFilled);
  ASSERT_TRUE(receiver->seal());
  expect_equal();
}

TEST_F(ScatterGatherTest, ASwitchAfterRoundsThroughServersDropsWhatIsOutOfDate) {
  const std::uint64_t pages = 4096;
  make(pages, 2);
  receive(8 << 20, 8 << 20);
  const std::shared_ptr<DirtyTracker> tracker = make_tracker(TrackerKind::kHashDiff, source);
  tracker->arm();
  send(true, tracker);
  std::mt19937_64 random(22);
  const auto dirty = [&](std::uint64_t count) {
    for (std::uint64_t i = 0; i < count; ++i) {
      const std::uint64_t word = random();
      std::memcpy(source->address(PageNumber{random() % pages_}).pointer(), &word, 8);
    }
  };
  sender->queue_populated();
  sender->start_round(1);
  departures.await(kRoundDone);
  dirty(700);
  sender->queue_dirty();
  sender->start_round(2);
  departures.await(kRoundDone);
  dirty(700);
  sender->discard_dirty(3);
  departures.await(kRoundDone);
  dirty(300);
  sender->switch_over();
  departures.await(kSwitched);
  arrivals.await(kSwitched);
  evict();
  arrivals.await(kComplete);
  expect_equal();
}

TEST_F(ScatterGatherTest, ClosingTheDestinationInTheMiddleIsPrompt) {
  make(8192, 2);
  receive(1 << 20, 1 << 20);
  send();
  into_postcopy();
  evict();
  const auto start = std::chrono::steady_clock::now();
  receiver->close();
  EXPECT_LT(std::chrono::steady_clock::now() - start, 10s);
}

}  // namespace
}  // namespace memferry::test
