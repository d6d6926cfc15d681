#include "control/arrival.h"

#include <algorithm>
#include <utility>

#include "control/text.h"

namespace memferry::control {

namespace {

using Type = SourceSays::Type;

constexpr std::size_t kMaxLostRuns = 4096;  // named in one report of a loss; the rest is counted only
constexpr std::chrono::milliseconds kLossGrace{250};

double ms_since(Arrival::Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Arrival::Clock::now() - start).count();
}

Json run_names(const std::vector<RegionRun>& runs) {
  Json names = Json::array();
  for (const RegionRun& run : runs) {
    if (names.size() == kMaxLostRuns) break;
    names.push_back({{"region", run.region}, {"first", run.run.first.value}, {"count", run.run.count}});
  }
  return names;
}

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

void Arrival::close() { post({.kind = Event::Kind::kClose}); }

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
        for (Event& event : events) handle(event);
        read_link();
        look_at_clock();
      } catch (...) {
        fail(cause_of_current("SYSTEM"));
      }
    }
  }
  prepare_.stop();
  if (config_.ended) config_.ended();
}

// False: the offer was declined, and the source knows why.
bool Arrival::accepted() {
  Json answer;
  try {
    guest_ = config_.accept(config_.offer);
    const auto& offered = config_.offer.guest.regions;
    if (!guest_ || guest_->regions().size() != offered.size())
      throw Failure("PREPARE_FAILED", "the destination has another number of regions for the guest");
    for (std::size_t i = 0; i < offered.size(); ++i) {
      const Region& region = *guest_->regions()[i];
      if (region.bytes() < offered[i].length_bytes)
        throw Failure("NO_MEMORY", "region '" + offered[i].name + "' is too short here");
      if (region.page_size() != offered[i].page_size)
        throw Failure("LIMIT_EXCEEDED", "pages of " + std::to_string(offered[i].page_size) +
                                            " bytes; here they have " + std::to_string(region.page_size()));
    }
    if (link_->ended()) throw Failure("PEER_LOST", "the source is gone");
    make_receiver();
    answer = {{"type", "accepted"},
              {"encodings", encoding_names(config_.offer.encodings)},
              {"basePages", nullptr},
              {"tellsMissing", true},
              {"references", nullptr}};
    config_.listener->add(receiver_);
  } catch (...) {
    Cause cause;
    try {
      cause = told(cause_of_current("PREPARE_FAILED"));
      link_->send(
          {{"type", "declined"}, {"code", cause.code}, {"message", cause.message}, {"names", Json::array()}});
    } catch (...) {
      // No memory to say why: the end of the connection says enough.
    }
    std::exchange(link_, nullptr)->close();
    if (receiver_) receiver_->close();
    if (guest_) {
      guest_->abandon(cause);
      guest_->ended();
    }
    return false;
  }
  tell(answer);
  return true;
}

void Arrival::make_receiver() {
  const Offer& offer = config_.offer;
  ReceiverConfig config;
  config.regions = guest_->regions();
  config.migration = offer.migration;
  config.channels = offer.channels;
  config.tokens = data_tokens(config_.session, offer.migration, offer.channels);
  config.may_page = offer.may_page;
  config.keep_page_hashes = offer.verify;
  config.recover_timeout = config_.options.recover_timeout;
  config.loss_grace = kLossGrace;
  config.bandwidth = config_.options.bandwidth;
  config.encodings = offer.encodings;
  config.on_event = [this](const EngineEvent& event) {
    post({.kind = Event::Kind::kEngine, .engine = event});
  };
  std::shared_ptr<Receiver> receiver = Receiver::create(std::move(config));
  const std::lock_guard lock(mutex_);
  receiver_ = std::move(receiver);
}

void Arrival::handle(Event& event) {
  switch (event.kind) {
    case Event::Kind::kEngine:
      return on_engine(event.engine);
    case Event::Kind::kPrepareEnded:
      if (preparing_ != Preparing::kRuns) return;
      preparing_ = Preparing::kEnded;
      prepare_until_.reset();
      if (abandoning_) return abandon_guest();
      if (event.cause) return fail(*event.cause);
      prepare_ms_ = ms_since(prepare_began_);
      dispatch(DestinationEvent::of(DestinationEvent::Type::kPrepared));
      return tell({{"type", "prepared"}, {"prepareMs", prepare_ms_}});
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
    case EngineEventKind::kLost:
      return lost(event);
    case EngineEventKind::kFailed:
      return fail(engine_cause(event.code, event.message));
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
      if (told_complete_) summarise();
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
  if (has_resumed() && (every_page_ || settled_)) linger();
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
    const bool waits = preparing_ == Preparing::kAwaitsSwitch;
    if (waits) preparing_ = Preparing::kEnded;
    fail({"PREPARE_TIMEOUT",
          waits ? "the switch to post-copy did not come in time" : "prepare did not end in time"});
  }
  if (passed(grant_until_)) dispatch(DestinationEvent::of(DestinationEvent::Type::kGrantTimer));
  if (passed(linger_until_)) end();
}

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
    if (decided && config_.decided) config_.decided(commit_);
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

