// Peers that lie about bases and hashes: each gets a clear end, and nothing that was not compared counts as arrived.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <random>

#include "fake_destination.h"
#include "fake_source.h"
#include "transfer/sender.h"

namespace memferry {
namespace {

using namespace std::chrono_literals;
using wire::FrameType;

constexpr std::uint64_t kPages = 2 * wire::kTreeNodePages + 10;

class FakeTracker final : public DirtyTracker {
 public:
  std::string_view name() const override { return "never"; }
  void arm() override {}
  std::uint64_t collect(AtomicBitmap&) override { return 0; }
  void disarm() override {}
};

// --- a source that lies

struct Attack {
  const char* name;
  std::function<void(test::Bench&)> act;
};

PageRun run(std::uint64_t first, std::uint64_t count) { return {PageNumber{first}, count}; }

void ask(test::Bench& bench, std::uint64_t level, PageRun pages, unsigned channel = 0,
         std::uint32_t region = 0) {
  bench.data(channel).frame(FrameType::kTreeRequest, region, pages, level);
}
void same(test::Bench& bench, std::vector<wire::WireRun> runs, unsigned channel = 0,
          std::uint32_t region = 0) {
  bench.data(channel).frame(FrameType::kSame, region, {}, 0, std::as_bytes(std::span(runs)));
}
void compare_all(test::Bench& bench) {
  ask(bench, wire::kTreePages, run(0, kPages));
  std::uint64_t answered = 0;
  while (answered < kPages) {
    const auto answer = bench.data(0).receive();
    ASSERT_TRUE(answer);
    ASSERT_EQ(answer->header.type, static_cast<std::uint16_t>(FrameType::kTree));
    answered += answer->header.page_count;
  }
}

std::vector<Attack> attacks() {
  const std::uint64_t huge = ~std::uint64_t{0};
  const auto asks = [](std::uint64_t level, PageRun pages, unsigned channel = 0, std::uint32_t region = 0) {
    return [=](test::Bench& bench) { ask(bench, level, pages, channel, region); };
  };
  const auto lies = [](std::vector<wire::WireRun> runs, unsigned channel = 0, std::uint32_t region = 0) {
    return [=](test::Bench& bench) {
      compare_all(bench);
      same(bench, runs, channel, region);
    };
  };
  return {
      {"hashes of half a node", asks(wire::kTreeNodes, run(0, 100))},
      {"hashes of nothing", asks(wire::kTreeNodes, run(0, 0))},
      {"hashes behind the end", asks(wire::kTreePages, run(kPages, 1))},
      {"hashes that overflow", asks(wire::kTreePages, run(256, huge))},
      {"hashes of another level", asks(3, run(0, 256))},
      {"hashes on another channel", asks(wire::kTreePages, run(0, 256), 1)},
      {"hashes of no region", asks(wire::kTreePages, run(0, 256), 0, 7)},
      {"hashes of a region without a base", asks(wire::kTreePages, run(0, 256), 0, 1)},
      {"a request with a payload",
       [](test::Bench& bench) {
         const std::byte some[16] = {};
         bench.data(0).frame(FrameType::kTreeRequest, 0, run(0, 256), 0, some);
       }},
      {"equal pages that were not compared",
       [](test::Bench& bench) {
         same(bench, {{0, 1}});
       }},
      {"equal pages of a node that was not compared",
       [](test::Bench& bench) {
         ask(bench, wire::kTreePages, run(0, 256));
         bench.data(0).receive();
         same(bench, {{255, 2}});
       }},
      {"equal pages outside", lies({{kPages - 1, 2}})},
      {"equal pages that overflow", lies({{1, huge}})},
      {"no equal pages", lies({{1, 0}})},
      {"equal pages twice", lies({{1, 2}, {2, 1}})},
      {"equal pages of no region", lies({{0, 1}}, 0, 9)},
      {"equal pages of a region without a base", lies({{0, 1}}, 0, 1)},
      {"half a run of equal pages",
       [](test::Bench& bench) {
         compare_all(bench);
         const std::byte half[8] = {};
         bench.data(0).frame(FrameType::kSame, 0, {}, 0, half);
       }},
      {"equal pages that were sent",
       [](test::Bench& bench) {
         compare_all(bench);
         bench.data(0).pages(0, 3, test::random_bytes(bench.page_size, 1), bench.page_size);
         same(bench, {{3, 1}});
       }},
      {"equal pages that were discarded",
       [](test::Bench& bench) {
         compare_all(bench);
         same(bench, {{3, 1}});
         bench.data(0).discard(0, {{3, 1}});
         same(bench, {{3, 1}});
       }},
      {"equal pages after the end",
       [](test::Bench& bench) {
         compare_all(bench);
         bench.data(0).frame(FrameType::kBaseEnd);
         same(bench, {{3, 1}});
       }},
      {"hashes, as if it were the destination",
       [](test::Bench& bench) {
         const std::byte hash[16] = {};
         bench.data(0).frame(FrameType::kTree, 0, run(0, 1), 0, hash);
       }},
      {"an empty probe", [](test::Bench& bench) { bench.data(0).frame(FrameType::kLinkProbe); }},
      {"a probe on the demand channel",
       [](test::Bench& bench) {
         const std::byte some[16] = {};
         bench.demand().frame(FrameType::kLinkProbe, 0, {}, 0, some);
       }},
  };
}

void prepare(test::Bench& bench) {
  bench.config.bases = {ReceiverConfig::Base::kGiven, ReceiverConfig::Base::kNone};
  bench.start();
  const auto content = test::random_bytes(kPages * bench.page_size, 4);
  std::memcpy(bench.page(0), content.data(), content.size());
}

TEST(BaseHostile, EveryLieOfASourceEndsTheMigrationClearly) {
  for (const Attack& attack : attacks()) {
    SCOPED_TRACE(attack.name);
    test::Bench bench(kPages, 2);
    prepare(bench);
    bench.receiver->base_ready();
    bench.connect();
    attack.act(bench);
    const EngineEvent failed = bench.log.wait(EngineEventKind::kFailed);
    EXPECT_EQ(failed.code, "PROTOCOL") << failed.message;
    EXPECT_FALSE(failed.message.empty());
    EXPECT_FALSE(bench.receiver->ready());
  }
}

TEST(BaseHostile, NothingComesBeforeTheBaseIsThere) {
  const std::vector<Attack> early = {
      {"pages",
       [](test::Bench& bench) {
         bench.data(1).pages(1, 0, test::random_bytes(bench.page_size, 1), bench.page_size);
       }},
      {"zeros", [](test::Bench& bench) { bench.data(1).zeros(0, 0, 1); }},
      {"a comparison", [](test::Bench& bench) { ask(bench, wire::kTreeNodes, run(0, kPages)); }},
      {"its end", [](test::Bench& bench) { bench.data(0).frame(FrameType::kBaseEnd); }},
      {"the switch", [](test::Bench& bench) { bench.data(0).frame(FrameType::kSwitch); }},
  };
  for (const Attack& attack : early) {
    SCOPED_TRACE(attack.name);
    test::Bench bench(kPages, 2);
    bench.config.may_page = true;
    prepare(bench);
    bench.connect();
    attack.act(bench);
    EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "PROTOCOL");
  }
}

// The sample may be compared, and what it has is confirmed; nothing else may come yet.
TEST(BaseHostile, OnlyTheSampleComesBeforeTheBaseIsThere) {
  const wire::WireRun some[] = {{256, 1}};
  const std::vector<Attack> attempts = {
      {"zeros", [](test::Bench& bench) { bench.data(1).zeros(1, 0, 1); }},
      {"hashes of another node", [](test::Bench& bench) { ask(bench, wire::kTreePages, run(0, 256)); }},
      {"hashes of more nodes", [](test::Bench& bench) { ask(bench, wire::kTreeNodes, run(256, 266)); }},
      {"equal pages of another node",
       [](test::Bench& bench) {
         same(bench, {{255, 1}});
       }},
      {"discards",
       [&](test::Bench& bench) {
         bench.data(0).frame(FrameType::kDiscard, 0, {}, 0, std::as_bytes(std::span(some)));
       }},
  };
  for (const Attack& attempt : attempts) {
    SCOPED_TRACE(attempt.name);
    test::Bench bench(kPages, 2);
    prepare(bench);
    bench.receiver->base_sampled(true);
    bench.connect();
    ask(bench, wire::kTreePages, run(256, 256));
    ASSERT_TRUE(bench.data(0).receive());
    same(bench, {{256, 10}});
    EXPECT_TRUE(bench.data(0).barrier(1).answered);
    EXPECT_EQ(bench.receiver->stats().pages_from_base, 10u);
    attempt.act(bench);
    EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "PROTOCOL");
  }
}

