// Deduplication in rounds, while the guest writes, and of parked guests: pages are referred to, written, referred to
// again, with contents that the servers have and that they have not. Every byte is compared.
#include <gtest/gtest.h>

#include <thread>

#include "dedup_rig.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;
using enum EngineEventKind;

class DedupRounds : public DedupRig, public testing::WithParamInterface<TrackerKind> {
 protected:
  void SetUp() override {
    const TrackerProbe kernel = probe_trackers().front();
    if (GetParam() == TrackerKind::kUffdWpAsync && !kernel.available) GTEST_SKIP() << kernel.reason;
  }
  [[nodiscard]] Plan plan(unsigned replicas = 1) const {
    return {.replicas = replicas, .tracker = GetParam()};
  }
  // Contents 1 to `count` are held by the servers, and known there, for as long as the guest that brought them stays.
  std::unique_ptr<Move> bring(std::uint64_t count, unsigned replicas = 1) {
    auto first = guest(
        count, [](std::uint64_t page) { return page + 1; }, 1, replicas);
    evict_known(*first);
    expect_arrived(*first);
    return first;
  }
  std::uint64_t round(Move& move) {
    move.sender->start_round(++tag_);
    return move.departures.await(kRoundDone).suspects;
  }
  template <typename Found>
  std::uint64_t round_until(Move& move, Found found) {
    slowly_until(move, found, [&] { move.sender->start_round(++tag_); });
    return move.departures.await(kRoundDone).suspects;
  }
  // The guest stands still: what it wrote last goes, and the destination gathers all of it.
  void finish(Move& move) {
    move.sender->queue_dirty();
    ASSERT_EQ(round(move), 0u) << "pages of a guest that stands still";
    move.receiver->set_bandwidth(0);
    move.receiver->await_filled();
    move.arrivals.await(kFilled);
    ASSERT_TRUE(move.receiver->seal());
    // Its memory is its owner's again, and an answer from it could be anything.
    move.sender->close(true);
    expect_same(move);
  }

  std::uint64_t tag_ = 0;
};

TEST_P(DedupRounds, ARoundSendsWhatIsThereAlreadyAsReferences) {
  servers(2);
  const auto first = bring(4096);
  auto second = prepare(
      4096, [](std::uint64_t page) { return page % 16 == 3 ? 0 : page + 1; }, plan());
  second->sender->queue_populated();
  EXPECT_EQ(round_until(*second, [&] { return dedup(*second).pages > 0; }), 0u);
  const DedupStats stats = dedup(*second);
  EXPECT_EQ(stats.refused, 0u);
  // Half of it is written, with what is there already and with what is not.
  for (std::uint64_t page = 0; page < 4096; page += 2)
    fill(source_page(*second, page), page % 4 == 0 ? 4096 - page : 50000 + page);
  second->sender->queue_dirty();
  EXPECT_EQ(round_until(*second, [&] { return dedup(*second).pages > stats.pages; }), 0u);
  finish(*second);
}

// Every content that a page ever has is held by the servers, so whichever of them a page is found to have, it can be
// referred to, and only the last one is right.
TEST_P(DedupRounds, AGuestThatWritesMeanwhileArrivesAsItIs) {
  constexpr std::uint64_t kPages = 2048;
  servers(2);
  const auto first = bring(kPages);
  for (const unsigned replicas : {1U, 2U}) {
    auto second = prepare(
        kPages, [](std::uint64_t page) { return page + 1; }, plan(replicas));
    second->sender->queue_populated();
    std::atomic<bool> writing{true};
    std::thread writer([&] {
      std::mt19937_64 random(replicas);
      while (writing) {
        const std::uint64_t page = random() % kPages;
        // Mostly back to what it was.
        const std::uint64_t known = 1 + (page + random() % 2) % kPages;
        fill(source_page(*second, page), random() % 4 == 0 ? 90000 + random() % 50 : known);
        std::this_thread::sleep_for(20us);
      }
    });
    for (unsigned i = 0; i < 4; ++i) {
      round(*second);
      second->sender->queue_dirty();
    }
    writing = false;
    writer.join();
    EXPECT_GT(dedup(*second).pages, 0u) << told_of(*second);
    finish(*second);
  }
}

TEST_P(DedupRounds, APageStaysWhoeverElseWritesHis) {
  servers(1);
  const auto content = [](std::uint64_t page) { return page + 1; };
  // Both in the middle of their rounds, and of one content.
  auto a = prepare(1024, content, plan());
  a->sender->queue_populated();
  round_until(*a, [&] { return dedup(*a).told > 0; });
  auto b = prepare(1024, content, plan());
  b->sender->queue_populated();
  round_until(*b, [&] { return dedup(*b).pages > 0; });
  // What was one slot has two contents now, and b is not asked.
  for (std::uint64_t page = 0; page < 1024; ++page) fill(source_page(*a, page), 7000 + page);
  a->sender->queue_dirty();
  round(*a);
  finish(*b);
  finish(*a);
}

