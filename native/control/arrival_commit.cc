// What the commit's state machine decides is carried out.
#include <algorithm>
#include <new>
#include <utility>

#include "control/arrival.h"

namespace memferry::control {

namespace {

// The source says how long the guest may stand for what is gathered first, and it can give up at any time.
constexpr double kLongestGatherMs = 24.0 * 3600 * 1000;

}  // namespace

// One event after the other, also where carrying out one leads to the next.
void Arrival::dispatch(DestinationEvent event) {
  turns_.push_back(std::move(event));
  if (in_turn_) return;
  // Also where a step throws: what fails then is carried out like anything else.
  struct Turn {
    explicit Turn(bool& taken) : mark(taken) { mark = true; }
    ~Turn() { mark = false; }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    bool& mark;
  };
  const Turn turn(in_turn_);
  while (!turns_.empty()) {
    const DestinationStep step = step_destination(commit_, turns_.front());
    turns_.pop_front();
    const bool decided = step.state.final() && !commit_.final();
    commit_ = step.state;
    if (decided && config_.decided) {
      try {
        config_.decided(commit_);
      } catch (const std::bad_alloc&) {
        // No memory to remember it by: a late question gets no answer then, but what is decided is done.
      }
    }
    for (const DestinationAction& action : step.actions) carry_out(action);
  }
}

void Arrival::carry_out(const DestinationAction& action) {
  switch (action.type) {
    case DestinationAction::Type::kPrepare:
      return begin_prepare();
    case DestinationAction::Type::kResume:
      return resume();
    case DestinationAction::Type::kAbandon:
      return abandon();
    case DestinationAction::Type::kSend:
      return tell(to_json(action.answer));
    case DestinationAction::Type::kStartGrantTimer:
      grant_until_ = Clock::now() + config_.options.grant_timeout;
      return;
    case DestinationAction::Type::kStopGrantTimer:
      grant_until_.reset();
      return;
    case DestinationAction::Type::kSettleResumed:
      return;
    case DestinationAction::Type::kSettleAbandoned:
      if (!error_) error_ = from_peer(action.cause.code, action.cause.message);
      return;
  }
}

void Arrival::begin_prepare() {
  if (!state_) return fail({"PROTOCOL_ERROR", "PREPARE without a state"});
  prepare_until_ = Clock::now() + config_.options.prepare_timeout;
  if (awaits_switch_ && !switched_) {
    preparing_ = Preparing::kAwaitsSwitch;
    return;
  }
  if (config_.offer.scatter && !awaits_switch_) {
    // What the source sent to the servers is fetched first.
    const double ms = std::min(config_.offer.scatter->gather_timeout_ms, kLongestGatherMs);
    prepare_until_ = Clock::now() + std::chrono::ceil<std::chrono::milliseconds>(
                                        std::chrono::duration<double, std::milli>(ms));
    preparing_ = Preparing::kAwaitsPages;
    return receiver_->await_filled();
  }
  run_prepare();
}

void Arrival::run_prepare() {
  if (!receiver_->seal()) {
    preparing_ = Preparing::kEnded;
    prepare_until_.reset();
    return fail({"PROTOCOL_ERROR", "PREPARE although pages are missing that no pager could fetch"});
  }
  prepare_began_ = Clock::now();
  prepare_until_ = prepare_began_ + config_.options.prepare_timeout;
  prepare_.start("mf-prepare", [this](WorkerThread&) {
    Event ended{.kind = Event::Kind::kPrepareEnded};
    try {
      guest_->prepare(*state_);
    } catch (...) {
      ended.cause = cause_of_current("PREPARE_FAILED");
    }
    post(std::move(ended));
  });
  // Its end is heard by this thread, so not before.
  preparing_ = Preparing::kRuns;
}

void Arrival::prepare_ended(const std::optional<Cause>& cause) {
  if (preparing_ != Preparing::kRuns) return;
  preparing_ = Preparing::kEnded;
  prepare_until_.reset();
  if (abandoning_) return abandon_guest();
  if (cause) return fail(*cause);
  prepare_ms_ = ms_since(prepare_began_);
  dispatch(DestinationEvent::of(DestinationEvent::Type::kPrepared));
  tell({{"type", "prepared"}, {"prepareMs", prepare_ms_}});
}

void Arrival::resume() {
  // First: the outcome is remembered, and nothing that can fail may come in between.
  guest_->resume();
  resumed_at_ = Clock::now();
  running_here_.store(true, std::memory_order_release);
  // From here on no lease ends the image, whatever becomes of the source.
  if (images_) images_->commit();
  const bool paging = receiver_->paging() || receiver_->stats().pages_missing > 0;
  if (!paging) every_page_ = true;
  // What follows from every page being here comes after RESUMED has been said.
  EngineEvent complete{};
  complete.kind = EngineEventKind::kComplete;
  if (every_page_) post({.kind = Event::Kind::kEngine, .engine = complete});
}

// The guest is its source's. What waits for a page is woken first: a prepare() that does must not outlive the migration.
void Arrival::abandon() {
  cancelled_.store(true, std::memory_order_release);
  abandoning_ = true;
  prepare_until_.reset();
  config_.listener->remove(config_.offer.migration);
  receiver_->close();
  if (preparing_ != Preparing::kRuns) abandon_guest();
}

void Arrival::abandon_guest() {
  if (over_) return;
  guest_->abandon(error_ ? *error_ : commit_.cause);
  end();
}

}  // namespace memferry::control
