// What every test of a whole scatter in one process needs: VMD servers behind listeners, an image with its sessions
// and chains on all of them, the addresses as both engines are told of them, and a box for an engine's events.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "stage_client.h"
#include "transfer/events.h"
#include "transfer/listener.h"
#include "transfer/stage_server_address.h"

namespace memferry::test {

constexpr std::uint16_t kSourceSession = 1;
constexpr std::uint16_t kDestinationSession = 2;
constexpr std::uint16_t kObserverSession = 3;  // the test's own: reads and writes as it likes

class EventBox {
 public:
  using Clock = std::chrono::steady_clock;

  EngineCallback callback() {
    return [this](const EngineEvent& event) {
      const std::lock_guard lock(mutex_);
      seen_.push_back(event);
      changed_.notify_all();
    };
  }
  // Takes the first event of one of these kinds, waiting for it; others that come are kept.
  std::optional<EngineEvent> take(std::initializer_list<EngineEventKind> kinds, Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    auto found = seen_.end();
    changed_.wait_until(lock, deadline, [&] {
      found = std::find_if(seen_.begin(), seen_.end(), [&](const EngineEvent& event) {
        return std::find(kinds.begin(), kinds.end(), event.kind) != kinds.end();
      });
      return found != seen_.end();
    });
    if (found == seen_.end()) return std::nullopt;
    EngineEvent event = std::move(*found);
    seen_.erase(found);
    return event;
  }
  // The same, where the test has failed if it does not come within patience.
  EngineEvent await(EngineEventKind kind) {
    const auto event = take({kind, EngineEventKind::kFailed}, Clock::now() + std::chrono::seconds(30));
    if (event && event->kind == kind) return *event;
    ADD_FAILURE() << "event " << static_cast<int>(kind) << " never came"
                  << (event ? ": " + event->code + " " + event->message : "");
    return {.kind = EngineEventKind::kFailed, .code = "TEST", .message = {}, .lost = {}};
  }
  bool any(EngineEventKind kind) {
    const std::lock_guard lock(mutex_);
    return std::any_of(seen_.begin(), seen_.end(),
                       [&](const EngineEvent& event) { return event.kind == kind; });
  }

 private:
  std::mutex mutex_;  // guards the rest
  std::condition_variable changed_;
  std::deque<EngineEvent> seen_;
};

// A VMD server, in this process.
struct Vmd {
  std::shared_ptr<Stage> stage;
  std::unique_ptr<Listener> listener;

  static Vmd start(std::uint64_t memory_bytes, std::uint16_t port = 0) {
    return start(StageConfig{.memory_bytes = memory_bytes}, port);
  }
  static Vmd start(const StageConfig& config, std::uint16_t port = 0) {
    Vmd vmd;
    vmd.stage = Stage::create(config);
    vmd.listener = std::make_unique<Listener>(Listener::Config{"127.0.0.1", port, {}});
    vmd.listener->serve_stage(vmd.stage);
    return vmd;
  }
  void end() const {
    if (listener) listener->close();
    if (stage) stage->close();
  }
};

// An image on one of `ports.size()` servers, as TypeScript makes it over control connections: a session for either
// side, and one for each other server that may pass replicas on to it. False when there is no room for its index.
inline bool give_image(Stage& stage, const ImageId& image, const std::vector<std::uint64_t>& region_pages,
                       std::uint8_t ordinal, const std::vector<std::uint16_t>& ports,
                       std::uint32_t attempts = 16, const std::optional<DomainKey>& domain = std::nullopt) {
  using wire::StageRole;
  const unsigned reads = role_bit(StageRole::kGather) | role_bit(StageRole::kDemand);
  if (!stage.create_image({.id = image, .region_pages = region_pages, .ordinal = ordinal, .domain = domain}))
    return false;
  stage.add_session(image, kSourceSession, role_bit(StageRole::kScatter) | role_bit(StageRole::kProbe),
                    stage_tokens(image, kSourceSession, attempts));
  stage.add_session(image, kDestinationSession, reads, stage_tokens(image, kDestinationSession, attempts));
  stage.add_session(image, kObserverSession,
                    reads | role_bit(StageRole::kScatter) | role_bit(StageRole::kProbe),
                    stage_tokens(image, kObserverSession, attempts));
  for (std::size_t other = 0; other < ports.size(); ++other) {
    if (other == ordinal) continue;
    const auto session = static_cast<std::uint16_t>(wire::kFirstChainSession + other);
    stage.add_session(image, session, role_bit(StageRole::kChain), stage_tokens(image, session, attempts));
    stage.set_chain(image, static_cast<std::uint8_t>(other), "127.0.0.1", ports[other],
                    chain_tokens(image, ordinal, attempts));
  }
  return true;
}

inline std::vector<StageServer> server_addresses(const ImageId& image, std::uint16_t session,
                                                 const std::vector<std::uint16_t>& ports,
                                                 std::uint32_t attempts = 16,
                                                 const std::vector<std::uint64_t>& identities = {}) {
  std::vector<StageServer> all;
  for (std::size_t i = 0; i < ports.size(); ++i) {
    all.push_back({"s" + std::to_string(i), "127.0.0.1", ports[i], session,
                   stage_tokens(image, session, attempts), i < identities.size() ? identities[i] : 0});
  }
  return all;
}

// Of the direct connections: a row an epoch, a token a data channel and one for the demand channel.
inline std::vector<wire::Token> direct_tokens(unsigned channels, unsigned epochs = 8) {
  std::vector<wire::Token> tokens(std::size_t{epochs} * (channels + 1));
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i][0] = static_cast<std::uint8_t>(i + 1);
  return tokens;
}

}  // namespace memferry::test
