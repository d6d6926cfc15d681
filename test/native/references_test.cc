// References as the source sends them: only what the destination has said that it has, never again what was refused, and
// a round or push is over when every page of it has arrived; destinations that lie.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <cstring>
#include <random>

#include "fake_destination.h"
#include "share_file_support.h"
#include "transfer/known_names.h"
#include "transfer/page_referrer.h"
#include "transfer/reference_pace.h"

namespace memferry::sender_test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;
using wire::FrameType;

constexpr std::uint64_t kPages = 300;

PageRun run_of(std::uint64_t first, std::uint64_t count) { return PageRun{PageNumber{first}, count}; }

class Dirty final : public DirtyTracker {
 public:
  std::string_view name() const override { return "scripted"; }
  void arm() override {}
  std::uint64_t collect(AtomicBitmap& dirty) override {
    std::uint64_t pages = 0;
    for (const PageRun run : next) pages += dirty.set_run(run);
    next.clear();
    return pages;
  }
  void disarm() override {}
  std::vector<PageRun> next;
};

class ReferencesTest : public testing::Test {
 protected:
  ReferencesTest() : region(Region::allocate(kPages * page_size())) {
    for (std::uint64_t i = 0; i < kPages; ++i) {
      std::memcpy(region->address(PageNumber{i}).pointer(), test::page_of(i).data(), page_size());
    }
    peer = std::make_unique<FakeDestination>(
        FakeDestination::Options{.channels = 2, .pages = {kPages}, .page_size = page_size()});
  }
  ~ReferencesTest() override {
    if (sender) sender->close(false);
  }
  static std::uint64_t page_size() { return system_page_size(); }

  void connect(bool references = true) {
    SenderConfig config;
    config.regions = {region};
    config.trackers = {tracker};
    config.host = "127.0.0.1";
    config.port = peer->port();
    config.channels = 2;
    config.tokens = FakeDestination::tokens(2);
    config.recover_timeout = 20s;
    config.on_event = events.callback();
    if (references) config.references = test::key_of(1);
    sender = std::make_unique<Sender>(std::move(config));
    sender->connect();
    peer->accept_epoch();
    events.expect(kConnected);
    sender->queue_populated();
  }
  static wire::KnownName name(std::uint64_t page) {
    return PageShareReader::name_of(ContentHasher(test::key_of(1))(test::page_of(page)));
  }
  void tell(std::uint64_t first, std::uint64_t count) {
    std::vector<wire::KnownName> names;
    for (std::uint64_t i = first; i < first + count; ++i) names.push_back(name(i));
    peer->send(1, wire::make_header(FrameType::kKnown, 0, run_of(0, count)), std::as_bytes(std::span(names)));
    // The first names take memory: then they have been read.
    for (int i = 0; i < 20'000 && sender->stats().extra_memory_bytes < before_tell + 8; ++i) {
      std::this_thread::sleep_for(1ms);
    }
    ASSERT_GE(sender->stats().extra_memory_bytes, before_tell + 8);
  }
  void refuse(const SeenFrame& frame) {
    std::vector<wire::KnownName> names;
    for (std::uint64_t i = 0; i < frame.header.page_count; ++i)
      names.push_back(name(frame.header.first_page + i));
    peer->send(frame.channel,
               wire::make_header(FrameType::kUnresolved, 0,
                                 run_of(frame.header.first_page, frame.header.page_count)),
               std::as_bytes(std::span(names)));
  }
  std::uint64_t referred() {
    std::uint64_t pages = 0;
    for (const SeenFrame& frame : peer->frames()) {
      if (frame.type() == FrameType::kKnownReference) pages += frame.header.page_count;
    }
    return pages;
  }
  // Which pages have come plainly.
  std::vector<bool> came() {
    const std::lock_guard lock(peer->mutex);
    return peer->have[0];
  }

  std::shared_ptr<Region> region;
  std::shared_ptr<Dirty> tracker = std::make_shared<Dirty>();
  EventLog events;
  std::unique_ptr<FakeDestination> peer;
  std::unique_ptr<Sender> sender;
  std::uint64_t before_tell = 0;
};