TEST_P(DedupRounds, EqualPagesOfOneGuestThatAreWritten) {
  servers(1);
  auto move = prepare(
      4096, [](std::uint64_t page) { return 1 + page % 64; }, plan());
  move->sender->queue_populated();
  round(*move);
  EXPECT_GT(dedup(*move).pages, 0u) << told_of(*move);
  // Those that all others were equal to, among them.
  for (std::uint64_t page = 0; page < 2048; ++page) fill(source_page(*move, page), 100 + page % 64);
  move->sender->queue_dirty();
  round(*move);
  finish(*move);
}

// The destination has a page that was referred to, and must not keep it when it is written.
TEST_P(DedupRounds, WhatWasGatheredAndIsWrittenIsForgottenAtTheSwitch) {
  servers(2);
  const auto first = bring(2048);
  auto second = prepare(
      2048, [](std::uint64_t page) { return page + 1; }, plan());
  second->sender->queue_populated();
  round_until(*second, [&] { return dedup(*second).pages > 0; });
  second->receiver->set_bandwidth(0);
  second->receiver->await_filled();
  second->arrivals.await(kFilled);
  for (std::uint64_t page = 0; page < 2048; page += 3) fill(source_page(*second, page), 60000 + page);
  second->sender->discard_dirty(500);
  second->departures.await(kRoundDone);
  for (std::uint64_t page = 1; page < 2048; page += 3) fill(source_page(*second, page), 1 + page / 2);
  switch_over(*second);
  evict(*second);
  expect_arrived(*second);
}

// What the destination has of a page that went as a reference is no base of a delta.
TEST_P(DedupRounds, ADeltaIsAgainstWhatTheDestinationHas) {
  servers(1);
  const auto first = bring(2048);
  Plan with = plan();
  with.delta_cache = 64ULL << 20;
  with.intake = 0;
  auto second = prepare(
      2048, [](std::uint64_t page) { return page + 1; }, with);
  const auto flip = [&](std::size_t at) {
    for (std::uint64_t page = 0; page < 2048; ++page) source_page(*second, page)[at] ^= std::byte{1};
  };
  // Nearly what the servers have, then what they have, then nearly so again.
  flip(0);
  second->sender->queue_populated();
  round(*second);
  flip(0);
  second->sender->queue_dirty();
  // Deltas are small: only where even those take long, there is time to look.
  second->sender->set_bandwidth(32 << 10);
  second->sender->start_round(++tag_);
  for (unsigned i = 0; i < 100 && dedup(*second).pages == 0; ++i) std::this_thread::sleep_for(20ms);
  second->sender->set_bandwidth(0);
  second->departures.await(kRoundDone);
  // How many of them went as references by then is a matter of speed.
  flip(100);
  second->sender->queue_dirty();
  EXPECT_EQ(round(*second), 0u) << "a delta that was against something else";
  EXPECT_GT(second->sender->stats().delta.pages, 0u);
  finish(*second);
}

// A paused guest's pages are never suspect, wherever references to them led.
TEST_P(DedupRounds, AReferenceThatLeadsNowhereGoesPlainlyInTheSameRound) {
  servers(1);
  const auto first = bring(1024);
  // As long as somebody of the domain is there, it is remembered; and all that is remembered is out of date.
  auto keeper = prepare(
      16, [](std::uint64_t) { return 0; }, plan());
  vmd[0].stage->drop(first->image);
  auto second = prepare(
      1024, [](std::uint64_t page) { return page + 1; }, plan());
  second->sender->queue_populated();
  EXPECT_EQ(round_until(*second, [&] { return dedup(*second).refused > 0; }), 0u);
  finish(*second);
}

TEST_P(DedupRounds, AServerThatEndsInARoundTakesItsReferencesAlong) {
  servers(3);
  const auto first = bring(4096, 2);
  Plan with = plan(2);
  with.stall_timeout = 2500ms;
  auto second = prepare(
      4096, [](std::uint64_t page) { return page + 1; }, with);
  second->sender->queue_populated();
  std::atomic<bool> over{false};
  std::thread killer([&] {
    while (dedup(*second).pages == 0 && !over) std::this_thread::sleep_for(1ms);
    vmd[1].end();
  });
  round_until(*second, [&] { return dedup(*second).pages > 0; });
  over = true;
  killer.join();
  // What it took along goes again.
  for (unsigned i = 0; i < 3; ++i) {
    second->sender->queue_dirty();
    round(*second);
  }
  finish(*second);
}

TEST_P(DedupRounds, ADirectoryThatStallsHoldsNoRoundUp) {
  servers(1);
  network = std::make_unique<SlowDirectory>(vmd[0].listener->port());
  Plan with = plan();
  with.directory_patience = 1s;
  auto move = prepare(
      2048, [](std::uint64_t page) { return 1 + page % 4; }, with);
  move->sender->queue_populated();
  EXPECT_EQ(round_until(*move, [&] { return network->asked() > 0; }), 0u);
  fill(source_page(*move, 0), 99);
  finish(*move);
}

