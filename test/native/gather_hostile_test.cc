// A VMD server that answers a map request with what keeps the destination waiting: it is found out, and what it should
// have had is lost rather than waited for.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>

#include "accepting_server.h"
#include "scatter_rig.h"
#include "transfer/receiver.h"
#include "wire/later_tokens.h"

namespace memferry::test {
namespace {

using namespace std::chrono_literals;

constexpr std::uint64_t kPages = 64;

class HostileServer {
 public:
  // What it does on a connection that asked for the map; returns when that has ended.
  using Answer = std::function<void(Wire& wire)>;

  explicit HostileServer(Answer answer)
      : answer_(std::move(answer)), server_([this](Wire& wire) { serve(wire); }) {}
  [[nodiscard]] std::uint16_t port() const { return server_.port(); }

 private:
  void serve(Wire& wire) const {
    wire::FrameHeader header{};
    while (wire.read(&header, sizeof header)) {
      if (header.type == static_cast<std::uint16_t>(wire::FrameType::kMapRequest)) return answer_(wire);
    }
  }

  const Answer answer_;
  const AcceptingServer server_;
};

std::shared_ptr<Receiver> gather_from(const HostileServer& server, EventBox& events,
                                      std::chrono::milliseconds recover = 120s) {
  ReceiverConfig config;
  config.regions = {Region::allocate(kPages * system_page_size())};
  config.migration = own_image_id(0x43);
  config.channels = 1;
  config.tokens = direct_tokens(1);
  config.may_page = true;
  config.recover_timeout = recover;
  config.loss_grace = 50ms;
  config.servers =
      server_addresses(config.migration, kDestinationSession, std::vector<std::uint16_t>{server.port()});
  config.sourceless = true;
  config.on_event = events.callback();
  return Receiver::create(std::move(config));
}

TEST(GatherHostile, OneThatTakesEveryConnectionAndAnswersNothingIsGivenUp) {
  std::atomic<unsigned> asked{0};
  const HostileServer server([&](Wire& wire) {
    ++asked;
    wire.close();
  });
  EventBox events;
  // It is never gone for so long.
  const auto receiver = gather_from(server, events, 800ms);
  const auto end =
      events.take({EngineEventKind::kLost, EngineEventKind::kFailed}, EventBox::Clock::now() + 60s);
  EXPECT_TRUE(end);
  EXPECT_GE(asked, wire::kMostBarrenAttempts);
  EXPECT_NE(receiver->stats().servers.at(0).failed.find("however often it is dialled"), std::string::npos)
      << receiver->stats().servers.at(0).failed;
  receiver->close();
}

TEST(GatherHostile, AMapThatNeverEndsIsFoundOut) {
  const HostileServer server([](Wire& wire) {
    const std::uint64_t hash = 7;
    const wire::Holders holders{0, wire::Holders::kNobody};
    while (wire.frame(wire::FrameType::kMap, 0, {PageNumber{3}, 1}, holders.tag(),
                      std::as_bytes(std::span(&hash, 1)))) {
      std::this_thread::sleep_for(1ms);
    }
  });
  EventBox events;
  const auto receiver = gather_from(server, events);
  const auto end =
      events.take({EngineEventKind::kLost, EngineEventKind::kFailed}, EventBox::Clock::now() + 60s);
  EXPECT_TRUE(end) << "nothing is lost as long as the map lasts";
  EXPECT_NE(receiver->stats().servers.at(0).failed.find("more pages than the image has"), std::string::npos);
  receiver->close();
}

TEST(GatherHostile, AByteNowAndThenIsNoAnswer) {
  std::atomic<unsigned> ended{0};
  const HostileServer server([&ended](Wire& wire) {
    wire::FrameHeader header = wire::make_header(wire::FrameType::kMapEnd);
    wire::seal(header);
    for (std::size_t at = 0; at < sizeof header; ++at) {
      if (!wire.raw(reinterpret_cast<const char*>(&header) + at, 1)) {
        ++ended;
        return;
      }
      std::this_thread::sleep_for(500ms);
    }
  });
  EventBox events;
  const auto receiver = gather_from(server, events);
  const auto limit = EventBox::Clock::now() + 60s;
  while (ended == 0 && EventBox::Clock::now() < limit) std::this_thread::sleep_for(10ms);
  EXPECT_GT(ended, 0U);
  receiver->close();
}

}  // namespace
}  // namespace memferry::test
