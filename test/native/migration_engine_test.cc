// Both engines together in one process, over real loopback sockets, with a guest that writes throughout:
// every mode, every tracker, several channels, cuts in the middle; every byte is compared.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <random>
#include <thread>

#include "os/pagemap.h"
#include "track/dirty_tracker.h"
#include "transfer/listener.h"
#include "transfer/receiver.h"
#include "transfer/sender.h"
#include "wire/socket.h"
#include "wire/stream.h"

namespace memferry::engine_test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;

constexpr auto kPatience = 60s;

class Events {
 public:
  EngineCallback callback() {
    return [this](const EngineEvent& event) {
      const std::lock_guard lock(mutex_);
      events_.push_back(event);
      changed_.notify_all();
    };
  }
  EngineEvent expect(EngineEventKind kind) {
    std::unique_lock lock(mutex_);
    EngineEvent event;
    event.kind = kFailed;
    event.code = "TEST_TIMEOUT";
    if (changed_.wait_for(lock, kPatience, [this] { return !events_.empty(); })) {
      event = events_.front();
      events_.pop_front();
    }
    EXPECT_EQ(static_cast<int>(event.kind), static_cast<int>(kind)) << event.code << " " << event.message;
    return event;
  }
  // The next of two kinds that may come in either order.
  EngineEvent next() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [this] { return !events_.empty(); }));
    EngineEvent event = events_.front();
    events_.pop_front();
    return event;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<EngineEvent> events_;
};

// Between the two engines, so that the network can be cut without either of them knowing.
class Network {
 public:
  explicit Network(std::uint16_t to)
      : to_(wire::SocketAddress::parse("127.0.0.1", to)),
        listening_(wire::listen_on(wire::SocketAddress::parse("127.0.0.1", 0))),
        port_(wire::SocketAddress::local(listening_.get()).port()),
        acceptor_([this] { accept_loop(); }) {}
  ~Network() {
    stopping_ = true;
    acceptor_.join();
    cut();
    for (auto& link : links_) link.join();
  }
  std::uint16_t port() const { return port_; }
  void cut() {
    const std::lock_guard lock(mutex_);
    for (auto& link : links_) {
      link.a->shutdown();
      link.b->shutdown();
    }
  }
  std::uint64_t bytes() const { return bytes_; }

 private:
  struct Link {
    std::unique_ptr<wire::PlainStream> a;
    std::unique_ptr<wire::PlainStream> b;
    std::thread forth;
    std::thread back;
    void join() {
      forth.join();
      back.join();
    }
  };
  void pump(wire::Stream& from, wire::Stream& to) {
    std::vector<std::byte> buffer(64 * 1024);
    for (;;) {
      std::size_t received = 0;
      if (!from.recv_some(buffer, received).done()) break;
      bytes_ += received;
      if (!to.send_all(std::span<const std::byte>(buffer).first(received)).done()) break;
    }
    from.shutdown();
    to.shutdown();
  }
  void accept_loop() {
    while (!stopping_) {
      if (wire::wait_readable(listening_.get(), std::chrono::steady_clock::now() + 20ms, -1) !=
          wire::DialResult::Kind::kConnected) {
        continue;
      }
      UniqueFd accepted(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!accepted) continue;
      wire::configure_connection(accepted.get());
      wire::DialResult dialled = wire::dial(to_, 5s, -1);
      if (dialled.kind != wire::DialResult::Kind::kConnected) continue;
      const std::lock_guard lock(mutex_);
      Link& link = links_.emplace_back();
      link.a = std::make_unique<wire::PlainStream>(std::move(accepted));
      link.b = std::make_unique<wire::PlainStream>(std::move(dialled.fd));
      link.forth = std::thread([this, &link] { pump(*link.a, *link.b); });
      link.back = std::thread([this, &link] { pump(*link.b, *link.a); });
    }
  }
  const wire::SocketAddress to_;
  const UniqueFd listening_;
  const std::uint16_t port_;
  std::atomic<bool> stopping_{false};
  std::atomic<std::uint64_t> bytes_{0};
  std::mutex mutex_;
  std::list<Link> links_;
  std::thread acceptor_;
};

