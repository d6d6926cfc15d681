// The source engine against a scripted destination over real loopback sockets.
#include "transfer/sender.h"

#include <dirent.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <atomic>
#include <fstream>
#include <random>

#include "fake_destination.h"
#include "os/pagemap.h"
#include "transfer/send_pages.h"

namespace memferry::sender_test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;
using wire::FrameType;

// A tracker whose dirty pages the test names.
class ScriptedTracker final : public DirtyTracker {
 public:
  explicit ScriptedTracker(bool wants) : wants_(wants) {}
  std::string_view name() const override { return "scripted"; }
  void arm() override {}
  std::uint64_t collect(AtomicBitmap& dirty) override {
    std::uint64_t pages = 0;
    for (const PageRun run : next) pages += dirty.set_run(run);
    next.clear();
    return pages;
  }
  void disarm() override {}
  bool wants_sent() const override { return wants_; }
  void sent(PageNumber page, std::uint64_t xxh3) override {
    const std::lock_guard lock(mutex);
    hashes[page.value] = xxh3;
  }
  std::vector<PageRun> next;
  std::mutex mutex;
  std::map<std::uint64_t, std::uint64_t> hashes;

 private:
  const bool wants_;
};

PageRun run_of(std::uint64_t first, std::uint64_t count) { return PageRun{PageNumber{first}, count}; }

class SenderTest : public testing::Test {
 protected:
  static constexpr unsigned kChannels = 2;

  // Regions of these many pages, filled with random bytes up to `touched` pages each.
  void make(std::vector<std::uint64_t> pages, unsigned channels = kChannels) {
    channels_ = channels;
    std::mt19937_64 random(7);
    for (const std::uint64_t count : pages) {
      regions.push_back(Region::allocate(count * page_size()));
      std::uint64_t* words =
          reinterpret_cast<std::uint64_t*>(regions.back()->contiguous(run_of(0, count)).data());
      for (std::uint64_t i = 0; i < count * page_size() / 8; ++i) words[i] = random();
      trackers.push_back(std::make_shared<ScriptedTracker>(wants_sent));
    }
    peer = std::make_unique<FakeDestination>(
        FakeDestination::Options{.channels = channels, .pages = pages, .page_size = page_size()});
  }
  static std::uint64_t page_size() { return static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)); }
  std::byte* page(std::uint64_t number, std::size_t region = 0) {
    return regions[region]->address(PageNumber{number}).pointer();
  }

  SenderConfig config() {
    SenderConfig config;
    config.regions = regions;
    for (const auto& tracker : trackers) config.trackers.push_back(tracker);
    config.host = "127.0.0.1";
    config.port = peer->port();
    config.channels = channels_;
    config.tokens = FakeDestination::tokens(channels_);
    config.recover_timeout = 20s;
    config.on_event = events.callback();
    return config;
  }
  void connect(SenderConfig with) {
    sender = std::make_unique<Sender>(std::move(with));
    sender->connect();
    peer->accept_epoch();
    events.expect(kConnected);
  }
  void connect() { connect(config()); }

  // Whose barriers nobody answers.
  void unanswered_round(std::uint64_t pages, std::chrono::milliseconds answer_timeout) {
    make({pages});
    peer->answer_barriers = false;
    SenderConfig with = config();
    with.answer_timeout = answer_timeout;
    connect(std::move(with));
    sender->queue_populated();
    sender->start_round(1);
  }
  // Of both data channels: everything of the round has been sent.
  void wait_for_barriers() {
    peer->wait_for([&] {
      return std::count_if(peer->seen.begin(), peer->seen.end(),
                           [](const SeenFrame& f) { return f.type() == FrameType::kBarrier; }) == 2;
    });
  }
  void round(std::uint64_t tag) {
    sender->start_round(tag);
    const EngineEvent done = events.expect(kRoundDone);
    EXPECT_EQ(done.tag, tag);
  }
  // connect, one full round, switchover without anything dirty
  void into_postcopy() {
    connect();
    sender->queue_populated();
    sender->switch_over();
    events.expect(kSwitched);
  }
  void expect_equal() {
    const std::lock_guard lock(peer->mutex);
    for (std::size_t r = 0; r < regions.size(); ++r) {
      for (std::uint64_t p = 0; p < regions[r]->pages(); ++p) {
        ASSERT_TRUE(peer->have[r][p]) << "page " << p << " never came";
        ASSERT_EQ(std::memcmp(page(p, r), peer->memory[r].data() + p * page_size(), page_size()), 0)
            << "page " << p;
      }
    }
  }

  bool wants_sent = false;
  unsigned channels_ = kChannels;
  std::vector<std::shared_ptr<Region>> regions;
  std::vector<std::shared_ptr<ScriptedTracker>> trackers;
  std::unique_ptr<FakeDestination> peer;
  EventLog events;  // outlives the sender
  std::unique_ptr<Sender> sender;
};

// --- rounds

TEST_F(SenderTest, OneRoundMovesEveryByteOfEveryRegion) {
  for (const unsigned channels : {1u, 2u, 5u}) {
    SCOPED_TRACE(channels);
    regions.clear();
    trackers.clear();
    make({700, 1, 65}, channels);
    connect();
    sender->queue_populated();
    round(11);
    expect_equal();
    EXPECT_EQ(sender->stats().pages_sent, 766u);
    EXPECT_EQ(sender->stats().pages_resent, 0u);
    EXPECT_EQ(sender->stats().pages_pending, 0u);
    EXPECT_GT(sender->stats().bytes_on_wire, 766 * page_size());
    EXPECT_LT(sender->stats().bytes_on_wire, 766 * page_size() + 10000);
    sender.reset();
  }
}

TEST_F(SenderTest, ZeroPagesAndUntouchedPagesCarryNoPayload) {
  make({300});
  std::memset(page(10), 0, 20 * page_size());
  ::madvise(page(100), 100 * page_size(), MADV_DONTNEED);
  connect();
  sender->queue_populated();
  round(1);
  EXPECT_EQ(sender->stats().pages_zero, 120u);
  EXPECT_EQ(sender->stats().pages_sent, 180u);
  // Untouched pages stay unpopulated: the sender did not read them.
  std::vector<unsigned char> resident(100);
  ASSERT_EQ(::mincore(page(100), 100 * page_size(), resident.data()), 0);
  EXPECT_EQ(std::count_if(resident.begin(), resident.end(), [](unsigned char r) { return (r & 1) != 0; }), 0);
  expect_equal();
  // One frame for the untouched run
  std::size_t large = 0;
  for (const SeenFrame& frame : peer->frames()) {
    if (frame.type() == FrameType::kZero && frame.header.first_page == 100 && frame.header.page_count == 100)
      ++large;
  }
  EXPECT_EQ(large, 1u);
}

