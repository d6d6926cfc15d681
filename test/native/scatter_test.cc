// The source of a scatter against scripted servers and a scripted destination.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <optional>
#include <random>

#include "scatter_fixture.h"
#include "track/dirty_tracker.h"
#include "transfer/lane.h"
#include "transfer/whereabouts.h"

namespace memferry::sender_test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;
using wire::FrameType;
using wire::Holders;

TEST_F(ScatterTest, EveryPageIsSomewhereAndEveryServerKnowsWhere) {
  make({3000, 1, 65}, 2);
  into_postcopy(config());
  sender->start_push();
  events.expect(kEvicted);
  expect_evicted();
  EXPECT_EQ(sender->stats().pages_direct + pages_at_servers(), all_pages());
  EXPECT_EQ(sender->stats().pages_pending, 0u);
}

TEST_F(ScatterTest, ADestinationThatTakesNothingDoesNotHoldUpEviction) {
  make({4000}, 2);
  block_direct();
  into_postcopy(config());
  const auto acknowledged = [&](unsigned server) {
    return [&, server] { return sender->stats().servers[server].pages > 0; };
  };
  // By itself: it would take all of it while this thread is late.
  stages[0]->stall_at = 1000;
  start_push_with(0, acknowledged(0));
  {
    const std::lock_guard lock(stages[0]->mutex);
    stages[0]->stall_at = ~std::size_t{0};
  }
  start_with(1, acknowledged(1), [] {});
  events.expect(kEvicted);
  expect_evicted();
  const auto stats = sender->stats();
  EXPECT_EQ(pages_at_servers(), all_pages());
  EXPECT_GT(stats.servers[0].pages, 0u);
  EXPECT_GT(stats.servers[1].pages, 0u);
  // Only what the direct way had in hand went twice, and what a server was late to acknowledge: every sixteenth page of
  // that is of zeros, and no more than a header.
  const std::uint64_t to_servers = stats.servers[0].bytes + stats.servers[1].bytes;
  const std::uint64_t once = all_pages() / 16 * 15 * page_size();
  ASSERT_GE(to_servers, once);
  EXPECT_LE(stats.pages_resent * page_size(),
            2 * (Lane::kFirstWindow + wire::kRunBytes) + (to_servers - once) * 16 / 15);
}

TEST_F(ScatterTest, TheDestinationIsToldOfEveryScatteredPage) {
  make({2000}, 2);
  peer->on_frame = [](const SeenFrame& frame) {
    // Slow, but it takes what comes.
    if (frame.type() == FrameType::kPages) std::this_thread::sleep_for(20ms);
    return true;
  };
  into_postcopy(config());
  sender->start_push();
  events.expect(kEvicted);
  const std::uint64_t scattered = pages_at_servers();
  ASSERT_GT(scattered, 0u);
  ASSERT_TRUE(peer->wait_for([&] {
    std::set<std::uint64_t> told;
    for (const SeenFrame& frame : peer->seen) {
      if (frame.type() != FrameType::kMap) continue;
      for (std::uint64_t i = 0; i < frame.header.page_count; ++i) told.insert(frame.header.first_page + i);
    }
    return told.size() >= scattered;
  }));
  expect_evicted();
}