// It is still to be changed: asked about, not compared.
TEST(BaseHostile, OfASampleThatChangesNothingIsConfirmed) {
  const std::vector<Attack> attempts = {
      {"a comparison", [](test::Bench& bench) { ask(bench, wire::kTreePages, run(256, 256)); }},
      {"a comparison by nodes", [](test::Bench& bench) { ask(bench, wire::kTreeNodes, run(256, 256)); }},
      {"the same question again and again",
       [](test::Bench& bench) {
         for (int times = 0; times < 16; ++times) ask(bench, wire::kTreeEstimate, run(256, 256));
       }},
      {"a question outside of it", [](test::Bench& bench) { ask(bench, wire::kTreeEstimate, run(0, 256)); }},
      {"equal pages",
       [](test::Bench& bench) {
         same(bench, {{256, 10}});
       }},
      {"equal pages, when it is there",
       [](test::Bench& bench) {
         bench.receiver->base_ready();
         same(bench, {{256, 10}});
       }},
  };
  for (const Attack& attempt : attempts) {
    SCOPED_TRACE(attempt.name);
    test::Bench bench(kPages, 2);
    prepare(bench);
    bench.receiver->base_sampled(false);
    bench.connect();
    ask(bench, wire::kTreeEstimate, run(256, 256));
    const auto answer = bench.data(0).receive();
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->header.tag & 0xff, wire::kTreeEstimate);
    EXPECT_EQ(answer->header.payload_bytes, 256 * sizeof(wire::TreeHash));
    attempt.act(bench);
    EXPECT_EQ(bench.log.wait(EngineEventKind::kFailed).code, "PROTOCOL");
    EXPECT_EQ(bench.receiver->stats().pages_from_base, 0u);
  }
}

