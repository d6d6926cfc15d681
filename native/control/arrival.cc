#include "control/arrival.h"

#include <algorithm>
#include <utility>

namespace memferry::control {

namespace {

using Type = SourceSays::Type;

}  // namespace

Arrival::Arrival(Config config) : config_(std::move(config)), link_(std::move(config_.link)) {
  thread_.start("mf-arrival", [this](WorkerThread&) { run(); });
}

Arrival::~Arrival() { join(); }

void Arrival::wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  changed_.notify_all();
}

void Arrival::post(Event event) {
  {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
  }
  changed_.notify_all();
}

void Arrival::attach(std::shared_ptr<Channel> link) {
  post({.kind = Event::Kind::kAttach, .link = std::move(link)});
}

void Arrival::close() {
  closing_.store(true, std::memory_order_release);
  post({.kind = Event::Kind::kClose});
}

ReceiverStats Arrival::stats() const {
  std::shared_ptr<Receiver> receiver;
  {
    const std::lock_guard lock(mutex_);
    receiver = receiver_;
  }
  return receiver ? receiver->stats() : ReceiverStats{};
}

void Arrival::set_bandwidth(std::uint64_t bytes_per_second) {
  std::shared_ptr<Receiver> receiver;
  {
    const std::lock_guard lock(mutex_);
    receiver = receiver_;
  }
  if (receiver) receiver->set_bandwidth(bytes_per_second);
}

void Arrival::run() {
  if (accepted()) {
    while (!over_) {
      std::deque<Event> events;
      {
        std::unique_lock lock(mutex_);
        const auto something = [this] { return woken_ || !events_.empty(); };
        if (const auto until = next_deadline(); until == Clock::time_point::max()) {
          changed_.wait(lock, something);
        } else {
          changed_.wait_until(lock, until, something);
        }
        woken_ = false;
        events.swap(events_);
      }
      try {
        for (Event& event : events) {
          if (!over_) handle(event);
        }
        read_link();
        look_at_clock();
      } catch (...) {
        fail(cause_of_current("SYSTEM"));
      }
    }
  }
  prepare_.stop();
  if (images_) images_->close();
  if (config_.ended) config_.ended();
}

void Arrival::handle(Event& event) {
  switch (event.kind) {
    case Event::Kind::kEngine:
      return on_engine(event.engine);
    case Event::Kind::kPrepareEnded:
      return prepare_ended(event.cause);
    case Event::Kind::kDigests:
      // The servers have none, and the source is back: it says them itself, or goes again.
      if (!event.digests && link_) return;
      return conclude(mismatched(event.digests));
    case Event::Kind::kAttach:
      // What the former connection brought is heard first, as far as it has come.
      read_link();
      if (link_) link_->destroy();
      link_ = std::move(event.link);
      linger_until_.reset();
      if (every_page_) tell({{"type", "complete"}});
      return;
    case Event::Kind::kClose:
      fail({"CANCELLED", "the destination closed the arrival"});
      if (has_resumed()) end();
      return;
  }
}

void Arrival::on_engine(const EngineEvent& event) {
  switch (event.kind) {
    case EngineEventKind::kComplete:
      return every_page();
    case EngineEventKind::kSwitched:
      switched_ = true;
      if (preparing_ == Preparing::kAwaitsSwitch) run_prepare();
      return;
    case EngineEventKind::kFilled:
      if (preparing_ == Preparing::kAwaitsPages) run_prepare();
      return;
    case EngineEventKind::kLost:
      return lost(event);
    case EngineEventKind::kRestHere:
      return nothing_more_comes();
    case EngineEventKind::kFailed:
      fail(engine_cause(event.code, event.message));
      at_rest_ = true;  // after the commit; before it there is nothing left
      if (!link_ && has_resumed()) linger();
      return;
    default:
      return;
  }
}

void Arrival::read_link() {
  if (!link_) return;
  // What came before the end is there once the end is known.
  const std::shared_ptr<Channel> link = link_;
  const bool ended = link->ended().has_value();
  while (auto received = link->take()) {
    on_message(received->message, std::move(received->binary));
    if (link_ != link || over_) return;
  }
  if (ended) detached();
}