TEST_F(ReferencesTest, OnlyWhatWasToldGoesAsAReference) {
  connect();
  before_tell = sender->stats().extra_memory_bytes;
  tell(100, 50);
  sender->start_round(1);
  EXPECT_EQ(events.expect(kRoundDone).suspects, 0U);
  EXPECT_EQ(referred(), 50U);
  const auto plain = came();
  for (std::uint64_t i = 0; i < kPages; ++i) EXPECT_EQ(plain[i], i < 100 || i >= 150) << i;
  const SenderStats stats = sender->stats();
  ASSERT_TRUE(stats.dedup);
  EXPECT_EQ(stats.dedup->pages, 50U);
  EXPECT_EQ(stats.pages_sent, kPages - 50);
  EXPECT_GT(stats.dedup->examined, 0U);
}

TEST_F(ReferencesTest, NothingIsHashedBeforeAnythingIsTold) {
  connect();
  sender->start_round(1);
  events.expect(kRoundDone);
  EXPECT_EQ(sender->stats().dedup->examined, 0U);
  EXPECT_EQ(referred(), 0U);
}

TEST_F(ReferencesTest, ARoundWithoutReferencesHasNone) {
  connect();
  before_tell = sender->stats().extra_memory_bytes;
  tell(0, kPages);
  sender->start_round(1, false);
  events.expect(kRoundDone);
  EXPECT_EQ(referred(), 0U);
}

TEST_F(ReferencesTest, WhatIsRefusedComesPlainlyBeforeTheRoundIsOver) {
  // Some at once, some only just before the barrier is answered.
  std::mutex mutex;
  std::vector<SeenFrame> late;
  peer->on_frame = [&](const SeenFrame& frame) {
    if (frame.type() == FrameType::kKnownReference) {
      if (frame.header.first_page % 2 == 0) {
        refuse(frame);
      } else {
        const std::lock_guard lock(mutex);
        late.push_back(frame);
      }
    }
    if (frame.type() == FrameType::kBarrier) {
      const std::lock_guard lock(mutex);
      for (auto it = late.begin(); it != late.end();) {
        if (it->channel == frame.channel) {
          refuse(*it);
          it = late.erase(it);
        } else {
          ++it;
        }
      }
    }
    return true;
  };
  connect();
  before_tell = sender->stats().extra_memory_bytes;
  tell(0, kPages);
  sender->start_round(7);
  const EngineEvent done = events.expect(kRoundDone);
  EXPECT_EQ(done.tag, 7U);
  EXPECT_EQ(done.suspects, 0U);
  EXPECT_TRUE(events.empty());
  for (const bool page : came()) EXPECT_TRUE(page);
  const std::lock_guard lock(peer->mutex);
  EXPECT_EQ(
      std::memcmp(peer->memory[0].data(), region->address(PageNumber{0}).pointer(), kPages * page_size()), 0);
  EXPECT_EQ(sender->stats().dedup->pages, 0U);
  EXPECT_EQ(sender->stats().dedup->refused, kPages);
}

TEST_F(ReferencesTest, WhatWasRefusedOnceNeverGoesAsAReferenceAgain) {
  bool refusing = true;
  peer->on_frame = [&](const SeenFrame& frame) {
    if (refusing && frame.type() == FrameType::kKnownReference) refuse(frame);
    return true;
  };
  connect();
  before_tell = sender->stats().extra_memory_bytes;
  tell(0, 10);
  sender->start_round(1);
  events.expect(kRoundDone);
  EXPECT_EQ(referred(), 10U);
  refusing = false;
  before_tell = 0;
  tell(0, 20);
  // A round of nothing: its barrier is answered behind the names.
  sender->start_round(2);
  events.expect(kRoundDone);
  tracker->next = {run_of(0, 20)};
  sender->queue_dirty();
  sender->start_round(3);
  events.expect(kRoundDone);
  EXPECT_EQ(referred(), 20U) << "pages 10 to 19, and none of the first ten";
}