// --- a destination that lies

struct Lie {
  const char* name;
  // Answers one request; gives the frames to send.
  std::function<std::vector<std::pair<wire::FrameHeader, std::vector<std::byte>>>(const wire::FrameHeader&)>
      answer;
};

std::vector<std::byte> hashes(std::uint64_t count) {
  return std::vector<std::byte>(static_cast<std::size_t>(count * sizeof(wire::TreeHash)));
}

TEST(BaseHostile, EveryLieOfADestinationIsFoundOut) {
  using Frames = std::vector<std::pair<wire::FrameHeader, std::vector<std::byte>>>;
  const auto tree = [](std::uint32_t region, PageRun pages, std::uint64_t level) {
    return wire::make_header(FrameType::kTree, region, pages, level);
  };
  const std::vector<Lie> lies = {
      {"another region",
       [&](const auto& h) {
         return Frames{{tree(1, run(h.first_page, 256), 0), hashes(256)}};
       }},
      {"another level",
       [&](const auto& h) {
         return Frames{{tree(0, run(h.first_page, 256), 1), hashes(1)}};
       }},
      {"another place",
       [&](const auto& h) {
         return Frames{{tree(0, run(h.first_page + 1, 255), 0), hashes(255)}};
       }},
      {"too many",
       [&](const auto& h) {
         return Frames{{tree(0, run(h.first_page, h.page_count + 1), 0), hashes(h.page_count + 1)}};
       }},
      {"twice",
       [&](const auto& h) {
         const std::pair all{tree(0, run(h.first_page, h.page_count), 0), hashes(h.page_count)};
         return Frames{all, all, all, all};
       }},
      {"fewer hashes than pages",
       [&](const auto& h) {
         return Frames{{tree(0, run(h.first_page, h.page_count), 0), hashes(h.page_count - 1)}};
       }},
      {"page by page",
       [&](const auto& h) {
         Frames all;
         for (std::uint64_t i = 0; i < h.page_count; ++i)
           all.push_back({tree(0, run(h.first_page + i, 1), 0), hashes(1)});
         return all;
       }},
      {"half a hash",
       [&](const auto& h) {
         auto some = hashes(h.page_count);
         some.resize(some.size() - 8);
         return Frames{{tree(0, run(h.first_page, h.page_count), 0), some}};
       }},
      {"pages",
       [&](const auto&) {
         return Frames{{wire::make_header(FrameType::kSame), hashes(1)}};
       }},
  };
  for (const Lie& lie : lies) {
    SCOPED_TRACE(lie.name);
    test::EventLog log;
    const auto page_size = test::Bench::page_size_of();
    auto region = Region::allocate(kPages * page_size);
    std::memset(region->address(PageNumber{0}).pointer(), 7, kPages * page_size);
    sender_test::FakeDestination peer({.channels = 2, .pages = {kPages}, .page_size = page_size});
    peer.on_frame = [&](const sender_test::SeenFrame& frame) {
      if (frame.type() != FrameType::kTreeRequest) return true;
      for (const auto& [header, payload] : lie.answer(frame.header)) peer.send(0, header, payload);
      return true;
    };
    SenderConfig config;
    config.regions = {region};
    config.trackers = {std::make_shared<FakeTracker>()};
    config.host = "127.0.0.1";
    config.port = peer.port();
    config.channels = 2;
    config.tokens = sender_test::FakeDestination::tokens(2);
    config.base_pages = {kPages};
    config.on_event = log.callback();
    Sender sender(std::move(config));
    sender.connect();
    peer.accept_epoch();
    log.wait(EngineEventKind::kConnected);
    sender.queue_populated();
    sender.compare_base(1, ~std::uint64_t{0}, CompareDepth::kSample);
    const EngineEvent failed = log.wait(EngineEventKind::kFailed);
    EXPECT_EQ(failed.code, "PROTOCOL") << failed.message;
    sender.close(false);
    EXPECT_EQ(sender.stats().base.pages_same, 0u);
  }
}