TEST_F(SenderTest, PagesTouchedAfterTheyWereQueuedAsUntouchedGoWithContent) {
  make({200});
  ::madvise(page(0), 200 * page_size(), MADV_DONTNEED);
  connect();
  sender->queue_populated();
  for (const std::uint64_t p : {0U, 57U, 58U, 199U}) std::memset(page(p), 0x5a, page_size());
  round(1);
  expect_equal();
  EXPECT_EQ(sender->stats().pages_sent, 4u);
}

// An armed page looks populated in the pagemap, whatever it holds: the tracker alone knows.
TEST_F(SenderTest, UntouchedPagesOfATrackedRegionAreNotReadEither) {
  for (const auto& probe : probe_trackers()) {
    if (probe.name == "uffd-wp-async" && !probe.available) GTEST_SKIP() << probe.reason;
  }
  make({300});
  ::madvise(page(100), 100 * page_size(), MADV_DONTNEED);
  const std::shared_ptr<DirtyTracker> tracker = make_tracker(TrackerKind::kUffdWpAsync, regions[0]);
  tracker->arm();
  ASSERT_NE(tracker->populated_when_armed(), nullptr);
  SenderConfig with = config();
  with.trackers = {tracker};
  connect(std::move(with));
  sender->queue_populated();
  for (const std::uint64_t p : {0U, 57U, 150U, 199U}) std::memset(page(p), 0x5a, page_size());
  round(1);
  EXPECT_EQ(sender->stats().pages_sent, 200u);
  EXPECT_EQ(sender->stats().pages_zero, 100u);
  Pagemap pagemap;
  Pagemap::Query present;
  present.category_mask = present.return_mask = abi::kPageIsPresent;
  std::uint64_t pages = 0;
  pagemap.scan(Address::of(page(100)), 100 * page_size(), present,
               [&](const abi::PageRegion& run) { pages += (run.end - run.start) / page_size(); });
  EXPECT_EQ(pages, 2u) << "the sender has read pages that nobody had touched";
  // Written after the tracker was armed, sent as zeros: in the next round they come as they are.
  EXPECT_EQ(sender->queue_dirty(), 4u);
  std::memset(page(180), 0x77, page_size());
  round(2);
  EXPECT_EQ(sender->queue_dirty(), 1u);
  round(3);
  EXPECT_EQ(sender->stats().pages_zero, 100u);
  expect_equal();
}

TEST_F(SenderTest, ABarrierIsBehindEveryPageOfItsRoundOnItsChannel) {
  make({2000});
  connect();
  sender->queue_populated();
  round(5);
  std::map<unsigned, bool> barrier;
  for (const SeenFrame& frame : peer->frames()) {
    EXPECT_FALSE(barrier[frame.channel]);
    if (frame.type() == FrameType::kBarrier) {
      EXPECT_EQ(frame.header.tag, 5u);
      barrier[frame.channel] = true;
    }
  }
  EXPECT_TRUE(barrier[0] && barrier[1]);
}

TEST_F(SenderTest, ARoundIsNotDoneBeforeEveryChannelHasAnswered) {
  make({100});
  peer->answer_barriers = false;
  connect();
  sender->queue_populated();
  sender->start_round(3);
  wait_for_barriers();
  EXPECT_THROW(sender->queue_dirty(), std::logic_error);
  EXPECT_THROW(sender->start_round(4), std::logic_error);
  EXPECT_THROW(sender->switch_over(), std::logic_error);
  peer->send(1, wire::make_header(FrameType::kBarrierAck, 0, {}, 3));
  // What was sent on channel 1 is read before what follows on channel 0, or it would be no barrier: no event.
  EXPECT_TRUE(events.empty());
  peer->send(0, wire::make_header(FrameType::kBarrierAck, 0, {}, 3));
  EXPECT_EQ(events.expect(kRoundDone).tag, 3u);
}

TEST_F(SenderTest, LaterRoundsSendWhatIsDirtyAndNothingElse) {
  wants_sent = true;
  make({500});
  connect();
  sender->queue_populated();
  round(1);
  std::memset(page(100), 1, 5 * page_size());
  std::memset(page(400), 0, page_size());
  trackers[0]->next = {run_of(100, 5), run_of(400, 1)};
  EXPECT_EQ(sender->queue_dirty(), 6u);
  round(2);
  expect_equal();
  EXPECT_EQ(sender->stats().pages_resent, 6u);
  EXPECT_EQ(sender->stats().pages_sent, 505u);
  EXPECT_EQ(sender->stats().pages_zero, 1u);
  // The tracker knows the hash of every page as it was sent last, zero pages included.
  ASSERT_EQ(trackers[0]->hashes.size(), 500u);
  for (std::uint64_t p = 0; p < 500; ++p) {
    EXPECT_EQ(trackers[0]->hashes[p], xxh3_64(std::span(page(p), page_size()))) << p;
  }
}