TEST_F(ScatterTest, AFastDestinationGetsEverythingDirectly) {
  make({3000}, 2);
  SenderConfig with = config();
  with.stall_timeout = 60s;
  into_postcopy(std::move(with));
  // Else how much depends on who gets a CPU. Meanwhile the servers have no more than their windows.
  for (const auto& stage : stages) stage->stall(true);
  sender->start_push();
  const std::uint64_t enough = all_pages() / 2;
  for (int i = 0; i < 20'000 && sender->stats().pages_direct <= enough; ++i) std::this_thread::sleep_for(1ms);
  EXPECT_GT(sender->stats().pages_direct, enough);
  for (const auto& stage : stages) stage->stall(false);
  events.expect(kEvicted);
  expect_evicted();
}

// A server answers when its replica has, and ends a connection of too many barriers. What others acknowledge meanwhile
// is told it a record at a time, each behind a barrier.
TEST_F(ScatterTest, AServerThatHesitatesIsAskedForFewAnswersAtATime) {
  make({4000}, 1);
  block_direct();
  stages[0]->hold_acks(true);
  SenderConfig with = config();
  with.stall_timeout = 60s;
  into_postcopy(std::move(with));
  sender->start_push();
  const auto barriers = [&] { return stages[0]->held_acks.size(); };
  ASSERT_TRUE(stages[0]->wait_for([&] { return barriers() > 0; }));
  // From the end: what the ways have not come to.
  std::uint64_t page = 4000;
  for (int more = 0; more < 20 && page > 0;) {
    --page;
    peer->request_fault(0, page);
    ASSERT_TRUE(peer->wait_for([&] {
      return std::any_of(peer->seen.rbegin(), peer->seen.rend(), [&](const SeenFrame& frame) {
        return frame.channel == kChannels && frame.header.first_page == page;
      });
    }));
    // Its barrier comes when no other fault has for a moment.
    std::this_thread::sleep_for(8ms);
    const std::lock_guard lock(stages[0]->mutex);
    if (barriers() >= Lane::kMostBatches) ++more;
  }
  {
    const std::lock_guard lock(stages[0]->mutex);
    EXPECT_EQ(barriers(), Lane::kMostBatches);
  }
  stages[0]->hold_acks(false);
  events.expect(kEvicted);
  expect_evicted();
  const std::lock_guard lock(stages[0]->mutex);
  EXPECT_EQ(stages[0]->hellos, 1u);
}

TEST_F(ScatterTest, AServerThatStopsReadingIsGivenUpAndItsPagesGoAgain) {
  make({4000}, 2);
  block_direct();
  stages[1]->stall_at = 100;
  SenderConfig with = config();
  with.stall_timeout = 2500ms;
  into_postcopy(std::move(with));
  start_push_with(1, [&] { return has(1, 100); });
  events.expect(kEvicted);
  expect_evicted({1});
  EXPECT_NE(sender->stats().servers[1].failed, "");
  EXPECT_EQ(sender->stats().servers[0].failed, "");
}

TEST_F(ScatterTest, AServerThatAnswersNoBarrierIsGivenUp) {
  make({1000}, 2);
  block_direct();
  stages[0]->forget_acks = true;
  SenderConfig with = config();
  with.stall_timeout = 2500ms;
  into_postcopy(std::move(with));
  sender->start_push();
  events.expect(kEvicted);
  expect_evicted({0});
}

TEST_F(ScatterTest, AServerThatIsCutIsDialledAgainAndKeepsWhatItHas) {
  make({6000}, 2);
  block_direct();
  stages[0]->cut_at = 200;
  into_postcopy(config());
  start_push_with(0, [&] { return has(0, 200); });
  events.expect(kEvicted);
  expect_evicted();
  const std::lock_guard lock(stages[0]->mutex);
  EXPECT_GE(stages[0]->hellos, 2u);
}

TEST_F(ScatterTest, AServerThatWasRestartedIsGivenUpAtOnce) {
  make({6000}, 2);
  block_direct();
  stages[0]->cut_at = 200;
  stages[0]->lost_when_cut = true;
  into_postcopy(config());
  start_push_with(0, [&] { return has(0, 200); });
  events.expect(kEvicted);
  expect_evicted({0});
  EXPECT_NE(sender->stats().servers[0].failed.find("lost the image"), std::string::npos);
}

TEST_F(ScatterTest, AFullServerIsLeftAloneAndTheOthersTakeTheRest) {
  make({3000}, 2);
  block_direct();
  stages[0]->room = 300;
  into_postcopy(config());
  sender->start_push();
  events.expect(kEvicted);
  expect_evicted();
  const std::lock_guard lock(stages[0]->mutex);
  EXPECT_LE(stages[0]->pages.size(), 300u);
}

// It would get the same pages again and again, and answer each time.
TEST_F(ScatterTest, AServerThatFindsNothingIntactIsGivenUp) {
  make({3000}, 2);
  block_direct();
  stages[0]->tears = true;
  into_postcopy(config());
  start_push_with(0, [&] { return !sender->stats().servers[0].failed.empty(); });
  events.expect(kEvicted);
  expect_evicted({0});
  EXPECT_NE(sender->stats().servers[0].failed.find("intact"), std::string::npos);
}

TEST_F(ScatterTest, WithAllServersDeadTheDestinationGetsTheRest) {
  make({4000}, 2);
  block_direct();
  for (auto& stage : stages) {
    stage->cut_at = 100;
    stage->lost_when_cut = true;
  }
  into_postcopy(config());
  sender->start_push();
  for (auto& stage : stages) ASSERT_TRUE(stage->wait_for([&] { return stage->lost.load(); }));
  open_direct();
  events.expect(kEvicted);
  const std::lock_guard lock(peer->mutex);
  for (std::uint64_t page = 0; page < all_pages(); ++page) {
    ASSERT_TRUE(peer->have[0][page]) << page;
    ASSERT_EQ(std::memcmp(peer->memory[0].data() + page * page_size(), oracle[0].data() + page * page_size(),
                          page_size()),
              0);
  }
}

TEST_F(ScatterTest, TwoReplicasNameTwoServers) {
  make({2000}, 3);
  block_direct();
  SenderConfig with = config();
  with.replicas = 2;
  into_postcopy(std::move(with));
  sender->start_push();
  events.expect(kEvicted);
  expect_evicted({}, 2);
}

TEST_F(ScatterTest, ACutDirectConnectionIsTakenUpWhileTheServersGoOn) {
  make({20000}, 2);
  block_direct();
  into_postcopy(config());
  start_push_with(0, [&] { return has(0, 101); });
  peer->cut();
  open_direct();
  peer->stop();
  // It never comes back: eviction does not need it.
  EngineEvent event = events.next();
  while (event.kind == kPaused) event = events.next();
  EXPECT_EQ(static_cast<int>(event.kind), static_cast<int>(kEvicted)) << event.code << event.message;
}

TEST_F(ScatterTest, FaultsAreAnsweredInTheMiddleOfAScatter) {
  make({8000}, 2);
  into_postcopy(config());
  sender->start_push();
  for (std::uint64_t page = 0; page < 8000; page += 500) {
    peer->request_fault(0, page);
    ASSERT_TRUE(peer->wait_for([&] {
      return std::any_of(peer->seen.begin(), peer->seen.end(), [&](const SeenFrame& frame) {
        return frame.channel == kChannels && (frame.header.flags & wire::kFlagAnswer) != 0 &&
               frame.header.first_page == page;
      });
    }));
  }
  events.expect(kEvicted);
  expect_evicted();
}

// Each server has acknowledged its part; whether it keeps that beyond its lease is asked elsewhere.
TEST_F(ScatterTest, WhatAServerDoesNotKeepGoesAgainBeforeTheEviction) {
  for (const bool release : {false, true}) {
    SCOPED_TRACE(release ? "memory is given back as pages leave" : "memory stays");
    make({3000}, 2);
    block_direct();
    SenderConfig with = config();
    with.release_as_evicted = release;
    into_postcopy(std::move(with));
    sender->hold_eviction(true);
    start_push_with(1, [&] { return sender->stats().servers[1].pages > 0; });
    for (int i = 0; i < 20'000 && pages_at_servers() < all_pages(); ++i) std::this_thread::sleep_for(1ms);
    ASSERT_EQ(pages_at_servers(), all_pages());
    ASSERT_GT(sender->stats().servers[1].pages, 0u);
    std::this_thread::sleep_for(300ms);  // several looks of the watcher's
    EXPECT_TRUE(events.empty()) << "evicted, and held";
    sender->give_up_server(1, "it does not keep it");
    sender->hold_eviction(false);
    events.expect(kEvicted);
    expect_evicted({1});
    EXPECT_EQ(sender->stats().servers[1].failed, "it does not keep it");
    EXPECT_EQ(sender->stats().servers[0].pages, all_pages());
    TearDown();
    regions.clear();
    oracle.clear();
    stages.clear();
    direct_open = false;
  }
}

TEST_F(ScatterTest, AHeldEvictionComesOnceEverythingIsKept) {
  make({300}, 2);
  into_postcopy(config());
  sender->hold_eviction(true);
  sender->start_push();
  for (int i = 0; i < 20'000 && sender->stats().pages_direct + pages_at_servers() < all_pages(); ++i)
    std::this_thread::sleep_for(1ms);
  EXPECT_TRUE(events.empty());
  sender->hold_eviction(false);
  events.expect(kEvicted);
  expect_evicted();
  EXPECT_THROW(sender->give_up_server(2, "no such"), std::invalid_argument);
}

TEST_F(ScatterTest, MemoryThatIsReleasedIsNeverServedAsZeros) {
  make({3000}, 2);
  block_direct();
  SenderConfig with = config();
  with.release_as_evicted = true;
  into_postcopy(std::move(with));
  sender->start_push();
  events.expect(kEvicted);
  expect_evicted();
  const Hash128 digest = sender->digest(0);
  std::vector<std::uint64_t> hashes(3000);
  hash_pages(oracle[0], page_size(), hashes.data());
  const Hash128 expected = xxh3_128(std::as_bytes(std::span(hashes)));
  EXPECT_EQ(digest.high, expected.high);
  EXPECT_EQ(digest.low, expected.low);
  // The watcher gives it back in its own time; until then pages are answered from memory, and so are to the end those that
  // went out twice: on a busy machine that may be most of them.
  const auto all = regions[0]->contiguous(run_of(0, 3000));
  std::vector<unsigned char> resident(3000);
  std::optional<std::uint64_t> given_back;
  for (int tries = 0; tries < 1000 && !given_back; ++tries) {
    std::this_thread::sleep_for(10ms);
    ASSERT_EQ(::mincore(all.data(), all.size(), resident.data()), 0);
    for (std::uint64_t page = 0; page < 3000 && !given_back; ++page) {
      if (page % 16 != 3 && (resident[page] & 1) == 0) given_back = page;
    }
  }
  ASSERT_TRUE(given_back);
  std::vector<std::uint64_t> asked = {*given_back};
  for (std::uint64_t page = 0; page < 3000; page += 100) asked.push_back(page);
  std::uint64_t elsewhere = 0;
  for (const std::uint64_t page : asked) {
    peer->request_fault(0, page);
    ASSERT_TRUE(peer->wait_for([&] {
      return std::any_of(peer->seen.begin(), peer->seen.end(), [&](const SeenFrame& frame) {
        return frame.channel == kChannels && frame.header.first_page == page &&
               frame.type() != FrameType::kBarrier;
      });
    }));
  }
  const std::lock_guard lock(peer->mutex);
  for (const SeenFrame& frame : peer->seen) {
    if (frame.channel != kChannels) continue;
    if (frame.type() == FrameType::kElsewhere) ++elsewhere;
    if (frame.type() == FrameType::kZero) {
      EXPECT_EQ(frame.header.first_page % 16, 3u) << "a released page as zeros";
    }
  }
  EXPECT_GT(elsewhere, 0u);
}

TEST_F(ScatterTest, WithoutADestinationARoundPutsEverythingAtTheServers) {
  make({2000, 5}, 2);
  SenderConfig with = config();
  with.direct = false;
  sender = std::make_unique<Sender>(std::move(with));
  sender->connect();
  events.expect(kConnected);
  sender->queue_populated();
  sender->start_round(5);
  EXPECT_EQ(events.expect(kRoundDone).tag, 5u);
  expect_evicted();
  EXPECT_EQ(pages_at_servers(), all_pages());
}

// What a server had not acknowledged may still be on its way from there to a replica.
TEST_F(ScatterTest, WhatIsTakenBackFromAServerGoesBehindTheEndOfItsChain) {
  for (const bool cut : {true, false}) {
    SCOPED_TRACE(cut ? "cut" : "stands still");
    make({8000}, 2);
    SenderConfig with = config();
    with.direct = false;
    with.replicas = 2;
    // Received, and not acknowledged.
    stages[1]->forget_acks = true;
    (cut ? stages[1]->cut_at : stages[1]->stall_at) = 100;
    with.stall_timeout = 2500ms;
    sender = std::make_unique<Sender>(std::move(with));
    sender->connect();
    events.expect(kConnected);
    sender->queue_populated();
    start_with(
        1, [&] { return has(1, 100); }, [&] { sender->start_round(5); });
    EXPECT_EQ(events.expect(kRoundDone).tag, 5u);
    {
      const std::scoped_lock lock(stages[0]->mutex, stages[1]->mutex);
      std::size_t both = 0;
      for (const auto& [key, page] : stages[1]->pages) {
        const auto here = stages[0]->pages.find(key);
        if (here == stages[0]->pages.end()) continue;
        ++both;
        const auto over = here->second.chains_over.find(1);
        ASSERT_NE(over, here->second.chains_over.end()) << "page " << key.second;
        EXPECT_GE(over->second, 7U << 16U);
      }
      EXPECT_GT(both, 0U);
      EXPECT_EQ(stages[0]->chains_over.count(0), 0U);
    }
    sender.reset();
    stages.clear();
    regions.clear();
    oracle.clear();
  }
}

// Holds up one thread of the sender while that lays out the first page that it is to send.
class HoldUp final : public DirtyTracker {
 public:
  explicit HoldUp(std::string thread) : thread_(std::move(thread)) {}
  std::string_view name() const override { return "hold-up"; }
  void arm() override {}
  std::uint64_t collect(AtomicBitmap&) override { return 0; }
  void disarm() override {}
  bool wants_sent() const override { return true; }
  void sent(PageNumber, std::uint64_t) override {
    std::array<char, 16> own{};
    ::pthread_getname_np(::pthread_self(), own.data(), own.size());
    if (thread_ != own.data()) return;
    std::unique_lock lock(mutex_);
    held_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] { return let_go_; });
  }
  bool wait_until_held() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, 20s, [&] { return held_; });
  }
  void let_go() {
    const std::lock_guard lock(mutex_);
    let_go_ = true;
    changed_.notify_all();
  }

 private:
  const std::string thread_;
  std::mutex mutex_;  // guards the rest
  std::condition_variable changed_;
  bool held_ = false;
  bool let_go_ = false;
};