void Arrival::resume() {
  // First: the outcome is remembered, and nothing that can fail may come in between.
  guest_->resume();
  resumed_at_ = Clock::now();
  const bool paging = receiver_->paging() || receiver_->stats().pages_missing > 0;
  if (!paging) every_page_ = true;
  // What follows from every page being here comes after RESUMED has been said.
  EngineEvent complete{};
  complete.kind = EngineEventKind::kComplete;
  if (every_page_) post({.kind = Event::Kind::kEngine, .engine = complete});
}

void Arrival::every_page() {
  every_page_ = true;
  if (!has_resumed() || told_complete_) return;
  told_complete_ = true;
  gather_ms_ = ms_since(resumed_at_);
  tell_complete();
}

void Arrival::tell_complete() {
  tell({{"type", "complete"}});
  if (!config_.offer.verify) finish();
  if (!link_) linger();
  if (evicted_) summarise();
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

void Arrival::grow(std::uint32_t index, std::uint64_t length_bytes) {
  const auto& regions = guest_->regions();
  if (index >= regions.size() || commit_.phase != DestinationPhase::kReceiving ||
      length_bytes % regions[index]->page_size() != 0)
    return fail({"PROTOCOL_ERROR", "growth of a region that is not there, or too late"});
  if (length_bytes > config_.offer.guest.regions[index].capacity_bytes)
    return fail({"PROTOCOL_ERROR", "a region that grows beyond its own capacity"});
  Region& region = *regions[index];
  try {
    if (length_bytes > region.bytes()) guest_->grow(index, length_bytes);
    if (length_bytes > region.bytes())
      throw Failure("LIMIT_EXCEEDED", "this guest cannot grow at the destination");
    receiver_->grow(index, length_bytes / region.page_size());
  } catch (...) {
    return fail(cause_of_current("LIMIT_EXCEEDED"));
  }
  tell({{"type", "grown"}, {"region", index}});
}

void Arrival::summarise() {
  const std::vector<std::uint32_t> regions = mismatched(digests_);
  const ReceiverStats stats = receiver_->stats();
  tell({{"type", "summary"},
        {"remoteFaults",
         {{"count", stats.faults.count},
          {"p50Us", stats.faults.p50_us},
          {"p99Us", stats.faults.p99_us},
          {"maxUs", stats.faults.max_us}}},
        {"extraMemoryBytes", stats.extra_memory_bytes},
        {"mismatched", regions}});
  conclude(regions);
}

// The regions whose content is not what left the source.
std::vector<std::uint32_t> Arrival::mismatched(const std::optional<std::vector<std::string>>& digests) {
  std::vector<std::uint32_t> regions;
  if (!digests || !config_.offer.verify) return regions;
  const std::size_t count = guest_->regions().size();
  for (std::uint32_t i = 0; i < digests->size() && i < count; ++i) {
    const Hash128 digest = receiver_->digest(i);
    Bytes bytes(16);
    for (unsigned at = 0; at < 8; ++at) {
      bytes[at] = static_cast<std::uint8_t>(digest.high >> (56 - 8 * at));
      bytes[8 + at] = static_cast<std::uint8_t>(digest.low >> (56 - 8 * at));
    }
    if (to_hex(bytes) != (*digests)[i]) regions.push_back(i);
  }
  verified_ = digests->size() == count && regions.empty();
  return regions;
}

void Arrival::conclude(const std::vector<std::uint32_t>& regions) {
  if (regions.empty()) return finish();
  std::string names;
  for (const std::uint32_t index : regions) names += " '" + config_.offer.guest.regions[index].name + "'";
  reject({"VERIFICATION_FAILED", "the digests differ of" + names});
}

void Arrival::finish() {
  if (settled_) return;
  settled_ = true;
  ArrivalReport report;
  report.migration = config_.offer.id;
  report.guest = config_.offer.guest.name;
  for (const auto& region : guest_->regions()) report.heap_bytes += region->bytes();
  report.verified = verified_;
  report.prepare_ms = prepare_ms_;
  report.gather_ms = gather_ms_;
  report.stats = receiver_->stats();
  guest_->complete(report);
}

void Arrival::lost(const EngineEvent& event) {
  std::uint64_t pages = 0;
  for (const RegionRun& run : event.lost) pages += run.run.count;
  const Cause cause{"PAGES_LOST", event.message + "; " + std::to_string(pages) + " pages of '" +
                                      config_.offer.guest.name + "' are lost, and reading one fails"};
  // Before the commit the guest is still the source's; closing the engine poisons what is missing.
  if (!has_resumed()) return fail(cause);
  reject(cause);
  tell({{"type", "lost"}, {"runs", run_names(event.lost)}});
  guest_->lost(event.lost, event.message);
  receiver_->acknowledge_loss();
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

void Arrival::reject(const Cause& cause) {
  if (settled_) return;
  settled_ = true;
  if (has_resumed() && !link_) linger();
  guest_->failed(cause);
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