TEST_F(ReferencesTest, APushIsOverWhenWhatWasRefusedHasArrived) {
  peer->on_frame = [&](const SeenFrame& frame) {
    if (frame.type() == FrameType::kKnownReference && frame.header.first_page % 3 == 0) refuse(frame);
    return true;
  };
  connect();
  before_tell = sender->stats().extra_memory_bytes;
  for (std::uint64_t i = 0; i < kPages; i += 2) tell(i, 1);
  sender->switch_over();
  events.expect(kSwitched);
  sender->start_push();
  events.expect(kEvicted);
  const auto plain = came();
  std::vector<bool> refused(kPages);
  for (const SeenFrame& frame : peer->frames()) {
    if (frame.type() != FrameType::kKnownReference) continue;
    for (std::uint64_t i = 0; i < frame.header.page_count; ++i) {
      refused[frame.header.first_page + i] = frame.header.first_page % 3 == 0;
    }
  }
  for (std::uint64_t i = 0; i < kPages; ++i) {
    if (i % 2 == 1 || refused[i]) {
      EXPECT_TRUE(plain[i]) << i;
    }
  }
  EXPECT_GT(referred(), 0U);
  EXPECT_EQ(sender->stats().pages_pending, 0U);
}

TEST_F(ReferencesTest, AnswersToFaultsAreNoReferences) {
  connect();
  before_tell = sender->stats().extra_memory_bytes;
  tell(0, kPages);
  sender->switch_over();
  events.expect(kSwitched);
  peer->request_fault(0, 42);
  peer->wait_for([&] { return peer->have[0][42]; });
  EXPECT_EQ(referred(), 0U);
}

TEST_F(ReferencesTest, EveryLieOfADestinationIsFoundOut) {
  struct Lie {
    const char* name;
    bool agreed;
    std::function<void(FakeDestination&)> tell;
  };
  const std::vector<std::byte> bytes(64 * 1024);
  const auto says = [&](FrameType type, std::uint32_t in, PageRun run, std::size_t length,
                        unsigned channel = 0) {
    return [=](FakeDestination& to) {
      to.send(channel, wire::make_header(type, in, run), std::span<const std::byte>(bytes).first(length));
    };
  };
  const std::vector<Lie> lies = {
      {"names that were not agreed on", false, says(FrameType::kKnown, 0, run_of(0, 1), 8)},
      {"a refusal that was not agreed on", false, says(FrameType::kUnresolved, 0, run_of(0, 1), 8)},
      {"too many names", true,
       says(FrameType::kKnown, 0, run_of(0, wire::kMostKnownNames + 1), (wire::kMostKnownNames + 1) * 8)},
      {"no names", true, says(FrameType::kKnown, 0, run_of(0, 0), 0)},
      {"half a name", true, says(FrameType::kKnown, 0, run_of(0, 1), 4)},
      {"names on the demand channel", true, says(FrameType::kKnown, 0, run_of(0, 1), 8, 2)},
      {"a refusal on the demand channel", true, says(FrameType::kUnresolved, 0, run_of(0, 1), 8, 2)},
      {"a refusal of what was not sent", true, says(FrameType::kUnresolved, 0, run_of(0, 1), 8)},
      {"a refusal in no region", true, says(FrameType::kUnresolved, 3, run_of(0, 1), 8)},
      {"a refusal outside", true, says(FrameType::kUnresolved, 0, run_of(kPages, 1), 8)},
      {"a refusal that overflows", true, says(FrameType::kUnresolved, 0, run_of(~0ULL, 2), 16)},
      {"a reference, as if it were the source", true, says(FrameType::kKnownReference, 0, run_of(0, 1), 32)},
  };
  for (const Lie& lie : lies) {
    SCOPED_TRACE(lie.name);
    if (sender) sender->close(false);
    sender.reset();
    peer = std::make_unique<FakeDestination>(
        FakeDestination::Options{.channels = 2, .pages = {kPages}, .page_size = page_size()});
    peer->answer_barriers = false;
    while (!events.empty()) events.next();
    connect(lie.agreed);
    sender->start_round(1);
    peer->wait_for([&] {
      return std::count_if(peer->seen.begin(), peer->seen.end(),
                           [](const SeenFrame& frame) { return frame.type() == FrameType::kBarrier; }) == 2;
    });
    lie.tell(*peer);
    const EngineEvent failed = events.expect(kFailed);
    EXPECT_TRUE(failed.code == "CHANNEL_LOST" || failed.code == "PROTOCOL") << failed.code;
  }
}