TEST_F(ScatterTest, ARoundDoesNotEndWhileAThreadOfAGivenUpServerHasPagesInHand) {
  make({20000}, 2);
  SenderConfig with = config();
  with.direct = false;
  const auto hold_up = std::make_shared<HoldUp>("mf-scatter-1");
  with.trackers = {hold_up};
  sender = std::make_unique<Sender>(std::move(with));
  sender->connect();
  events.expect(kConnected);
  sender->queue_populated();
  stages[0]->stall(true);  // or it could have everything first
  sender->start_round(5);
  const struct LetGo {
    HoldUp& hold_up;
    ~LetGo() { hold_up.let_go(); }
  } let_go{*hold_up};  // or the sender could not end
  ASSERT_TRUE(hold_up->wait_until_held());
  stages[0]->stall(false);
  stages[1]->say_garbage();
  const auto given_up = [&] { return !sender->stats().servers[1].failed.empty(); };
  for (int i = 0; i < 1000 && !given_up(); ++i) std::this_thread::sleep_for(10ms);
  ASSERT_TRUE(given_up());
  // All that the other server can have.
  const auto some = [&] { return sender->stats().servers[0].pages > 0; };
  for (int i = 0; i < 2000 && !some(); ++i) std::this_thread::sleep_for(10ms);
  std::uint64_t before = ~0ULL;
  for (std::uint64_t now = 0; now != before; now = sender->stats().servers[0].pages) {
    before = now;
    std::this_thread::sleep_for(300ms);
  }
  EXPECT_GT(before, 0u);
  EXPECT_LT(before, all_pages());
  EXPECT_TRUE(events.empty()) << "pages are in nobody's list";
  hold_up->let_go();
  EXPECT_EQ(events.expect(kRoundDone).tag, 5u);
  EXPECT_EQ(sender->stats().pages_pending, 0u);
  expect_evicted({1});
}