// Writes words and whole pages, some of them zero again, until it is paused.
class Guest {
 public:
  Guest(Region& region, std::uint64_t seed) : thread_([this, &region, seed] { run(region, seed); }) {}
  ~Guest() { pause(); }
  void pause() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
  }
  std::uint64_t writes() const { return writes_; }

 private:
  void run(Region& region, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    const std::uint64_t size = region.page_size();
    while (!stop_) {
      const std::uint64_t choice = random();
      std::byte* page = region.address(PageNumber{(choice >> 8) % region.pages()}).pointer();
      if (choice % 64 == 0) {
        std::memset(page, 0, size);
      } else if (choice % 64 == 1) {
        std::memset(page, static_cast<int>(choice >> 16), size);
      } else {
        reinterpret_cast<std::uint64_t*>(page)[(choice >> 40) % (size / 8)] = choice;
      }
      if (++writes_ % 64 == 0) std::this_thread::yield();
    }
  }
  std::atomic<bool> stop_{false};
  std::atomic<std::uint64_t> writes_{0};
  std::thread thread_;
};

struct Case {
  TrackerKind tracker;
  unsigned channels;
  wire::Compress compress = wire::Compress::kOff;
  std::uint64_t delta_cache = 0;
  bool split = false;  // TrackerOptions::split_huge_pages, which is for pages of any size
};

class EngineTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    const TrackerProbe probe = probe_tracker(GetParam().tracker);
    if (!probe.available) GTEST_SKIP() << probe.name << ": " << probe.reason;
    std::mt19937_64 random(5);
    for (const std::uint64_t pages : {3000u, 70u}) {
      source.push_back(Region::allocate(pages * page_size()));
      target.push_back(Region::allocate(pages * page_size()));
      auto words = source.back()->contiguous(PageRun{PageNumber{0}, pages * 3 / 4});
      for (std::size_t i = 0; i < words.size(); i += 8) {
        // A third of the pages are of few words: these pack.
        const std::uint64_t word = i / page_size() % 3 == 0 ? 1 + random() % 5 : random();
        std::memcpy(words.data() + i, &word, 8);
      }
    }
    for (unsigned i = 0; i < 8 * (GetParam().channels + 1); ++i) {
      wire::Token token{};
      token[0] = static_cast<std::uint8_t>(i + 1);
      tokens.push_back(token);
    }
  }
  static std::uint64_t page_size() { return static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)); }

  void connect(bool tracked, bool paging_from_start, bool may_page) {
    ReceiverConfig to;
    to.regions = target;
    to.migration[0] = 42;
    to.channels = GetParam().channels;
    to.tokens = tokens;
    to.paging_from_start = paging_from_start;
    to.may_page = may_page;
    to.keep_page_hashes = true;
    to.recover_timeout = 20s;
    to.encodings = encodings();
    to.on_event = arrived.callback();
    receiver = Receiver::create(to);
    listener = std::make_unique<Listener>(Listener::Config{"127.0.0.1", 0, [](UniqueFd, std::string) {}});
    listener->add(receiver);
    network = std::make_unique<Network>(listener->port());

    SenderConfig from;
    from.regions = source;
    if (tracked) {
      for (const auto& region : source) {
        trackers.push_back(make_tracker(GetParam().tracker, region, {.split_huge_pages = GetParam().split}));
        trackers.back()->arm();
        from.trackers.push_back(trackers.back());
      }
    }
    from.host = "127.0.0.1";
    from.port = network->port();
    from.migration = to.migration;
    from.channels = GetParam().channels;
    from.tokens = tokens;
    from.recover_timeout = 20s;
    from.goodbye_timeout = 5s;
    from.compress = GetParam().compress;
    from.destination_encodings = encodings();
    from.delta_cache_bytes = GetParam().delta_cache;
    from.on_event = left.callback();
    sender = std::make_unique<Sender>(std::move(from));
    sender->connect();
    left.expect(kConnected);
    arrived.expect(kFirstChannel);
  }
  static std::uint16_t encodings() {
    std::uint16_t agreed =
        GetParam().compress == wire::Compress::kOff ? std::uint16_t{0} : wire::kCompressions;
    if (GetParam().delta_cache > 0) agreed |= wire::kFlagDelta;
    return agreed;
  }
  static bool forced() {
    return GetParam().compress == wire::Compress::kLz4 || GetParam().compress == wire::Compress::kZstd;
  }
  // What was encoded got smaller, and was encoded at all where that is certain.
  void expect_encoded(bool later_rounds) {
    const SenderStats stats = sender->stats();
    // Adaptive compression may find that it pays through the forwarder, or not.
    if (GetParam().compress != wire::Compress::kAuto) {
      EXPECT_EQ(stats.compression.pages > 0, forced());
    }
    EXPECT_LE(stats.compression.encoded_bytes, stats.compression.raw_bytes);
    if (forced()) {
      EXPECT_LT(stats.compression.encoded_bytes, stats.compression.raw_bytes);
    }
    if (GetParam().delta_cache == 0 || !later_rounds) {
      EXPECT_EQ(stats.delta.pages, 0u);
    } else {
      EXPECT_GT(stats.delta.pages, 0u);
      EXPECT_LT(stats.delta.encoded_bytes, stats.delta.raw_bytes / 2);
    }
  }
  std::uint64_t round(std::uint64_t tag) {
    sender->start_round(tag);
    const EngineEvent event = left.expect(kRoundDone);
    EXPECT_EQ(event.tag, tag);
    return event.suspects;
  }
  // Reads the target as a resumed guest would: in a random order, faulting where a page is missing.
  void expect_equal() {
    for (std::size_t r = 0; r < source.size(); ++r) {
      std::vector<std::uint64_t> order(source[r]->pages());
      for (std::uint64_t p = 0; p < order.size(); ++p) order[p] = p;
      std::shuffle(order.begin(), order.end(), std::mt19937(9));
      for (const std::uint64_t p : order) {
        ASSERT_EQ(std::memcmp(source[r]->address(PageNumber{p}).pointer(),
                              target[r]->address(PageNumber{p}).pointer(), page_size()),
                  0)
            << "region " << r << " page " << p;
      }
    }
  }
  void expect_equal_digests() {
    for (std::uint32_t r = 0; r < source.size(); ++r) {
      const Hash128 theirs = sender->digest(r);
      EXPECT_EQ(theirs, receiver->digest(r)) << "region " << r;
    }
  }

  std::vector<std::shared_ptr<Region>> source;
  std::vector<std::shared_ptr<Region>> target;
  std::vector<wire::Token> tokens;
  std::vector<std::shared_ptr<DirtyTracker>> trackers;
  Events arrived;
  Events left;
  std::shared_ptr<Receiver> receiver;
  std::unique_ptr<Listener> listener;
  std::unique_ptr<Network> network;
  std::unique_ptr<Sender> sender;
};

TEST_P(EngineTest, StopAndCopy) {
  connect(false, false, false);
  sender->queue_populated();
  EXPECT_EQ(round(1), 0u);
  EXPECT_TRUE(receiver->ready());
  expect_equal();
  expect_equal_digests();
  expect_encoded(false);
  sender->close(true);
  arrived.expect(kComplete);
}

