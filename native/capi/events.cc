#include "capi/events.h"

#include "capi/handles.h"

namespace memferry::capi {

namespace {

constexpr std::size_t kMostRounds = 1024;

std::optional<int> kind_of(EngineEventKind kind) {
  switch (kind) {
    case EngineEventKind::kConnected:
      return MEMFERRY_EVENT_CONNECTED;
    case EngineEventKind::kRoundDone:
      return MEMFERRY_EVENT_ROUND_DONE;
    case EngineEventKind::kSwitched:
      return MEMFERRY_EVENT_SWITCHED;
    case EngineEventKind::kEvicted:
      return MEMFERRY_EVENT_EVICTED;
    case EngineEventKind::kFirstChannel:
      return MEMFERRY_EVENT_FIRST_CHANNEL;
    case EngineEventKind::kComplete:
      return MEMFERRY_EVENT_COMPLETE;
    case EngineEventKind::kLost:
      return MEMFERRY_EVENT_LOST;
    case EngineEventKind::kPaused:
      return MEMFERRY_EVENT_PAUSED;
    case EngineEventKind::kRecovered:
      return MEMFERRY_EVENT_RECOVERED;
    case EngineEventKind::kFailed:
      return MEMFERRY_EVENT_FAILED;
    default:
      return {};  // of VMD servers
  }
}

}  // namespace

void Events::told(const EngineEvent& event) {
  const std::optional<int> kind = kind_of(event.kind);
  if (!kind) return;
  std::optional<control::Cause> cause;
  if (*kind == MEMFERRY_EVENT_FAILED) cause = control::engine_cause(event.code, event.message);
  if (*kind == MEMFERRY_EVENT_LOST) cause = control::Cause{"PAGES_LOST", event.message};
  if (callback_) {
    const InCallback here(Callback::kEngine);
    memferry_error why{};
    why.size = sizeof why;
    if (cause) write_error(&why, *cause);
    const std::vector<memferry_run> runs = runs_of(event.lost);
    memferry_event told{};
    told.size = sizeof told;
    told.kind = *kind;
    told.tag = event.tag;
    told.suspects = event.suspects;
    told.error = cause ? &why : nullptr;
    told.runs = runs.data();
    told.run_count = runs.size();
    callback_(context_, &told);
  }
  {
    const std::lock_guard lock(mutex_);
    seen_.insert(*kind);
    if (*kind == MEMFERRY_EVENT_ROUND_DONE) {
      rounds_.insert(event.tag);
      if (rounds_.size() > kMostRounds) rounds_.erase(rounds_.begin());
    }
    if (*kind == MEMFERRY_EVENT_FAILED) failed_ = cause;
  }
  changed_.notify_all();
}

void Events::wait(int kind, std::uint64_t tag, std::int64_t timeout_ms) {
  refuse_in(Callback::kEngine, "waiting");
  if (kind < MEMFERRY_EVENT_CONNECTED || kind > MEMFERRY_EVENT_FAILED)
    throw std::invalid_argument("kind: no kind of event");
  std::unique_lock lock(mutex_);
  const auto there = [&] {
    if (kind == MEMFERRY_EVENT_ROUND_DONE) return rounds_.contains(tag);
    return seen_.contains(kind);
  };
  const auto over = [&] { return failed_ || there(); };
  if (timeout_ms < 0) {
    changed_.wait(lock, over);
  } else if (!changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms), over)) {
    throw control::Failure("TIMEOUT", "the event has not come yet");
  }
  if (there()) {
    if (kind == MEMFERRY_EVENT_ROUND_DONE) rounds_.erase(tag);
    return;
  }
  throw control::Failure(*failed_);
}

EngineCallback Events::callback_of(const std::shared_ptr<Events>& events) {
  return [events](const EngineEvent& event) {
    try {
      events->told(event);
    } catch (const std::bad_alloc&) {
      // Without memory for an event there is none for a migration: who waits is told what can be told.
      EngineEvent failed{};
      failed.kind = EngineEventKind::kFailed;
      failed.code = "SYSTEM";
      events->told(failed);
    }
  };
}

}  // namespace memferry::capi