// Some of what has gone to the servers before, in rounds of its own.
class ScatterDeltas : public ScatterTest {
 protected:
  void start(unsigned servers, unsigned replicas, std::uint64_t cache = 64 << 20,
             std::uint16_t agreed = wire::kFlagDelta) {
    make({600, 40}, servers);
    SenderConfig with = config();
    with.direct = false;
    with.replicas = replicas;
    with.server_encodings = agreed;
    with.delta_cache_bytes = cache;
    for (const auto& region : regions) {
      with.trackers.push_back(make_tracker(TrackerKind::kHashDiff, region));
      with.trackers.back()->arm();
    }
    sender = std::make_unique<Sender>(std::move(with));
    sender->connect();
    events.expect(kConnected);
    sender->queue_populated();
    round();
  }
  std::uint64_t round() {
    sender->start_round(++tag);
    return events.expect(kRoundDone).suspects;
  }
  // A few bytes of every page that is no zeros.
  void write() {
    for (std::uint32_t region = 0; region < regions.size(); ++region) {
      std::byte* const bytes = regions[region]->address(PageNumber{0}).pointer();
      for (std::uint64_t page = 0; page < regions[region]->pages(); ++page) {
        if (page % 16 == 3) continue;
        const std::size_t at = page * page_size() + random() % page_size();
        bytes[at] ^= static_cast<std::byte>(1 + random() % 255);
        oracle[region][at] = bytes[at];
      }
    }
    sender->queue_dirty();
  }
  unsigned deltas() {
    unsigned all = 0;
    for (const auto& stage : stages) {
      const std::lock_guard lock(stage->mutex);
      all += stage->deltas;
    }
    return all;
  }
  std::mt19937_64 random{5};
  std::uint64_t tag = 0;
};