TEST_P(EngineTest, PreCopyUnderAWriter) {
  connect(true, false, false);
  Guest guest(*source[0], 1);
  sender->queue_populated();
  std::uint64_t tag = 1;
  for (; tag <= 4; ++tag) {
    round(tag);
    // No round before the guest has written something for it.
    const std::uint64_t writes = guest.writes();
    while (guest.writes() < writes + 100) std::this_thread::yield();
    sender->queue_dirty();
  }
  guest.pause();
  sender->queue_dirty();
  EXPECT_EQ(round(tag), 0u) << "nobody writes any more, so no copy can be torn";
  EXPECT_TRUE(receiver->ready());
  expect_equal();
  expect_equal_digests();
  EXPECT_GT(sender->stats().pages_resent, 0u);
  expect_encoded(true);
  sender->close(true);
  arrived.expect(kComplete);
}

// With a cache that holds every page.
class DeltaEngineTest : public EngineTest {};

// What the source takes for the base is not what the destination has: found out by the checksum, and sent as it is.
TEST_P(DeltaEngineTest, AWrongBaseGoesAgainPlainly) {
  connect(true, false, false);
  sender->queue_populated();
  ASSERT_EQ(round(1), 0u);
  // Nobody runs at the destination, so this is no guest's doing.
  for (const std::uint64_t page : {7u, 8u, 700u}) {
    target[0]->address(PageNumber{page}).pointer()[100] ^= std::byte{1};
  }
  for (const std::uint64_t page : {6u, 7u, 8u, 9u, 300u, 700u}) {
    source[0]->address(PageNumber{page}).pointer()[2000] ^= std::byte{1};
  }
  sender->queue_dirty();
  const std::uint64_t suspect = round(2);
  EXPECT_GE(suspect, 3u);
  EXPECT_LE(suspect, 5u) << "whole runs, and no others";
  EXPECT_FALSE(receiver->ready());
  const std::uint64_t deltas = sender->stats().delta.pages;
  EXPECT_GE(deltas, 6u);
  EXPECT_EQ(round(3), 0u);
  EXPECT_EQ(sender->stats().delta.pages, deltas) << "a suspect page has left the cache";
  EXPECT_TRUE(receiver->ready());
  expect_equal();
  expect_equal_digests();
}

TEST_P(EngineTest, PostCopy) {
  connect(false, true, true);
  Guest guest(*source[0], 2);
  sender->queue_populated();  // while the guest goes on touching pages that were untouched
  const std::uint64_t writes = guest.writes();
  while (guest.writes() < writes + 100) std::this_thread::yield();
  guest.pause();
  sender->switch_over();
  left.expect(kSwitched);
  arrived.expect(kSwitched);
  sender->start_push();
  expect_equal();
  left.expect(kEvicted);
  arrived.expect(kComplete);
  expect_equal();
  expect_equal_digests();
  sender->close(true);
}

TEST_P(EngineTest, PostCopyByFaultsAlone) {
  connect(false, true, true);
  sender->queue_populated();
  sender->switch_over();
  left.expect(kSwitched);
  arrived.expect(kSwitched);
  expect_equal();
  EXPECT_GT(sender->stats().faults_served, 0u);
  EXPECT_GT(receiver->stats().faults.count, 0u);
  sender->start_push();
  left.expect(kEvicted);
  arrived.expect(kComplete);
  expect_equal_digests();
}

TEST_P(EngineTest, HybridUnderAWriter) {
  connect(true, false, true);
  Guest guest(*source[0], 3);
  sender->queue_populated();
  round(1);
  sender->queue_dirty();
  round(2);
  sender->discard_dirty(3);
  left.expect(kRoundDone);
  const std::uint64_t writes = guest.writes();
  while (guest.writes() < writes + 100) std::this_thread::yield();
  guest.pause();
  // The guest may have dirtied all of its region before the discards; nobody has written here since round 1.
  std::memset(source[1]->address(PageNumber{5}).pointer(), 0x3c, 3 * page_size());
  EXPECT_GE(sender->switch_over(), 3u);
  left.expect(kSwitched);
  arrived.expect(kSwitched);
  sender->start_push();
  expect_equal();
  left.expect(kEvicted);
  arrived.expect(kComplete);
  expect_equal();
  expect_equal_digests();
}