TEST_F(ReferencesTest, ARefusalTwiceIsFoundOut) {
  peer->answer_barriers = false;
  peer->on_frame = [&](const SeenFrame& frame) {
    if (frame.type() == FrameType::kKnownReference) {
      refuse(frame);
      refuse(frame);
    }
    return true;
  };
  connect();
  before_tell = sender->stats().extra_memory_bytes;
  tell(0, 5);
  sender->start_round(1);
  events.expect(kFailed);
}

// Over TCP, to somebody who reads slowly.
TEST(PageReferrerTest, SaysWhatAFullConnectionTakes) {
  const UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t bytes = sizeof address;
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), bytes), 0);
  ASSERT_EQ(::listen(listener.get(), 1), 0);
  ASSERT_EQ(::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &bytes), 0);
  const UniqueFd out(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(::connect(out.get(), reinterpret_cast<sockaddr*>(&address), bytes), 0);
  const UniqueFd in(::accept(listener.get(), nullptr, nullptr));
  ASSERT_TRUE(in);
  std::thread reader([&] {
    std::vector<std::byte> into(64U << 10U);
    while (::recv(in.get(), into.data(), into.size(), 0) > 0) std::this_thread::sleep_for(1ms);
  });
  const SendQueue queue({Region::allocate(system_page_size())});
  References references(test::key_of(1), queue);
  EXPECT_EQ(references.stats().link_bytes_per_second, 0);
  {
    PageReferrer referrer(references, system_page_size());
    const std::vector<std::byte> block(64U << 10U);
    for (int i = 0; i < 100000 && references.stats().link_bytes_per_second == 0; ++i) {
      ASSERT_GT(::send(out.get(), block.data(), block.size(), MSG_NOSIGNAL), 0);
      referrer.sent(out.get(), 0, block.size(), block.size());
    }
    EXPECT_GT(references.stats().link_bytes_per_second, 0);
  }
  EXPECT_EQ(references.stats().link_bytes_per_second, 0) << "a connection that is gone takes nothing";
  ::shutdown(out.get(), SHUT_WR);
  reader.join();
}

TEST(KnownNamesTest, BehavesAsASet) {
  std::mt19937_64 random(5);
  KnownNames names;
  std::set<wire::KnownName> model;
  for (int step = 0; step < 20000; ++step) {
    // Few of them, and some that differ in one end only.
    const wire::KnownName name = random() % 700 << (random() % 2 == 0 ? 0 : 50);
    if (random() % 3 == 0) {
      names.erase(name);
      model.erase(name);
    } else {
      names.add(std::span(&name, 1));
      model.insert(name);
    }
  }
  std::vector<wire::KnownName> all;
  for (wire::KnownName name = 0; name < 700; ++name) {
    all.push_back(name);
    all.push_back(name << 50);
  }
  std::vector<bool> known;
  names.look_up(all, known);
  // 0 and 1 go by one entry.
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (all[i] > 1) {
      EXPECT_EQ(known[i], model.count(all[i]) == 1) << all[i];
    }
  }
}

// Names that a multiplication and a mask would all put in one place.
TEST(KnownNamesTest, NamesThatAreChosenToCollideDoNot) {
  constexpr wire::KnownName kInverse = 0xf1de83e19937733dULL;  // of 0x9e3779b97f4a7c15
  static_assert(kInverse * 0x9e3779b97f4a7c15ULL == 1);
  KnownNames names;
  std::vector<wire::KnownName> chosen;
  for (wire::KnownName i = 1; i <= 1U << 18U; ++i) chosen.push_back(i * kInverse);
  names.add(chosen);
  EXPECT_GE(names.size(), chosen.size() - chosen.size() / 1000);
  std::vector<bool> known;
  names.look_up(chosen, known);
  EXPECT_EQ(static_cast<std::size_t>(std::count(known.begin(), known.end(), true)), names.size());
  for (const wire::KnownName name : chosen) names.erase(name);
  EXPECT_TRUE(names.empty());
}

TEST(ReferencePaceTest, StepsAsideOnALinkThatIsFasterThanTheHash) {
  ReferencePace pace;
  EXPECT_TRUE(pace.looks());
  pace.looked(1000, 900, 4e6, 4e6 / 1.5e9);
  pace.measured(1e9, 1.4e9, false, 1);  // not full, and nothing is known of it
  EXPECT_FALSE(pace.looks());
  pace.measured(2.5e9, 2.5e9, false, 1);
  pace.measured(2.5e9, 2.5e9, false, 1);
  EXPECT_FALSE(pace.looks());
  EXPECT_EQ(pace.sample(), 0U);
  pace.sent(ReferencePace::kIdleInterval);
  EXPECT_GT(pace.sample(), 0U);
}