TEST_F(ScatterDeltas, GoToTheServerThatHasTheFormerVersion) {
  start(1, 1);
  const std::uint64_t first = sender->stats().bytes_on_wire;
  EXPECT_EQ(deltas(), 0u);
  for (unsigned rounds = 1; rounds < 4; ++rounds) {
    write();
    EXPECT_EQ(round(), 0u);
    expect_evicted();
    EXPECT_EQ(sender->stats().delta.pages, rounds * (600u - 38 + 40 - 3));
  }
  EXPECT_GT(deltas(), 0u);
  EXPECT_LT(sender->stats().bytes_on_wire, first + first / 4);
}

// With several, a page goes to whoever has room; only the one that has it gets a delta.
TEST_F(ScatterDeltas, AreOfNobodyElsesVersion) {
  start(3, 2);
  for (int rounds = 0; rounds < 4; ++rounds) {
    write();
    EXPECT_EQ(round(), 0u) << "a delta that did not fit";
    expect_evicted();
  }
  EXPECT_GT(deltas(), 0u);
}

TEST_F(ScatterDeltas, ThatAreRefusedGoAgainPlainly) {
  start(1, 1);
  {
    // Behind the source's back it has something else.
    const std::lock_guard lock(stages[0]->mutex);
    for (auto& [key, page] : stages[0]->pages) {
      if (!page.content.empty() && key.second % 3 == 0) page.content[7] ^= std::byte{1};
    }
  }
  write();
  const std::uint64_t suspects = round();
  EXPECT_GT(suspects, 0u);
  const std::uint64_t before = sender->stats().delta.pages;
  EXPECT_EQ(round(), 0u);
  expect_evicted();
  EXPECT_EQ(sender->stats().delta.pages, before) << "what was refused";
  // And counts as a base again.
  write();
  EXPECT_EQ(round(), 0u);
  expect_evicted();
  EXPECT_GT(sender->stats().delta.pages, before);
}

TEST_F(ScatterDeltas, AreSentWhereTheyWereAgreedOnAlone) {
  start(1, 1, 64 << 20, wire::kCompressions);
  write();
  EXPECT_EQ(round(), 0u);
  expect_evicted();
  EXPECT_EQ(deltas(), 0u);
}

TEST_F(ScatterDeltas, AreOfWhatTheCacheHasRoomFor) {
  start(2, 1, 50 * page_size());
  for (int rounds = 0; rounds < 3; ++rounds) {
    write();
    EXPECT_EQ(round(), 0u);
    expect_evicted();
  }
  EXPECT_LE(sender->stats().delta.pages, 3u * 50);
}

// Cut in the middle: what was not acknowledged goes again, and not against what may not have arrived.
TEST_F(ScatterDeltas, OutliveACut) {
  start(2, 1);
  for (unsigned rounds = 0; rounds < 3; ++rounds) {
    write();
    sender->start_round(++tag);
    std::this_thread::sleep_for(std::chrono::milliseconds(rounds));
    stages[rounds % 2]->cut();
    events.expect(kRoundDone);
    while (round() > 0) {
    }
    expect_evicted();
  }
}

TEST_F(ScatterTest, WithoutADestinationFullServersEndTheMigration) {
  make({2000}, 2);
  for (auto& stage : stages) stage->room = 100;
  SenderConfig with = config();
  with.direct = false;
  sender = std::make_unique<Sender>(std::move(with));
  sender->connect();
  events.expect(kConnected);
  sender->queue_populated();
  sender->start_round(5);
  EXPECT_EQ(events.expect(kFailed).code, "VMD_CAPACITY");
}

TEST_F(ScatterTest, NoServerAtAllFailsBeforeAnythingIsSent) {
  make({200}, 2);
  for (auto& stage : stages) stage->lost = true;
  sender = std::make_unique<Sender>(config());
  sender->connect();
  const EngineEvent failed = events.next();
  EXPECT_EQ(static_cast<int>(failed.kind), static_cast<int>(kFailed));
  EXPECT_EQ(failed.code, "CONNECT_FAILED");
}