TEST(BaseHostile, ADestinationThatNeverAnswersIsACut) {
  test::EventLog log;
  const auto page_size = test::Bench::page_size_of();
  auto region = Region::allocate(kPages * page_size);
  sender_test::FakeDestination peer({.channels = 1, .pages = {kPages}, .page_size = page_size});
  SenderConfig config;
  config.regions = {region};
  config.trackers = {std::make_shared<FakeTracker>()};
  config.host = "127.0.0.1";
  config.port = peer.port();
  config.channels = 1;
  config.tokens = sender_test::FakeDestination::tokens(1);
  config.answer_timeout = 300ms;
  config.base_pages = {kPages};
  config.on_event = log.callback();
  Sender sender(std::move(config));
  sender.connect();
  peer.accept_epoch();
  log.wait(EngineEventKind::kConnected);
  sender.queue_populated();
  sender.compare_base(1, ~std::uint64_t{0}, CompareDepth::kAll);
  EXPECT_EQ(log.wait(EngineEventKind::kFailed).code, "CHANNEL_LOST");
  sender.close(false);
}

TEST(BaseHostile, ABaseOfMorePagesThanThereAreIsNone) {
  auto region = Region::allocate(test::Bench::page_size_of());
  sender_test::FakeDestination peer({.channels = 1, .pages = {1}, .page_size = test::Bench::page_size_of()});
  test::EventLog log;
  SenderConfig config;
  config.regions = {region};
  config.host = "127.0.0.1";
  config.port = peer.port();
  config.channels = 1;
  config.tokens = sender_test::FakeDestination::tokens(1);
  config.base_pages = {2};
  config.on_event = log.callback();
  Sender sender(std::move(config));  // without a tracker: there is no base to compare with
  sender.connect();
  peer.accept_epoch();
  log.wait(EngineEventKind::kConnected);
  sender.queue_populated();
  EXPECT_THROW(sender.compare_base(1, 1, CompareDepth::kSample), std::logic_error);
  sender.close(false);
}

}  // namespace
}  // namespace memferry
