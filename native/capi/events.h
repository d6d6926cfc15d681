// An engine's events for an embedder: told to his callback, and kept for who waits for them.
//
// Threads: any; told from the engine's.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>

#include "capi/guarded.h"
#include "transfer/events.h"

namespace memferry::capi {

class Events {
 public:
  Events(memferry_on_event* callback, void* context) : callback_(callback), context_(context) {}

  void told(const EngineEvent& event);
  // Throws Failure: TIMEOUT, or what ended the engine. std::invalid_argument for a kind that there is none of.
  void wait(int kind, std::uint64_t tag, std::int64_t timeout_ms);
  // For an engine's config; the events outlive it.
  [[nodiscard]] static EngineCallback callback_of(const std::shared_ptr<Events>& events);

 private:
  memferry_on_event* const callback_;
  void* const context_;
  std::mutex mutex_;  // guards the three below
  std::condition_variable changed_;
  std::set<int> seen_;
  std::set<std::uint64_t> rounds_;  // done, and not waited for yet; the newest kMostRounds
  std::optional<control::Cause> failed_;
};

}  // namespace memferry::capi