TEST_F(ScatterTest, ClosingInTheMiddleIsPrompt) {
  for (const bool stalled : {false, true}) {
    SCOPED_TRACE(stalled);
    make({20000}, 2);
    block_direct();
    SenderConfig with = config();
    with.stall_timeout = 60s;
    into_postcopy(std::move(with));
    start_push_with(0, [&] { return has(0, 51); });
    if (stalled) {
      for (auto& stage : stages) stage->stall(true);
    }
    const auto start = std::chrono::steady_clock::now();
    sender->close(false);
    EXPECT_LT(std::chrono::steady_clock::now() - start, 30s);
    TearDown();
    regions.clear();
    oracle.clear();
    stages.clear();
    direct_open = false;
    while (!events.empty()) events.next();
  }
}

TEST(LaneTest, AcknowledgementsComeInOrderAndTheWindowFollowsThem) {
  Lane lane;
  const auto start = Lane::Clock::now();
  const RegionRun run{0, run_of(0, 128)};
  EXPECT_TRUE(lane.idle());
  lane.sent(std::span(&run, 1), Lane::kBatchBytes, {1, Holders::kNobody});
  EXPECT_FALSE(lane.idle());
  const std::uint64_t first = lane.close(start);
  lane.sent(std::span(&run, 1), Lane::kBatchBytes, {1, Holders::kNobody});
  const std::uint64_t second = lane.close(start);
  EXPECT_FALSE(lane.has_room());
  EXPECT_FALSE(lane.acknowledged(second, start));
  ASSERT_TRUE(lane.acknowledged(first, start + 12ms));
  ASSERT_TRUE(lane.acknowledged(second, start + 24ms));
  EXPECT_TRUE(lane.idle());
  // 512 KiB in 12 ms, for 60 ms and the 12 that an answer takes: 3 MiB.
  EXPECT_GT(lane.window(), 2ULL << 20);
  EXPECT_LT(lane.window(), 4ULL << 20);
  EXPECT_FALSE(lane.waiting_since());
}

TEST(LaneTest, WhoSaysThatItIsAtItIsWaitedForAsLongAsItGetsOn) {
  Lane lane;
  const auto start = Lane::Clock::now();
  EXPECT_EQ(lane.silent_since(start), start);
  EXPECT_TRUE(lane.worked(100, start + 1s));
  EXPECT_EQ(lane.silent_since(start), start + 1s);
  // What was said before it was waited for does not count.
  EXPECT_EQ(lane.silent_since(start + 2s), start + 2s);
  EXPECT_FALSE(lane.worked(99, start + 2s));
  // The same again is a sign, for so long.
  EXPECT_TRUE(lane.worked(100, start + 10s));
  EXPECT_EQ(lane.silent_since(start, 10s), start + 10s);
  EXPECT_TRUE(lane.worked(100, start + 12s));
  EXPECT_EQ(lane.silent_since(start, 10s), start);
  EXPECT_EQ(lane.silent_since(start + 3s, 10s), start + 12s);
  EXPECT_TRUE(lane.worked(101, start + 13s));
  EXPECT_EQ(lane.silent_since(start, 10s), start + 13s);
  // But an answer that never comes is not waited for for ever, whatever is said.
  EXPECT_EQ(lane.silent_since(start, 10s, 13s), start + 13s);
  EXPECT_EQ(lane.silent_since(start, 10s, 12s), start);
}

// A receiver that runs 2 ms of every 60 acknowledges what it has in one go: that is no speed.
TEST(LaneTest, BurstsOfAcknowledgementsAreNoSpeed) {
  Lane lane;
  auto now = Lane::Clock::now();
  const RegionRun run{0, run_of(0, 64)};
  std::deque<std::uint64_t> tags;
  for (int slice = 0; slice < 30; ++slice) {
    while (lane.has_room() || tags.empty()) {
      lane.sent(std::span(&run, 1), 256 << 10, {1, Holders::kNobody});
      tags.push_back(lane.close(now));
    }
    now += 60ms;
    for (int i = 0; i < 2 && !tags.empty(); ++i) {
      now += 100us;
      ASSERT_TRUE(lane.acknowledged(tags.front(), now));
      tags.pop_front();
    }
  }
  // 512 KiB in 60 ms, and an answer takes 60 ms by itself: 1 MiB. By its bursts it would be 8.
  EXPECT_LT(lane.window(), 3ULL << 19);
  EXPECT_GE(lane.window(), 512ULL << 10);
}

// Whoever is 150 ms away acknowledges late and not slowly.
TEST(LaneTest, ADistantReceiverKeepsItsRate) {
  Lane lane;
  auto now = Lane::Clock::now();
  const RegionRun run{0, run_of(0, 64)};
  std::deque<std::pair<std::uint64_t, Lane::Clock::time_point>> under_way;
  for (const auto end = now + 4s; now < end; now += 1ms) {
    while (lane.has_room()) {
      lane.sent(std::span(&run, 1), 256 << 10, {1, Holders::kNobody});
      under_way.emplace_back(lane.close(now), now + 150ms);
    }
    while (!under_way.empty() && under_way.front().second <= now) {
      ASSERT_TRUE(lane.acknowledged(under_way.front().first, now));
      under_way.pop_front();
    }
  }
  EXPECT_EQ(lane.window(), Lane::kLargestWindow);
}