// Who holds what a page was comes to be known when it is something else.
TEST_P(DedupRounds, AnAnswerOfTheRoundBeforeIsAboutWhatThePageWas) {
  servers(1);
  const auto first = bring(1024);
  network = std::make_unique<SlowDirectory>(vmd[0].listener->port(), 700ms);
  Plan with = plan();
  with.intake = 0;
  auto second = prepare(
      1024, [](std::uint64_t page) { return page + 1; }, with);
  // Its connection is there by then, so that something is asked in a round as short as this one.
  std::this_thread::sleep_for(300ms);
  second->sender->queue_populated();
  round(*second);
  const unsigned answered = network->answered();
  for (std::uint64_t page = 0; page < 1024; ++page) fill(source_page(*second, page), 50000 + page);
  second->sender->queue_dirty();
  // Slow enough that most of it is pending when the answer comes.
  second->sender->set_bandwidth(1 << 20);
  second->sender->start_round(++tag_);
  for (unsigned i = 0; i < 100 && network->answered() == answered; ++i) std::this_thread::sleep_for(20ms);
  std::this_thread::sleep_for(100ms);
  second->sender->set_bandwidth(0);
  second->departures.await(kRoundDone);
  finish(*second);
}

INSTANTIATE_TEST_SUITE_P(Trackers, DedupRounds,
                         testing::Values(TrackerKind::kHashDiff, TrackerKind::kUffdWpAsync),
                         [](const auto& each) {
                           return std::string(each.param == TrackerKind::kHashDiff ? "HashDiff"
                                                                                   : "UffdWpAsync");
                         });

class DedupParked : public DedupRig {
 protected:
  // The first round goes slowly until pages have been told of, or referred to.
  using Count = std::uint64_t DedupStats::*;
  std::unique_ptr<Move> park(std::uint64_t pages, const Contents& content_of, Count count,
                             unsigned replicas = 1) {
    auto move = prepare(pages, content_of, {.replicas = replicas, .direct = false});
    move->sender->queue_populated();
    slowly_until(
        *move, [&] { return dedup(*move).*count > 0; }, [&] { move->sender->start_round(1); });
    std::uint64_t suspects = move->departures.await(kRoundDone).suspects;
    for (std::uint64_t tag = 2; suspects > 0 && tag < 4; ++tag) {
      move->sender->start_round(tag);
      suspects = move->departures.await(kRoundDone).suspects;
    }
    EXPECT_EQ(suspects, 0u);
    for (const Vmd& each : vmd) EXPECT_TRUE(each.stage->seal(move->image));
    return move;
  }
  // Somebody claims it.
  void claim(Move& move) {
    move.sender->close(true);
    make_receiver(move, {.direct = false, .intake = 0});
    move.arrivals.await(kSwitched);
    expect_arrived(move);
  }
};

TEST_F(DedupParked, AParkedGuestRefersToWhatIsThereAndIsReferredTo) {
  servers(2);
  const auto content = [](std::uint64_t page) { return page % 16 == 3 ? 0 : page + 1; };
  auto first = park(4096, content, &DedupStats::told);
  auto second = park(4096, content, &DedupStats::pages);
  // What is parked, and sealed, has what a guest on its way has.
  auto moving = guest(4096, content);
  evict_slowly_until(*moving, [&] { return dedup(*moving).pages > 0; });
  // The first goes, and takes nothing along that the others need.
  claim(*first);
  for (const Vmd& each : vmd) each.stage->drop(first->image);
  expect_arrived(*moving);
  for (const Vmd& each : vmd) each.stage->drop(moving->image);
  claim(*second);
  for (const Vmd& each : vmd) {
    each.stage->drop(second->image);
    // What connections that ended still hold is let go of by the thread that takes new ones.
    const auto free = [&] { return each.stage->stats().free_bytes; };
    const std::uint64_t all = each.stage->stats().slab_bytes;
    for (int i = 0; i < 2000 && free() != all; ++i) std::this_thread::sleep_for(10ms);
    EXPECT_EQ(free(), all) << "a count that nobody has any more";
  }
}

TEST_F(DedupParked, WithReplicasEitherServerMayGo) {
  servers(3);
  const auto content = [](std::uint64_t page) { return page + 1; };
  auto first = park(2048, content, &DedupStats::told, 2);
  auto second = park(2048, content, &DedupStats::pages, 2);
  vmd[1].end();
  claim(*second);
  claim(*first);
}

TEST_F(DedupParked, EqualPagesAreHeldOnce) {
  servers(1);
  auto move = park(
      4096, [](std::uint64_t page) { return 1 + page % 32; }, &DedupStats::pages);
  EXPECT_GT(vmd[0].stage->image(move->image)->pages_shared, 0u);
  claim(*move);
}

}  // namespace
}  // namespace memferry::test