TEST_F(SenderTest, PagesGainedByGrowthGoWithTheNextRound) {
  void* memory =
      ::mmap(nullptr, 64 * page_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  make({64});
  regions = {Region::adopt({Extent{Address::of(memory), 16 * page_size()}}, 64 * page_size())};
  std::memset(memory, 3, 64 * page_size());
  connect();
  sender->queue_populated();
  round(1);
  regions[0]->grow(40);
  EXPECT_EQ(sender->queue_dirty(), 24u);
  round(2);
  expect_equal();
  sender.reset();
  ::munmap(memory, 64 * page_size());
}

TEST_F(SenderTest, ARegionOfSeveralExtentsArrivesWhole) {
  make({60});
  const std::shared_ptr<Region> owner = regions[0];
  const std::uint64_t size = page_size();
  std::byte* base = page(0);
  // The pages of one mapping in another order, with a gap; a run and a fault's window cross the border.
  regions[0] = Region::adopt(
      {Extent{Address::of(base + 40 * size), 20 * size}, Extent{Address::of(base), 33 * size}}, 33 * size);
  peer = std::make_unique<FakeDestination>(
      FakeDestination::Options{.channels = 2, .pages = {53}, .page_size = size});
  into_postcopy();
  peer->request_fault(0, 18, 8);
  peer->wait_for([&] { return peer->have[0][25]; });
  sender->start_push();
  events.expect(kEvicted);
  expect_equal();
  sender.reset();
}

TEST_F(SenderTest, DigestIsThatOfTheMemory) {
  make({130});
  std::memset(page(7), 0, page_size());
  connect();
  std::vector<std::uint64_t> hashes;
  for (std::uint64_t p = 0; p < 130; ++p) hashes.push_back(xxh3_64(std::span(page(p), page_size())));
  EXPECT_EQ(sender->digest(0), xxh3_128(std::as_bytes(std::span(hashes))));
}

// Keeps what it is given, and counts the calls.
class KeepingStream final : public wire::Stream {
 public:
  using Stream::send_all;
  wire::IoResult send_all(std::span<iovec> buffers) override {
    ++calls;
    for (const iovec& buffer : buffers) {
      const auto* from = static_cast<const std::byte*>(buffer.iov_base);
      bytes.insert(bytes.end(), from, from + buffer.iov_len);
    }
    return {};
  }
  wire::IoResult recv_exact(std::span<std::byte>) override { return {}; }
  wire::IoResult recv_some(std::span<std::byte>, std::size_t&) override { return {}; }
  void shutdown() override {}
  int fd() const override { return -1; }
  std::vector<std::byte> bytes;
  unsigned calls = 0;
};

TEST(PageFramesTest, ScatteredPagesShareASystemCall) {
  constexpr std::size_t kSize = 4096;
  std::vector<std::byte> memory(200 * kSize);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<std::byte>(1 + i / kSize);
  std::memset(memory.data() + 6 * kSize, 0, kSize);
  PageFrames frames(kSize);
  KeepingStream stream;
  for (int batch = 1; batch <= 2; ++batch) {
    std::size_t added = 0;
    for (; frames.room() > 0; ++added) {
      const std::size_t page = 3 * added;
      frames.add(1, PageNumber{page}, std::span(memory).subspan(page * kSize, kSize), 0, nullptr);
    }
    EXPECT_EQ(added, wire::max_run_pages(kSize));
    EXPECT_THROW(frames.add(1, PageNumber{0}, std::span(memory).first(kSize), 0, nullptr), std::logic_error);
    stream.bytes.clear();
    const PageFrames::Sent sent = frames.send(stream);
    EXPECT_EQ(stream.calls, static_cast<unsigned>(batch));
    EXPECT_EQ(sent.bytes, stream.bytes.size());
    EXPECT_EQ(sent.content_pages, added - 1);
    EXPECT_EQ(sent.zero_pages, 1u);
    EXPECT_EQ(sent.runs.size(), added);
    EXPECT_TRUE(frames.empty());
    std::size_t at = 0;
    for (std::size_t i = 0; i < added; ++i) {
      wire::FrameHeader header{};
      std::memcpy(&header, stream.bytes.data() + at, sizeof header);
      EXPECT_EQ(wire::malformed(header, kSize), nullptr);
      EXPECT_EQ(header.first_page, 3 * i);
      EXPECT_EQ(header.type, static_cast<std::uint16_t>(i == 2 ? FrameType::kZero : FrameType::kPages));
      at += sizeof header;
      if (i != 2) {
        EXPECT_EQ(std::memcmp(stream.bytes.data() + at, memory.data() + 3 * i * kSize, kSize), 0);
        at += kSize;
      }
    }
    EXPECT_EQ(at, stream.bytes.size());
  }
}

// --- suspects

void send_suspects(FakeDestination& peer, unsigned channel, std::vector<wire::WireRun> runs) {
  peer.send(channel, wire::make_header(FrameType::kSuspects), std::as_bytes(std::span(runs)));
}

TEST_F(SenderTest, SuspectsAreQueuedAgainBeforeTheRoundIsReportedDone) {
  make({400});
  bool first_round = true;
  peer->suspects = [&](const SeenFrame& barrier) -> std::uint64_t {
    if (!first_round) return 0;
    send_suspects(*peer, barrier.channel, {{10, 2}, {300, 1}});
    return 3;
  };
  connect();
  sender->queue_populated();
  sender->start_round(1);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 3u);
  EXPECT_EQ(sender->stats().pages_pending, 3u);
  first_round = false;
  sender->start_round(2);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 0u);
  EXPECT_EQ(sender->stats().pages_resent, 3u);
  expect_equal();
}

TEST_F(SenderTest, SuspectsAreNamedOnWhicheverChannelFindsThem) {
  make({400});
  peer->suspects = [&](const SeenFrame& barrier) -> std::uint64_t {
    if (barrier.channel == 0) return 0;
    send_suspects(*peer, 1, {{5, 1}, {9, 1}});
    return 2;
  };
  connect();
  sender->queue_populated();
  sender->start_round(1);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 2u);
  EXPECT_EQ(sender->stats().pages_pending, 2u);
}

TEST_F(SenderTest, SuspectsCountedButNeverNamedAreAnError) {
  make({100});
  peer->suspects = [](const SeenFrame&) { return 4; };
  connect();
  sender->queue_populated();
  sender->start_round(1);
  EXPECT_EQ(events.expect(kFailed).code, "PROTOCOL");
}

// --- discards and switchover

TEST_F(SenderTest, WhatIsDirtyAtTheSwitchoverIsDiscardedAndComesAgain) {
  make({500});
  connect();
  sender->queue_populated();
  round(1);
  std::memset(page(50), 9, 10 * page_size());
  trackers[0]->next = {run_of(50, 10)};
  EXPECT_EQ(sender->discard_dirty(2), 10u);
  EXPECT_EQ(events.expect(kRoundDone).tag, 2u);
  std::memset(page(55), 8, 10 * page_size());  // half of it is discarded already: the fake checks "once"
  trackers[0]->next = {run_of(55, 10), run_of(499, 1)};
  EXPECT_EQ(sender->switch_over(), 6u);
  events.expect(kSwitched);
  EXPECT_EQ(peer->count(FrameType::kSwitch), 1u);
  {
    const std::lock_guard lock(peer->mutex);
    EXPECT_EQ(std::count(peer->have[0].begin(), peer->have[0].end(), false), 16);
  }
  sender->start_push();
  events.expect(kEvicted);
  expect_equal();
  EXPECT_EQ(sender->stats().pages_resent, 16u);
}