// What it was given is with others now: it gets nothing more before it has acknowledged that.
TEST(LaneTest, ALaneOwesWhatWasTakenBack) {
  Lane lane;
  const RegionRun run{0, run_of(0, 64)};
  const auto now = Lane::Clock::now();
  lane.sent(std::span(&run, 1), 256 << 10, {1, Holders::kNobody});
  const std::uint64_t tag = lane.close(now);
  lane.sent(std::span(&run, 1), 256 << 10, {1, Holders::kNobody});
  EXPECT_FALSE(lane.owes());
  EXPECT_EQ(lane.take_back(false).size(), 2u);  // what is not behind a barrier too
  EXPECT_TRUE(lane.owes());
  EXPECT_TRUE(lane.take_back(false).empty());
  // What still joins the batch, a fault's answer say, is not taken back yet, and can be.
  const RegionRun answer{0, run_of(64, 3)};
  lane.sent(std::span(&answer, 1), 3 * 4096, {1, Holders::kNobody});
  EXPECT_TRUE(lane.anything_to_take_back());
  const auto taken = lane.take_back(false);
  ASSERT_EQ(taken.size(), 1u);
  EXPECT_EQ(taken[0].run, answer.run);
  const std::uint64_t next = lane.close(now);
  ASSERT_TRUE(lane.acknowledged(tag, now + 1ms));
  EXPECT_TRUE(lane.owes());
  const auto batch = lane.acknowledged(next, now + 2ms);
  ASSERT_TRUE(batch);
  EXPECT_TRUE(batch->returned());
  EXPECT_FALSE(lane.owes());
}

TEST(LaneTest, WhatIsTakenBackIsTakenOnce) {
  Lane lane;
  const RegionRun run{0, run_of(5, 10)};
  lane.sent(std::span(&run, 1), 40960, {0, Holders::kNobody});
  const std::uint64_t tag = lane.close(Lane::Clock::now());
  EXPECT_TRUE(lane.anything_to_take_back());
  EXPECT_EQ(lane.take_back(false).size(), 1u);
  EXPECT_FALSE(lane.anything_to_take_back());
  EXPECT_TRUE(lane.take_back(false).empty());
  const auto batch = lane.acknowledged(tag, Lane::Clock::now());
  ASSERT_TRUE(batch);
  EXPECT_TRUE(batch->returned());
}

TEST(LaneTest, ABatchIsOfOneKindAndOfSoManyFrames) {
  Lane lane;
  const Holders holders{0, Holders::kNobody};
  for (std::uint64_t i = 0; i < Lane::kBatchFrames; ++i) {
    EXPECT_FALSE(lane.batch_is_full());
    const RegionRun frame{0, run_of(i, 1)};  // joins the one before
    lane.sent(std::span(&frame, 1), 100, holders);
  }
  EXPECT_TRUE(lane.batch_is_full());
  EXPECT_FALSE(lane.needs_barrier(holders));
  EXPECT_TRUE(lane.needs_barrier(holders, true));
  // Each of them may be refused, by either holder.
  for (unsigned twice = 0; twice < 2; ++twice) {
    for (std::uint64_t i = 0; i < Lane::kBatchFrames; ++i) EXPECT_TRUE(lane.refused(0, run_of(i, 1), true));
  }
  std::uint64_t tag = lane.close(Lane::Clock::now());
  EXPECT_FALSE(lane.acknowledged(tag, Lane::Clock::now())->references);
  EXPECT_FALSE(lane.needs_barrier(holders, true));
  for (std::size_t i = 0; i < Lane::kMostBatches; ++i) {
    EXPECT_TRUE(lane.has_room_for_small_batch());
    EXPECT_TRUE(lane.has_room_for_record());
    const RegionRun frame{0, run_of(i, 1)};
    lane.sent(std::span(&frame, 1), 80, holders, true);
    tag = lane.close(Lane::Clock::now());
  }
  EXPECT_TRUE(lane.has_room());
  EXPECT_FALSE(lane.has_room_for_small_batch());
  EXPECT_FALSE(lane.has_room_for_record());
  EXPECT_TRUE(lane.acknowledged(tag + 1 - Lane::kMostBatches, Lane::Clock::now())->references);
  EXPECT_TRUE(lane.has_room_for_small_batch());
}

TEST(LaneTest, NoPageIsRefusedAgainAndAgain) {
  Lane lane;
  const Holders holders{0, 1};
  const RegionRun huge{0, run_of(0, 1000000)};
  lane.sent(std::span(&huge, 1), 80, holders);
  EXPECT_TRUE(lane.refused(0, run_of(0, 1000000), true));
  EXPECT_TRUE(lane.refused(0, run_of(0, 1000000), false));  // by its replica's server
  EXPECT_FALSE(lane.refused(0, run_of(7, 1), true));
  const std::uint64_t tag = lane.close(Lane::Clock::now());
  const auto batch = lane.acknowledged(tag, Lane::Clock::now());
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch->torn.size() + batch->no_room.size(), 2u);
  // Nor too many of them.
  lane.sent(std::span(&huge, 1), 80, holders);
  for (std::uint64_t i = 0; i < Lane::kMostRefusals; ++i) EXPECT_TRUE(lane.refused(0, run_of(i, 1), true));
  EXPECT_FALSE(lane.refused(0, run_of(Lane::kMostRefusals, 1), true));
}