void Arrival::on_message(const Json& message, std::optional<Bytes> binary) {
  SourceSays says = source_message(message);
  switch (says.type) {
    case Type::kOffer:
    case Type::kResumeSession:
      return fail({"PROTOCOL_ERROR", "an offer, or another session, on a connection that is in use"});
    case Type::kBaseCancel:
    case Type::kBaseSkipReplay:
      return;
    case Type::kGrow:
      return grow(says.region, says.length_bytes);
    case Type::kAskMissing:
      receiver_->source_rests();
      return tell(
          {{"type", "missing"}, {"pages", receiver_->stats().pages_missing}, {"question", says.question}});
    case Type::kState:
      if (!binary || state_)
        return fail({"PROTOCOL_ERROR", "an execution state that is missing, or a second one"});
      awaits_switch_ = says.paging;
      state_ = std::move(binary);
      return;
    case Type::kEvicted:
      evicted_ = true;
      digests_ = std::move(says.digests);
      if (told_complete_) {
        summarise();
      } else if (settled_) {
        // What was told of it before may have been lost with its connection.
        tell({{"type", "lost"}, {"runs", lost_}});
      }
      return;
    case Type::kGoodbye:
      if (has_resumed()) end();
      return;
    case Type::kCommit:
      return dispatch(DestinationEvent::asked(says.commit));
  }
}

void Arrival::detached() {
  link_.reset();
  dispatch(DestinationEvent::of(DestinationEvent::Type::kConnectionLost));
  // A source that is gone for good never says goodbye; what is kept for it must not stay for ever.
  if (!has_resumed() || !(every_page_ || at_rest_)) return;
  linger();
  if (every_page_ && !settled_ && images_) images_->ask_digests();
}

void Arrival::linger() { linger_until_ = Clock::now() + config_.options.recover_timeout; }

Arrival::Clock::time_point Arrival::next_deadline() const {
  Clock::time_point until = Clock::time_point::max();
  for (const auto& deadline : {prepare_until_, grant_until_, linger_until_}) {
    if (deadline) until = std::min(until, *deadline);
  }
  return until;
}

void Arrival::look_at_clock() {
  const Clock::time_point now = Clock::now();
  const auto passed = [now](std::optional<Clock::time_point>& deadline) {
    if (!deadline || now < *deadline) return false;
    deadline.reset();
    return true;
  };
  if (passed(prepare_until_)) {
    const Preparing was = preparing_;
    if (was != Preparing::kRuns) preparing_ = Preparing::kEnded;
    fail({"PREPARE_TIMEOUT", was == Preparing::kAwaitsSwitch  ? "the switch to post-copy did not come in time"
                             : was == Preparing::kAwaitsPages ? "the guest was not gathered in time"
                                                              : "prepare did not end in time"});
  }
  if (passed(grant_until_)) dispatch(DestinationEvent::of(DestinationEvent::Type::kGrantTimer));
  if (passed(linger_until_)) end();
}

void Arrival::grow(std::uint32_t index, std::uint64_t length_bytes) {
  const auto& regions = guest_->regions();
  if (index >= regions.size() || commit_.phase != DestinationPhase::kReceiving ||
      length_bytes % regions[index]->page_size() != 0)
    return fail({"PROTOCOL_ERROR", "growth of a region that is not there, or too late"});
  if (length_bytes > config_.offer.guest.regions[index].capacity_bytes)
    return fail({"PROTOCOL_ERROR", "a region that grows beyond its own capacity"});
  Region& region = *regions[index];
  try {
    if (length_bytes > region.bytes()) {
      config_.grows(length_bytes - region.bytes());
      guest_->grow(index, length_bytes);
    }
    if (length_bytes > region.bytes())
      throw Failure("LIMIT_EXCEEDED", "this guest cannot grow at the destination");
    receiver_->grow(index, length_bytes / region.page_size());
  } catch (...) {
    return fail(cause_of_current("LIMIT_EXCEEDED"));
  }
  tell({{"type", "grown"}, {"region", index}});
}

// Anything that goes wrong here. Before the commit it ends the migration; after it only pages can be lost.
void Arrival::fail(const Cause& cause) {
  if (has_resumed()) {
    if (!every_page_) reject(cause);
    return;
  }
  if (!error_) error_ = cause;
  dispatch(DestinationEvent::failed(cause));
}

void Arrival::end() {
  if (over_) return;
  over_ = true;
  prepare_until_.reset();
  grant_until_.reset();
  linger_until_.reset();
  if (has_resumed() && every_page_) finish();
  if (commit_.phase != DestinationPhase::kAbandoned) {
    config_.listener->remove(config_.offer.migration);
    receiver_->close();
    if (has_resumed()) reject({"CANCELLED", "the arrival was closed before every page was here"});
  }
  // Its thread may be the one that lets go of this arrival last: it must not be the arrival's to join.
  if (const auto link = std::exchange(link_, nullptr)) link->close();
  guest_->ended();
}

void Arrival::tell(const Json& message) noexcept {
  // Where there is no connection, or it has gone: what could not be said is said again when the source asks.
  if (!link_) return;
  try {
    link_->send(message);
  } catch (...) {
    link_->destroy();
  }
}

}  // namespace memferry::control