TEST_F(SenderTest, SuspectPagesAreDiscardedAtTheSwitchover) {
  make({100});
  peer->suspects = [&](const SeenFrame& barrier) -> std::uint64_t {
    if (barrier.channel == 0 && barrier.header.tag == 1) send_suspects(*peer, 0, {{10, 1}});
    return barrier.channel == 0 && barrier.header.tag == 1 ? 1 : 0;
  };
  connect();
  sender->queue_populated();
  sender->start_round(1);
  events.expect(kRoundDone);
  sender->switch_over();
  events.expect(kSwitched);
  const std::lock_guard lock(peer->mutex);
  EXPECT_FALSE(peer->have[0][10]);
}

TEST_F(SenderTest, ThePushWaitsForTheAnswerToTheSwitch) {
  make({100});
  peer->answer_switch = false;
  connect();
  sender->queue_populated();
  sender->switch_over();
  sender->start_push();
  peer->wait_for([&] { return !peer->seen.empty(); });
  {
    const std::lock_guard lock(peer->mutex);
    EXPECT_EQ(peer->seen.size(), 1u);
    EXPECT_EQ(peer->seen[0].type(), FrameType::kSwitch);
  }
  peer->send(0, wire::make_header(FrameType::kSwitchAck));
  events.expect(kSwitched);
  events.expect(kEvicted);
  expect_equal();
}

TEST_F(SenderTest, EvictionNeedsTheAnswerOfTheDemandChannelToo) {
  make({100});
  peer->answer_barriers = false;
  into_postcopy();
  sender->start_push();
  peer->wait_for([&] {
    return std::count_if(peer->seen.begin(), peer->seen.end(),
                         [](const SeenFrame& f) { return f.type() == FrameType::kBarrier; }) == 3;
  });
  const std::uint64_t tag = peer->frames().back().header.tag;
  for (unsigned channel : {0u, 1u})
    peer->send(channel, wire::make_header(FrameType::kBarrierAck, 0, {}, tag));
  // A fault in between is still answered.
  peer->request_fault(0, 42);
  peer->wait_for([&] {
    return peer->seen.back().channel == 2 && peer->seen.back().header.first_page == 42 &&
           peer->seen.back().type() == FrameType::kPages;
  });
  EXPECT_TRUE(events.empty());
  peer->send(2, wire::make_header(FrameType::kBarrierAck, 0, {}, tag));
  events.expect(kEvicted);
  peer->request_fault(0, 43);  // and after it
  peer->wait_for([&] { return peer->seen.back().header.first_page == 43; });
  EXPECT_TRUE(events.empty());
}

// --- faults