TEST(WhereaboutsTest, ALostServerLeavesWhatAnotherOneHolds) {
  const std::array<std::uint64_t, 1> capacities{100};
  Whereabouts where(capacities, 3, 3);
  for (std::uint64_t page = 0; page < 30; ++page) where.note_hash(0, PageNumber{page}, page, page == 7);
  EXPECT_EQ(where.settle(0, run_of(0, 10), {0, 1}), 10u);
  EXPECT_EQ(where.settle(0, run_of(10, 10), {0, Holders::kNobody}), 10u);
  EXPECT_EQ(where.settle(0, run_of(20, 10), {Holders::kDestination, Holders::kNobody}), 10u);
  EXPECT_EQ(where.safe_count(), 30u);
  Whereabouts::Record record;
  std::uint64_t told = 0;
  while (where.next_untold(2, 1000, record)) told += record.run.count;
  EXPECT_EQ(told, 30u);
  const Whereabouts::Lost lost = where.lose(0, nullptr);
  ASSERT_EQ(lost.nowhere.size(), 1u);
  EXPECT_EQ(lost.nowhere[0].run, run_of(10, 10));
  ASSERT_EQ(lost.single.size(), 1u);
  EXPECT_EQ(lost.single[0].run, run_of(0, 10));
  EXPECT_EQ(where.safe_count(), 20u);
  EXPECT_EQ(where.holders(0, PageNumber{3}).first, 1);
  EXPECT_EQ(where.pages_at(1), 10u);
  ASSERT_TRUE(where.next_untold(2, 1000, record));
  EXPECT_EQ(record.run, run_of(0, 7));
  EXPECT_EQ(record.hashes.size(), 7u);
  ASSERT_TRUE(where.next_untold(2, 1000, record));
  EXPECT_TRUE(record.zero);
  EXPECT_TRUE(record.hashes.empty());
}

TEST(WhereaboutsTest, ASpareCountsAgainWhileItsHolderHasIt) {
  const std::array<std::uint64_t, 1> capacities{100};
  Whereabouts where(capacities, 3, 3);
  where.settle(0, run_of(0, 40), {0, 1});
  Whereabouts::Record record;
  while (where.next_untold(2, 1000, record)) {
  }
  where.lose(1, nullptr);
  where.make_spare(0, run_of(0, 40));
  EXPECT_EQ(where.safe_count(), 0u);
  EXPECT_FALSE(where.next_untold(2, 1000, record));
  where.settle(0, run_of(0, 10), {2, 0});  // another copy
  where.forget(0, run_of(10, 10));         // written
  std::vector<std::unique_ptr<AtomicBitmap>> gone;
  gone.push_back(std::make_unique<AtomicBitmap>(100));
  where.drop_spares(0, run_of(20, 5), std::bitset<256>().set(2), gone);
  where.drop_spares(0, run_of(25, 5), std::bitset<256>().set(0), gone);
  const auto restored = where.restore();
  ASSERT_EQ(restored.size(), 2u);
  EXPECT_EQ(restored[0].run, run_of(20, 5));
  EXPECT_EQ(restored[1].run, run_of(30, 10));
  EXPECT_EQ(where.safe_count(), 25u);
  EXPECT_EQ(where.pages_at(0), 15u);
  EXPECT_EQ(where.holders(0, PageNumber{35}), (Holders{0, Holders::kNobody}));
  // It was on its way to its holder when it was restored, and that one has let go of it; but the source has, too, of one.
  gone[0]->set(PageNumber{21});
  where.drop_spares(0, run_of(20, 5), std::bitset<256>().set(0), gone);
  EXPECT_EQ(where.safe_count(), 21u);
  EXPECT_FALSE(where.safe(0, PageNumber{20}));
  EXPECT_TRUE(where.safe(0, PageNumber{21}));
  // What has another copy stays.
  where.drop_spares(0, run_of(0, 10), std::bitset<256>().set(2), gone);
  EXPECT_EQ(where.safe_count(), 21u);
  // And is lost with it.
  where.make_spare(0, run_of(30, 10));
  EXPECT_EQ(where.lose(0, nullptr).nowhere.size(), 1u);
  EXPECT_TRUE(where.restore().empty());
}

TEST(WhereaboutsTest, AFormerHolderIsToldThatItMayDropItsCopy) {
  const std::array<std::uint64_t, 1> capacities{100};
  Whereabouts where(capacities, 3, 1);
  Whereabouts::Record record;
  where.settle(0, run_of(0, 10), {2, Holders::kNobody});
  EXPECT_FALSE(where.next_untold(2, 1000, record));
  where.forget(0, run_of(0, 5));
  where.settle(0, run_of(0, 5), {1, Holders::kNobody});
  ASSERT_TRUE(where.next_untold(2, 1000, record));
  EXPECT_EQ(record.run, run_of(0, 5));
  EXPECT_EQ(record.holders.first, 1);
}

}  // namespace
}  // namespace memferry::sender_test