TEST(ReferencePaceTest, StaysOnAFullLinkWhereMuchIsFoundAndComesBack) {
  ReferencePace pace;
  pace.looked(4096, 3300, 16e6, 16e6 / 1.5e9);
  pace.measured(125e6, 500e6, true, 1);
  EXPECT_TRUE(pace.looks());
  for (int i = 0; i < 8; ++i) pace.looked(4096, 0, 16e6, 16e6 / 1.5e9);
  pace.measured(125e6, 125e6, true, 1);
  EXPECT_FALSE(pace.looks()) << "nothing is found";
  pace.measured(125e6, 125e6, true, 1);
  EXPECT_FALSE(pace.looks());
  pace.sent(ReferencePace::kFullInterval);
  ASSERT_EQ(pace.sample(), ReferencePace::kSamplePages);
  for (int i = 0; i < 4; ++i) pace.looked(16, 14, 65536, 65536 / 1.5e9);
  pace.measured(125e6, 125e6, true, 1);
  EXPECT_TRUE(pace.looks());
}

TEST(ReferencePaceTest, WhatIsRefusedWasNotFound) {
  ReferencePace pace;
  for (int i = 0; i < 64; ++i) {
    pace.looked(256, 256, 1e6, 1e6 / 1.5e9);
    pace.refused(256);
  }
  pace.measured(125e6, 125e6, true, 1);
  EXPECT_FALSE(pace.looks()) << "names of what has gone";
}

// Under a limit a chunk is a few pages, and the first may be all that differ.
TEST(ReferencePaceTest, TheFirstPagesAreNotTakenForAll) {
  ReferencePace pace;
  pace.looked(8, 0, 32e3, 32e3 / 1.5e9);
  pace.measured(1.5e6, 1.5e6, true, 1);
  EXPECT_TRUE(pace.looks()) << "eight pages say nothing";
  for (int i = 0; i < 62; ++i) {
    pace.looked(8, 7, 32e3, 32e3 / 1.5e9);
    pace.measured(1.5e6, 1.5e6, true, 1);
    ASSERT_TRUE(pace.looks()) << i;
  }
  pace.measured(1.5e6, 1.5e6, true, 1);
  EXPECT_TRUE(pace.looks());
  // And after a sample as well.
  for (int i = 0; i < 200; ++i) pace.looked(256, 0, 1e6, 1e6 / 1.5e9);
  pace.measured(1.5e6, 1.5e6, true, 1);
  ASSERT_FALSE(pace.looks());
  for (int i = 0; i < 8; ++i) pace.looked(16, 8, 65536, 65536 / 1.5e9);
  pace.measured(1.5e6, 1.5e6, true, 1);
  ASSERT_TRUE(pace.looks());
  for (int i = 0; i < 20; ++i) pace.looked(8, 0, 32e3, 32e3 / 1.5e9);
  pace.measured(1.5e6, 1.5e6, true, 1);
  EXPECT_TRUE(pace.looks());
  pace.looked(4096, 0, 16e6, 16e6 / 1.5e9);
  pace.measured(1.5e6, 1.5e6, true, 1);
  EXPECT_FALSE(pace.looks());
}

TEST(ReferencePaceTest, AHashThatGetsTooLittleOfACpuIsLetGo) {
  ReferencePace pace;
  pace.looked(4096, 3300, 16e6, 16e6 / 100e6);
  pace.measured(125e6, 125e6, true, 1);
  EXPECT_FALSE(pace.looks()) << "100 MB/s of hashing on a link of 125";
}

TEST(ReferencePaceTest, PagesThatPackWellNeedMoreHits) {
  ReferencePace pace;
  pace.looked(4096, 400, 16e6, 16e6 / 1.5e9);
  pace.measured(1.2e9, 1.4e9, true, 0.5);
  EXPECT_FALSE(pace.looks()) << "what is hashed is less than what the link takes packed";
}

}  // namespace
}  // namespace memferry::sender_test