TEST_F(SenderTest, AFaultIsAnsweredFirstAloneThenItsPendingNeighbours) {
  make({1000});
  std::memset(page(503), 0, page_size());
  into_postcopy();
  peer->request_fault(0, 500, 8);
  peer->wait_for([&] {
    std::uint64_t pages = 0;
    for (const SeenFrame& f : peer->seen) pages += f.channel == 2 ? f.header.page_count : 0;
    return pages == 8;
  });
  const auto frames = peer->frames();
  ASSERT_EQ(frames.size(), 5u);  // kSwitch, 500, 501-502, 503, 504-507
  EXPECT_EQ(frames[1].header.flags, wire::kFlagAnswer);
  EXPECT_EQ(frames[1].header.first_page, 500u);
  EXPECT_EQ(frames[1].header.page_count, 1u);
  EXPECT_EQ(frames[2].header.flags, 0u);
  EXPECT_EQ(frames[2].header.page_count, 2u);
  EXPECT_EQ(frames[3].type(), FrameType::kZero);
  EXPECT_EQ(frames[4].header.first_page, 504u);
  // A page that was sent already goes again when it is asked for, its sent neighbours do not.
  peer->request_fault(0, 502, 8);
  peer->wait_for([&] { return peer->seen.back().header.first_page == 502; });
  // Counted when they have been sent, and the peer may be faster.
  for (int i = 0; i < 10'000 && sender->stats().faults_served < 2; ++i) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(sender->stats().pages_resent, 1u);
  EXPECT_EQ(sender->stats().faults_served, 2u);
  peer->request_fault(0, 999, 32);  // fewer pages than welcome
  peer->wait_for([&] { return peer->seen.back().header.first_page == 999; });
}

TEST_F(SenderTest, AZeroPageAskedForIsAnsweredAsZero) {
  make({100});
  std::memset(page(30), 0, page_size());
  ::madvise(page(60), page_size(), MADV_DONTNEED);
  into_postcopy();
  for (const std::uint64_t p : {30U, 60U}) {
    peer->request_fault(0, p);
    peer->wait_for([&] { return peer->seen.back().header.first_page == p; });
    EXPECT_EQ(peer->frames().back().type(), FrameType::kZero);
    EXPECT_EQ(peer->frames().back().header.flags, wire::kFlagAnswer);
  }
}

TEST_F(SenderTest, ThePushGoesOnBehindTheFault) {
  make({5000}, 1);
  into_postcopy();
  peer->request_fault(0, 3000);
  peer->wait_for([&] { return peer->seen.size() == 2; });
  sender->start_push();
  events.expect(kEvicted);
  expect_equal();
  for (const SeenFrame& frame : peer->frames()) {
    if (frame.channel == 0 && frame.type() == FrameType::kPages) {
      EXPECT_EQ(frame.header.first_page, 3001u);
      break;
    }
  }
  EXPECT_EQ(sender->stats().pages_resent, 0u);
}

TEST_F(SenderTest, AFaultBeforeTheSwitchoverWaitsForIt) {
  make({100});
  peer->answer_switch = false;
  connect();
  sender->queue_populated();
  peer->request_fault(0, 7);
  round(1);
  std::memset(page(7), 0x77, page_size());
  trackers[0]->next = {run_of(7, 1)};
  sender->switch_over();
  peer->wait_for([&] { return peer->seen.back().type() == FrameType::kSwitch; });
  EXPECT_EQ(sender->stats().faults_served, 0u);
  peer->send(0, wire::make_header(FrameType::kSwitchAck));
  events.expect(kSwitched);
  peer->wait_for([&] { return peer->seen.back().channel == 2; });
  const std::lock_guard lock(peer->mutex);
  EXPECT_EQ(peer->seen.back().header.first_page, 7u);
  EXPECT_EQ(std::memcmp(page(7), peer->memory[0].data() + 7 * page_size(), page_size()), 0);
}

TEST_F(SenderTest, ManyFaultsDuringThePushLoseNothing) {
  make({8000});
  into_postcopy();
  sender->start_push();
  std::mt19937 random(3);
  for (int i = 0; i < 300; ++i) peer->request_fault(0, random() % 8000, 1 + random() % 16);
  events.expect(kEvicted);
  peer->wait_for([&] {
    std::uint64_t answers = 0;
    for (const SeenFrame& f : peer->seen) answers += (f.header.flags & wire::kFlagAnswer) != 0 ? 1 : 0;
    return answers == 300;
  });
  expect_equal();
}

// --- cuts

TEST_F(SenderTest, ACutBeforeTheSwitchoverIsTheEnd) {
  make({100});
  connect();
  peer->cut();
  EXPECT_EQ(events.expect(kFailed).code, "CHANNEL_LOST");
  sender->queue_dirty();
  sender->start_round(1);  // no effect, no exception: the owner may not have seen the event yet
}

TEST_F(SenderTest, ACutInPostcopyIsRedialledAndTheBitmapDecides) {
  make({4000});
  // The peer cuts in the middle of the push, and forgets some pages that it had read.
  std::atomic<unsigned> frames{0};
  peer->on_frame = [&](const SeenFrame& frame) {
    if (frame.type() == FrameType::kPages && ++frames == 20) {
      peer->cut();
      return false;
    }
    return true;
  };
  into_postcopy();
  sender->start_push();
  events.expect(kPaused);
  peer->stop();
  {
    const std::lock_guard lock(peer->mutex);
    EXPECT_NE(std::count(peer->have[0].begin(), peer->have[0].end(), false), 0);
    for (std::uint64_t p = 0; p < 50; ++p) peer->have[0][p] = false;
    std::memset(peer->memory[0].data(), 0xcc, 50 * page_size());
    peer->seen.clear();
  }
  peer->accept_epoch(1);
  events.expect(kRecovered);
  events.expect(kEvicted);
  expect_equal();
  EXPECT_EQ(sender->stats().redials, 1u);
  EXPECT_EQ(peer->count(FrameType::kSwitch), 0u);
}

TEST_F(SenderTest, ACutBetweenSwitchAndPushLeavesThePushToTheOwner) {
  make({100});
  into_postcopy();
  peer->cut();
  events.expect(kPaused);
  peer->stop();
  peer->accept_epoch(1);
  events.expect(kRecovered);
  peer->request_fault(0, 9);
  peer->wait_for([&] { return peer->seen.back().header.first_page == 9; });
  EXPECT_TRUE(events.empty());
  sender->start_push();
  events.expect(kEvicted);
  expect_equal();
}

TEST_F(SenderTest, AnUnansweredSwitchIsAskedAgainAfterTheRedial) {
  make({100});
  peer->answer_switch = false;
  connect();
  sender->queue_populated();
  sender->switch_over();
  peer->wait_for([&] { return peer->seen.size() == 1; });
  peer->cut();
  events.expect(kPaused);
  peer->stop();
  peer->answer_switch = true;
  peer->accept_epoch(1);
  events.expect(kRecovered);
  events.expect(kSwitched);
  sender->start_push();
  events.expect(kEvicted);
  expect_equal();
}

TEST_F(SenderTest, TheAnswerToTheLastBarrierIsLost) {
  make({100});
  peer->answer_barriers = false;
  into_postcopy();
  sender->start_push();
  peer->wait_for([&] {
    return std::count_if(peer->seen.begin(), peer->seen.end(),
                         [](const SeenFrame& f) { return f.type() == FrameType::kBarrier; }) == 3;
  });
  peer->cut();
  events.expect(kPaused);
  peer->stop();
  peer->answer_barriers = true;
  const std::uint64_t sent = sender->stats().pages_sent;
  peer->accept_epoch(1);
  events.expect(kRecovered);
  events.expect(kEvicted);
  EXPECT_EQ(sender->stats().pages_sent, sent) << "the destination has every page";
}

TEST_F(SenderTest, ManyCutsInARow) {
  make({3000});
  std::atomic<unsigned> frames{0};
  std::atomic<bool> cutting{true};
  peer->on_frame = [&](const SeenFrame& frame) {
    if (frame.type() != FrameType::kPages || ++frames < 5 || !cutting) return true;
    peer->cut();
    return false;
  };
  into_postcopy();
  sender->start_push();
  for (std::uint32_t epoch = 1; epoch <= 3; ++epoch) {
    events.expect(kPaused);
    peer->stop();
    frames = 0;
    cutting = epoch < 3;
    peer->accept_epoch(epoch);
    events.expect(kRecovered);
  }
  events.expect(kEvicted);
  expect_equal();
}

TEST_F(SenderTest, ARefusedRedialIsTriedAgainWithTheSameTokens) {
  make({100});
  into_postcopy();
  peer->cut();
  events.expect(kPaused);
  peer->stop();
  for (unsigned i = 0; i <= kChannels; ++i) {
    auto [hello, stream] = peer->accept_hello();
    EXPECT_EQ(hello.epoch, 1u);
    FakeDestination::reply(*stream, wire::HelloStatus::kRefused);
  }
  peer->accept_epoch(1);
  events.expect(kRecovered);
  EXPECT_EQ(sender->stats().redials, 2u);
}

TEST_F(SenderTest, ARedialCutHalfwayTakesTheNextTokens) {
  make({100});
  into_postcopy();
  peer->cut();
  events.expect(kPaused);
  peer->stop();
  for (unsigned i = 0; i <= kChannels; ++i) {
    auto [hello, stream] = peer->accept_hello();
    EXPECT_EQ(hello.epoch, 1u);
    if (i == 0) FakeDestination::reply(*stream, wire::HelloStatus::kAccepted);
  }
  peer->accept_epoch(2);
  events.expect(kRecovered);
}

TEST_F(SenderTest, NobodyComesBack) {
  make({100});
  SenderConfig with = config();
  with.recover_timeout = 150ms;
  with.connect_timeout = 3s;  // of the first connections too
  connect(std::move(with));
  sender->queue_populated();
  sender->switch_over();
  events.expect(kSwitched);
  peer->cut();
  events.expect(kPaused);
  const EngineEvent end = events.expect(kFailed);
  EXPECT_EQ(end.code, "RECOVERY_TIMEOUT");
  EXPECT_EQ(sender->stats().pages_pending, 100u);  // it keeps every page
}

TEST_F(SenderTest, TokensRunOut) {
  make({100});
  SenderConfig with = config();
  with.tokens = FakeDestination::tokens(kChannels, 1);
  connect(std::move(with));
  sender->queue_populated();
  sender->switch_over();
  events.expect(kSwitched);
  peer->cut();
  events.expect(kPaused);
  EXPECT_EQ(events.expect(kFailed).code, "RECOVERY_TIMEOUT");
}

TEST_F(SenderTest, ACutAfterTheEvictionConcernsNobody) {
  make({100});
  into_postcopy();
  sender->start_push();
  events.expect(kEvicted);
  peer->cut();
  peer->stop();
  sender->close(true);
  EXPECT_TRUE(events.empty());
}

TEST_F(SenderTest, BadBitmapsAreRefusedAndTheirNumberIsBounded) {
  make({100});
  into_postcopy();
  peer->cut();
  events.expect(kPaused);
  peer->stop();
  for (std::uint32_t epoch = 1; epoch <= 4; ++epoch) {
    std::vector<std::unique_ptr<wire::PlainStream>> streams;
    wire::PlainStream* demand = nullptr;
    for (unsigned i = 0; i <= kChannels; ++i) {
      auto [hello, stream] = peer->accept_hello();
      EXPECT_EQ(hello.epoch, epoch);
      FakeDestination::reply(*stream, wire::HelloStatus::kAccepted);
      if (hello.channel == wire::kDemandChannel) demand = stream.get();
      streams.push_back(std::move(stream));
    }
    const std::vector<std::uint64_t> words(epoch == 1 ? 3 : 2, ~0ULL);  // 100 pages are two words
    wire::FrameHeader header = wire::make_header(FrameType::kBitmap, epoch == 2 ? 1 : 0);
    if (epoch == 3) header.first_page = ~0ULL << 6;
    wire::seal(header, std::as_bytes(std::span(words)));
    if (epoch == 4) header.checksum ^= 1;
    (void)demand->send_all(std::as_bytes(std::span(&header, 1)));
    (void)demand->send_all(std::as_bytes(std::span(words)));
    std::byte end{};
    EXPECT_FALSE(demand->recv_exact(std::span(&end, 1)).done());  // the sender hangs up
  }
  EXPECT_EQ(events.expect(kFailed).code, "PROTOCOL");
}

// --- connecting

TEST_F(SenderTest, NobodyListens) {
  make({10});
  SenderConfig with = config();
  peer.reset();
  sender = std::make_unique<Sender>(std::move(with));
  sender->connect();
  EXPECT_EQ(events.expect(kFailed).code, "CONNECT_FAILED");
}

TEST_F(SenderTest, RefusedAtOnce) {
  make({10});
  sender = std::make_unique<Sender>(config());
  sender->connect();
  for (unsigned i = 0; i <= kChannels; ++i) {
    auto [hello, stream] = peer->accept_hello();
    FakeDestination::reply(*stream, i == 1 ? wire::HelloStatus::kRefused : wire::HelloStatus::kAccepted);
  }
  EXPECT_EQ(events.expect(kFailed).code, "REFUSED");
}

TEST_F(SenderTest, APeerThatNeverAnswersTheHello) {
  make({10});
  SenderConfig with = config();
  with.connect_timeout = 100ms;
  sender = std::make_unique<Sender>(std::move(with));
  sender->connect();
  EXPECT_EQ(events.expect(kFailed).code, "CONNECT_FAILED");
}

TEST_F(SenderTest, APeerThatNeverAnswersABarrier) {
  unanswered_round(10, 100ms);
  EXPECT_EQ(events.expect(kFailed).code, "CHANNEL_LOST");
}

// Its kernel answers, and its process takes nothing: with the guest standing still this must end.
TEST_F(SenderTest, APeerThatTakesNothingMoreInTheMiddleOfARound) {
  make({16'384});
  peer->on_frame = [](const SeenFrame& frame) { return frame.type() != FrameType::kPages; };
  connect();
  sender->queue_populated();
  const auto since = std::chrono::steady_clock::now();
  sender->start_round(1);
  while (events.empty() && std::chrono::steady_clock::now() - since < 4 * wire::kSilenceLimit)
    std::this_thread::sleep_for(20ms);
  EXPECT_EQ(events.expect(kFailed).code, "CHANNEL_LOST");
  EXPECT_LT(std::chrono::steady_clock::now() - since, 3 * wire::kSilenceLimit);
}

// What the sockets hold takes it longer than the timeout: it is not dead.
TEST_F(SenderTest, ADestinationThatIsSlowGetsMoreTime) {
  unanswered_round(1000, 4s);
  wait_for_barriers();
  std::chrono::steady_clock::time_point since;
  auto heard = std::chrono::steady_clock::now();
  for (std::uint64_t turn = 1; turn <= 4; ++turn) {
    std::this_thread::sleep_for(1200ms);
    since = std::chrono::steady_clock::now();
    for (unsigned channel = 0; channel < 2; ++channel)
      peer->send(channel, wire::make_header(FrameType::kTaken, 0, {}, turn));
    // A turn that took longer than the timeout says nothing.
    if (std::chrono::steady_clock::now() - heard >= 4s) return;
    EXPECT_TRUE(events.empty());
    heard = since;
  }
  // It repeats itself: that is no progress.
  std::atomic<bool> over{false};
  std::thread repeating([&] {
    while (!over) {
      peer->send(0, wire::make_header(FrameType::kTaken, 0, {}, 4));
      std::this_thread::sleep_for(50ms);
    }
  });
  EXPECT_EQ(events.expect(kFailed).code, "CHANNEL_LOST");
  EXPECT_GE(std::chrono::steady_clock::now() - since, 4s);
  over = true;
  repeating.join();
}

TEST_F(SenderTest, ADestinationThatOnlySaysThatItGetsOnIsNotWaitedForForEver) {
  unanswered_round(1000, 500ms);
  wait_for_barriers();
  std::atomic<bool> over{false};
  std::thread claiming([&] {
    for (std::uint64_t bytes = 1; !over; ++bytes) {
      peer->send(0, wire::make_header(FrameType::kTaken, 0, {}, bytes));
      std::this_thread::sleep_for(10ms);
    }
  });
  EXPECT_EQ(events.expect(kFailed).code, "CHANNEL_LOST");
  over = true;
  claiming.join();
}

TEST_F(SenderTest, ADestinationHasNotTakenMoreThanWasSent) {
  unanswered_round(10, 30s);
  wait_for_barriers();
  peer->send(0, wire::make_header(FrameType::kTaken, 0, {}, 1 << 20));
  EXPECT_EQ(events.expect(kFailed).code, "PROTOCOL");
}

TEST_F(SenderTest, WrongConfigurationsAreRefused) {
  make({10});
  const auto refused = [&](auto change) {
    SenderConfig with = config();
    change(with);
    EXPECT_THROW(Sender{std::move(with)}, std::invalid_argument);
  };
  refused([](SenderConfig& c) { c.regions.clear(); });
  refused([](SenderConfig& c) { c.regions[0] = nullptr; });
  refused([](SenderConfig& c) { c.channels = 0; });
  refused([](SenderConfig& c) { c.channels = 17; });
  refused([](SenderConfig& c) { c.tokens.pop_back(); });
  refused([](SenderConfig& c) { c.tokens.clear(); });
  refused([](SenderConfig& c) { c.host = "example"; });
  refused([](SenderConfig& c) { c.on_event = nullptr; });
  refused([](SenderConfig& c) { c.trackers.resize(2); });
}

// --- a peer that breaks the rules

struct Hostile {
  const char* name;
  unsigned channel;
  std::function<void(FakeDestination&, unsigned)> send;
};

void PrintTo(const Hostile& hostile, std::ostream* out) { *out << hostile.name; }

class HostileTest : public SenderTest, public testing::WithParamInterface<Hostile> {};

TEST_P(HostileTest, FailsBeforeTheSwitchover) {
  make({100});
  connect();
  GetParam().send(*peer, GetParam().channel);
  if (std::string_view(GetParam().name).starts_with("Held")) {
    // Well-formed requests wait for the switchover, and disturb nothing until then.
    sender->queue_populated();
    round(1);
    return;
  }
  EXPECT_EQ(events.expect(kFailed).code, "PROTOCOL");
}

TEST_P(HostileTest, IsACutAfterTheSwitchoverAndItsNumberIsBounded) {
  make({100});
  into_postcopy();
  for (std::uint32_t epoch = 1; epoch <= 3; ++epoch) {
    GetParam().send(*peer, GetParam().channel);
    events.expect(kPaused);
    peer->stop();
    peer->accept_epoch(epoch);
    events.expect(kRecovered);
  }
  GetParam().send(*peer, GetParam().channel);
  EXPECT_EQ(events.expect(kFailed).code, "PROTOCOL");
}

Hostile frame_of(const char* name, unsigned channel, wire::FrameHeader header, std::size_t payload_bytes = 0,
                 std::function<void(wire::FrameHeader&)> spoil = nullptr) {
  return {name, channel, [=](FakeDestination& peer, unsigned on) {
            const std::vector<std::byte> payload(payload_bytes, std::byte{1});
            wire::FrameHeader spoilt = header;
            wire::seal(spoilt, payload);
            if (spoil) spoil(spoilt);
            peer.send_raw(on, spoilt, payload);
          }};
}

INSTANTIATE_TEST_SUITE_P(
    Frames, HostileTest,
    testing::Values(
        Hostile{"Garbage", 0,
                [](FakeDestination& peer, unsigned on) {
                  std::array<std::byte, 4096> garbage;
                  garbage.fill(std::byte{0xa5});
                  (void)peer.stream(on).send_all(std::span<const std::byte>(garbage));
                }},
        frame_of("WrongChecksum", 1, wire::make_header(FrameType::kBarrierAck), 0,
                 [](wire::FrameHeader& h) { h.checksum ^= 1; }),
        frame_of("HugePayload", 0, wire::make_header(FrameType::kSuspects), 16,
                 [](wire::FrameHeader& h) { h.payload_bytes = 0xfffffff0U; }),
        frame_of("UnaskedBarrierAnswer", 0, wire::make_header(FrameType::kBarrierAck, 0, {}, 99)),
        frame_of("UnaskedBarrierAnswerOnDemand", 2, wire::make_header(FrameType::kBarrierAck, 0, {}, 99)),
        frame_of("UnaskedSwitchAnswer", 0, wire::make_header(FrameType::kSwitchAck)),
        frame_of("SuspectsOutsideARound", 0, wire::make_header(FrameType::kSuspects), 16),
        frame_of("TakenWithAPayload", 0, wire::make_header(FrameType::kTaken, 0, {}, 1), 16),
        frame_of("TakenOnDemand", 2, wire::make_header(FrameType::kTaken, 0, {}, 1)),
        Hostile{"FewerTakenThanBefore", 1,
                [](FakeDestination& peer, unsigned on) {
                  for (const std::uint64_t bytes : {5U, 4U})
                    peer.send(on, wire::make_header(FrameType::kTaken, 0, {}, bytes));
                }},
        frame_of("BitmapOutOfTurn", 2, wire::make_header(FrameType::kBitmap), 16),
        frame_of("PagesFromTheWrongSide", 0, wire::make_header(FrameType::kPages, 0, run_of(0, 1)), 4096),
        frame_of("ZeroFromTheWrongSide", 1, wire::make_header(FrameType::kZero, 0, run_of(0, 1))),
        frame_of("DiscardFromTheWrongSide", 1, wire::make_header(FrameType::kDiscard), 16),
        frame_of("FaultOnADataChannel", 1, wire::make_header(FrameType::kFaultRequest, 0, run_of(0, 1))),
        frame_of("HeldFaultOutside", 2, wire::make_header(FrameType::kFaultRequest, 0, run_of(100, 1))),
        frame_of("HeldFaultFarOutside", 2, wire::make_header(FrameType::kFaultRequest, 0, run_of(~0ULL, 1))),
        frame_of("HeldFaultInUnknownRegion", 2, wire::make_header(FrameType::kFaultRequest, 1, run_of(0, 1))),
        frame_of("FaultOfNothing", 2, wire::make_header(FrameType::kFaultRequest, 0, run_of(5, 0)))),
    [](const auto& hostile) { return hostile.param.name; });

TEST_F(SenderTest, SuspectsThatOverlap) {
  make({100});
  peer->suspects = [&](const SeenFrame& barrier) -> std::uint64_t {
    if (barrier.channel != 0) return 0;
    send_suspects(*peer, 0, {{10, 5}, {14, 2}});
    return 7;
  };
  connect();
  sender->queue_populated();
  sender->start_round(1);
  EXPECT_EQ(events.expect(kFailed).code, "PROTOCOL");
}

TEST_F(SenderTest, SuspectsOutsideTheRegion) {
  make({100});
  peer->suspects = [&](const SeenFrame& barrier) -> std::uint64_t {
    if (barrier.channel != 0) return 0;
    send_suspects(*peer, 0, {{99, 2}});
    return 2;
  };
  connect();
  sender->queue_populated();
  sender->start_round(1);
  EXPECT_EQ(events.expect(kFailed).code, "PROTOCOL");
}

// --- bandwidth

TEST_F(SenderTest, TheBandwidthLimitHoldsOverAllChannels) {
  make({1000});  // 4 MB
  SenderConfig with = config();
  with.bandwidth = 20'000'000;
  connect(std::move(with));
  sender->queue_populated();
  const auto begin = std::chrono::steady_clock::now();
  round(1);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const double expected = static_cast<double>(1000 * page_size()) / 20e6;
  EXPECT_GT(seconds, 0.75 * expected);
  expect_equal();
}

TEST_F(SenderTest, ANewLimitReachesAWaitingChannel) {
  make({1000});
  SenderConfig with = config();
  with.bandwidth = 10'000;  // minutes for this region
  connect(std::move(with));
  sender->queue_populated();
  sender->start_round(1);
  peer->wait_for([&] { return !peer->seen.empty(); });
  sender->set_bandwidth(0);
  events.expect(kRoundDone);
  expect_equal();
}

TEST_F(SenderTest, FaultsDoNotWaitForTheLimit) {
  make({1000});
  SenderConfig with = config();
  with.bandwidth = 10'000;
  connect(std::move(with));
  sender->queue_populated();
  sender->switch_over();
  events.expect(kSwitched);
  sender->start_push();
  for (std::uint64_t p = 0; p < 200; ++p) {
    peer->request_fault(0, p * 5);
    peer->wait_for([&] { return peer->have[0][p * 5]; });
  }
}

// --- the end

// The core's, by their names: a sanitizer may run threads of its own.
unsigned core_threads_now() {
  unsigned threads = 0;
  DIR* directory = ::opendir("/proc/self/task");
  while (const dirent* entry = ::readdir(directory)) {
    std::ifstream comm(std::string("/proc/self/task/") + entry->d_name + "/comm");
    std::string name;
    if (comm >> name && name.starts_with("mf-")) ++threads;
  }
  ::closedir(directory);
  return threads;
}

// A joined thread leaves /proc a moment after its join, and a new one has its name a moment after its start.
void expect_core_threads(bool some) {
  const auto deadline = std::chrono::steady_clock::now() + kTestPatience;
  while ((core_threads_now() > 0) != some && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_EQ(core_threads_now() > 0, some);
}

unsigned descriptors_now() {
  unsigned descriptors = 0;
  DIR* directory = ::opendir("/proc/self/fd");
  while (const dirent* entry = ::readdir(directory)) descriptors += entry->d_name[0] != '.' ? 1 : 0;
  ::closedir(directory);
  return descriptors;
}

TEST_F(SenderTest, CloseInEveryStateEndsEveryThread) {
  make({3000});
  const unsigned descriptors = descriptors_now();
  for (const bool goodbye : {false, true}) {
    for (int state = 0; state < 8; ++state) {
      SCOPED_TRACE(state);
      SenderConfig with = config();
      if (state == 4) with.bandwidth = 1000;
      with.goodbye_timeout = kTestPatience;
      sender = std::make_unique<Sender>(std::move(with));
      expect_core_threads(true);
      if (state >= 1) sender->connect();  // 1: in the middle of dialling
      if (state == 1 && goodbye) peer->wait_for_dial();
      if (state >= 2) {
        peer->accept_epoch();
        events.expect(kConnected);
        peer->goodbye = false;
      }
      if (state >= 3) sender->queue_populated();
      if (state == 3 || state == 4) sender->start_round(1);  // 4: waiting for the limit
      if (state >= 5) {
        sender->switch_over();
        events.expect(kSwitched);
      }
      if (state >= 6) sender->start_push();
      if (state == 7) events.expect(kEvicted);
      sender->close(goodbye);
      sender->close(goodbye);
      peer->stop();  // the peer's threads end with their connections
      expect_core_threads(false);
      if (state >= 2) {
        EXPECT_EQ(peer->goodbye, goodbye);
      }
      sender.reset();
      // Accept and drop what a dial has left behind.
      if (state == 1) {
        const auto fresh = std::move(peer);
        peer = std::make_unique<FakeDestination>(
            FakeDestination::Options{.channels = kChannels, .pages = {3000}, .page_size = page_size()});
      }
      while (!events.empty()) events.next();
      peer->have[0].assign(3000, false);
    }
  }
  peer->cut();
  EXPECT_LE(descriptors_now(), descriptors + kChannels + 1);
}

TEST_F(SenderTest, CloseWhilePaused) {
  make({100});
  into_postcopy();
  peer->cut();
  events.expect(kPaused);
  sender->close(true);
  EXPECT_TRUE(events.empty());
}

TEST_F(SenderTest, ClosingTwiceFromTwoThreads) {
  make({2000});
  connect();
  sender->queue_populated();
  sender->start_round(1);
  std::jthread other([&] { sender->close(true); });
  sender->close(false);
}

TEST_F(SenderTest, ARegionThatIsRetiredInTheMiddleIsNotTouchedAgain) {
  for (const bool blocked : {false, true}) {
    SCOPED_TRACE(blocked);
    regions.clear();
    trackers.clear();
    make({4000});
    // The peer's threads outlive this turn of the loop.
    struct Shared {
      explicit Shared(bool held) : hold(held) {}
      std::atomic<bool> hold;
      std::atomic<unsigned> arrived{0};
    };
    const auto shared = std::make_shared<Shared>(blocked);
    peer->on_frame = [shared](const SeenFrame&) {
      ++shared->arrived;
      shared->arrived.notify_all();
      shared->hold.wait(true);  // the socket fills, the sender blocks inside the region's memory
      return true;
    };
    connect();
    sender->queue_populated();
    sender->start_round(1);
    shared->arrived.wait(0);
    regions[0]->retire();
    ASSERT_EQ(::mprotect(page(0), 4000 * page_size(), PROT_NONE), 0);
    // Done before the region was retired, or not at all.
    EngineEvent event = events.next();
    if (event.kind == kRoundDone) event = events.next();
    EXPECT_EQ(event.code, "REGION_GONE");
    EXPECT_THROW((void)sender->digest(0), RegionGone);
    shared->hold = false;
    shared->hold.notify_all();
    sender.reset();
    ASSERT_EQ(::mprotect(page(0), 4000 * page_size(), PROT_READ | PROT_WRITE), 0);
  }
}

TEST_F(SenderTest, ARetiredRegionMakesNoSender) {
  make({10});
  regions[0]->retire();
  EXPECT_THROW(Sender{config()}, RegionGone);
}

}  // namespace
}  // namespace memferry::sender_test