TEST_P(EngineTest, PostCopyWithCuts) {
  connect(false, true, true);
  sender->queue_populated();
  sender->switch_over();
  left.expect(kSwitched);
  arrived.expect(kSwitched);
  // The push stands still, so that there is something left for every cut; the guest reads on.
  sender->set_bandwidth(1000);
  sender->start_push();
  constexpr std::uint64_t kPagesAPhase = 500;
  for (unsigned phase = 0; phase < 3; ++phase) {
    const std::uint64_t before = network->bytes();
    std::thread guest([&] {
      for (std::uint64_t p = phase * kPagesAPhase; p < (phase + 1) * kPagesAPhase; ++p) {
        EXPECT_EQ(std::memcmp(source[0]->address(PageNumber{p}).pointer(),
                              target[0]->address(PageNumber{p}).pointer(), page_size()),
                  0)
            << "page " << p;
      }
    });
    while (network->bytes() < before + 20 * page_size()) std::this_thread::yield();
    network->cut();
    left.expect(kPaused);
    left.expect(kRecovered);
    arrived.expect(kPaused);
    arrived.expect(kRecovered);
    guest.join();
  }
  sender->set_bandwidth(0);
  left.expect(kEvicted);
  arrived.expect(kComplete);
  expect_equal();
  expect_equal_digests();
  EXPECT_GE(sender->stats().redials, 3u);
}

TEST_P(EngineTest, SourceDiesInPostCopyAndTheLossIsReported) {
  connect(false, true, true);
  sender->queue_populated();
  sender->switch_over();
  left.expect(kSwitched);
  arrived.expect(kSwitched);
  sender->close(false);
  arrived.expect(kPaused);
  receiver->close();  // poisons; nothing may hang
}

std::string name_of(const testing::TestParamInfo<Case>& info) {
  constexpr std::array<const char*, 4> kCompress{"", "Auto", "Lz4", "Zstd"};
  std::string name(tracker_name(info.param.tracker));
  std::erase(name, '-');
  return name + std::to_string(info.param.channels) + "Channels" +
         kCompress[static_cast<std::size_t>(info.param.compress)] +
         (info.param.delta_cache > 0 ? "Delta" + std::to_string(info.param.delta_cache >> 20) : "") +
         (info.param.split ? "Split" : "");
}

INSTANTIATE_TEST_SUITE_P(
    All, EngineTest,
    testing::Values(Case{TrackerKind::kUffdWpAsync, 1}, Case{TrackerKind::kUffdWpAsync, 2},
                    Case{TrackerKind::kUffdWpAsync, 4}, Case{TrackerKind::kHashDiff, 2},
                    Case{TrackerKind::kSoftDirty, 2}, Case{TrackerKind::kUffdWp, 2},
                    Case{TrackerKind::kUffdWpAsync, 2, wire::Compress::kLz4},
                    Case{TrackerKind::kHashDiff, 1, wire::Compress::kZstd},
                    Case{TrackerKind::kUffdWpAsync, 2, wire::Compress::kAuto, 64 << 20},
                    // Too small for all that is written.
                    Case{TrackerKind::kHashDiff, 2, wire::Compress::kZstd, 1 << 20},
                    Case{TrackerKind::kUffdWpAsync, 4, wire::Compress::kOff, 64 << 20},
                    Case{TrackerKind::kUffdWpAsync, 2, wire::Compress::kOff, 0, true},
                    Case{TrackerKind::kUffdWpAsync, 4, wire::Compress::kAuto, 64 << 20, true}),
    name_of);

INSTANTIATE_TEST_SUITE_P(All, DeltaEngineTest,
                         testing::Values(Case{TrackerKind::kUffdWpAsync, 2, wire::Compress::kAuto, 64 << 20},
                                         Case{TrackerKind::kHashDiff, 1, wire::Compress::kOff, 64 << 20}),
                         name_of);

}  // namespace
}  // namespace memferry::engine_test
