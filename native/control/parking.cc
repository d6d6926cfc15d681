#include "control/parking.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "control/json.h"
#include "control/park_servers.h"
#include "os/mapping.h"

namespace memferry::control {

namespace {

constexpr std::size_t kLineageBytes = 32;
// Between two looks at what only a look tells: connections that have ended, a home server that was given up.
constexpr std::chrono::milliseconds kLook{500};

std::uint16_t wanted_encodings(wire::Compress compress) {
  switch (compress) {
    case wire::Compress::kOff:
      return 0;
    case wire::Compress::kLz4:
      return wire::kFlagLz4;
    case wire::Compress::kZstd:
      return wire::kFlagZstd;
    case wire::Compress::kAuto:
      break;
  }
  return wire::kCompressions;
}

}  // namespace

struct Parking::Progress {
  std::mutex mutex;  // guards the rest
  std::condition_variable changed;
  bool connected = false;
  std::uint64_t round = 0;  // the last that is done
  std::uint64_t suspects = 0;
  std::optional<Cause> failed;

  void told(const EngineEvent& event) {
    {
      const std::lock_guard lock(mutex);
      if (event.kind == EngineEventKind::kConnected) connected = true;
      if (event.kind == EngineEventKind::kRoundDone) {
        round = event.tag;
        suspects = event.suspects;
      }
      if (event.kind == EngineEventKind::kFailed) {
        try {
          failed = engine_cause(event.code, event.message);
        } catch (const std::bad_alloc&) {
          failed.emplace(Cause{});  // who waits is told what can be told
        }
      }
    }
    changed.notify_all();
  }
};

Parking::Parking(ParkOptions options, const std::vector<std::shared_ptr<Region>>& regions, Bytes state)
    : options_(std::move(options)),
      regions_(regions),
      state_(std::make_shared<const Bytes>(std::move(state))),
      progress_(std::make_shared<Progress>()) {
  if (regions_.empty() || regions_.size() != options_.guest.regions.size())
    throw std::invalid_argument("regions: as many names as regions");
  if (state_->size() > options_.vmd.max_state_bytes)
    throw Failure("LIMIT_EXCEEDED", "a state of " + std::to_string(state_->size()) + " bytes; " +
                                        std::to_string(options_.vmd.max_state_bytes) + " are allowed");
  PlacementNeed need;
  need.replicas = options_.replicas;
  for (std::size_t i = 0; i < regions_.size(); ++i) {
    const Region& region = *regions_[i];
    OfferedRegion& of = options_.guest.regions[i];
    of.page_size = region.page_size();
    of.length_bytes = region.bytes();
    of.capacity_bytes = region.capacity_pages() * region.page_size();
    need.bytes += of.length_bytes;
    need.index_pages += index_pages(region.capacity_pages(), region.page_size());
  }
  options_.vmd.cancelled = [this] { return cancelled_ && !unwinding_; };
  fill_random(id_);
  fill_random(secret_);
  make_image(dial_servers(options_.servers, options_.vmd, need));
  try {
    ticket_ = make_ticket();
    const ParkCommit::Timeouts timeouts{options_.ready_timeout, options_.vmd.in_doubt_timeout,
                                        options_.vmd.connect_timeout};
    commit_ = std::make_unique<ParkCommit>(*image_, timeouts, [this] { return cancelled_.load(); });
    sender_ = std::make_unique<Sender>(sender_config());
  } catch (...) {
    give_back();
    throw;
  }
}

Parking::~Parking() {
  if (phase_ == Phase::kNew) give_back();
  if (sender_) sender_->close(phase_ == Phase::kParked);
}

void Parking::make_image(std::vector<std::unique_ptr<StageClient>> clients) {
  NewImage made;
  made.name = options_.guest.name;
  made.page_size = regions_.front()->page_size();
  made.replicas = options_.replicas;
  made.lease = options_.lease;
  for (std::size_t i = 0; i < regions_.size(); ++i)
    made.regions.push_back(
        {options_.guest.regions[i].name, regions_[i]->pages(), regions_[i]->capacity_pages()});
  image_ = std::make_unique<StagedImage>(to_hex(id_), secret_, options_.vmd);
  image_->make(std::move(clients), made);
}

SenderConfig Parking::sender_config() const {
  SenderConfig config;
  config.regions = regions_;
  config.host = "127.0.0.1";
  config.direct = false;
  config.migration = id_;
  config.channels = 1;
  config.tokens.resize(2);
  for (wire::Token& token : config.tokens) fill_random(token);  // nobody is dialled: there is no destination
  config.bandwidth = options_.bandwidth;
  config.connect_timeout = options_.vmd.connect_timeout;
  config.recover_timeout = options_.vmd.recover_timeout;
  config.stall_timeout = options_.stall_timeout;
  config.servers = image_->servers();
  config.replicas = options_.replicas;
  config.compress = options_.compress;
  config.server_encodings =
      static_cast<std::uint16_t>(image_->encodings() & wanted_encodings(options_.compress));
  config.on_event = [progress = progress_](const EngineEvent& event) { progress->told(event); };
  return config;
}

std::string Parking::make_ticket() const {
  const StageServer home = image_->servers().front();
  const bool v6 = home.host.find(':') != std::string::npos;
  Json module;
  if (options_.guest.module)
    module = {{"name", options_.guest.module->name}, {"sha256", options_.guest.module->sha256}};
  Bytes lineage(kLineageBytes);
  fill_random(lineage);
  return to_text(
      {{"image", to_hex(id_)},
       {"secret", to_hex(secret_)},
       {"home", (v6 ? "[" + home.host + "]" : home.host) + ":" + std::to_string(home.port)},
       {"guest",
        {{"name", options_.guest.name}, {"module", std::move(module)}, {"lineage", to_hex(lineage)}}}});
}

void Parking::evict() {
  Phase before = Phase::kNew;
  if (!phase_.compare_exchange_strong(before, Phase::kEvicting) &&
      !(before == Phase::kInDoubt && phase_.compare_exchange_strong(before, Phase::kEvicting))) {
    if (before == Phase::kParked) return;
    throw std::invalid_argument(before == Phase::kEvicting ? "the guest is being evicted already"
                                                           : "this park is over: close it");
  }
  ParkCommit::Settlement settlement;
  try {
    if (before == Phase::kInDoubt) {
      settlement = commit_->ask_again();
    } else {
      began_ = Clock::now();
      move_out();
      unwinding_ = true;
      committing_ = true;
      settlement = commit_->run();
    }
  } catch (...) {
    // There may be no memory to say so, but then it is in doubt.
    if (granted()) {
      phase_ = Phase::kInDoubt;
    } else {
      give_back();
    }
    throw;
  }
  conclude(settlement);
}

void Parking::conclude(const ParkCommit::Settlement& settlement) {
  switch (settlement.outcome) {
    case SourceOutcome::kDeparted:
      eviction_ms_ = std::chrono::duration<double, std::milli>(Clock::now() - began_).count();
      phase_ = Phase::kParked;
      sender_->close(true);
      return;
    case SourceOutcome::kInDoubt:
      phase_ = Phase::kInDoubt;
      break;
    case SourceOutcome::kLost:
      phase_ = Phase::kOver;
      break;
    case SourceOutcome::kReclaimed:
      give_back();
      break;
  }
  throw Failure(settlement.cause);
}

// The guest is the caller's: the servers let go of it.
void Parking::give_back() noexcept {
  unwinding_ = true;
  try {
    if (sender_) sender_->close(false);
    if (committing_) cancel_at_home();
    (void)image_->dissolve(0);
  } catch (const std::exception&) {
    // Then the servers' leases end it, or their operators.
  }
  phase_ = Phase::kOver;
}

// A home server that was READY when its connection was cut has not heard of it, and lets nobody dissolve the image.
void Parking::cancel_at_home() {
  try {
    if (!image_->has_home()) image_->redial_home(options_.vmd.connect_timeout);
    (void)image_->tell_home(
        to_json(CommitQuestion{CommitQuestion::Type::kCancel, 0, {"CANCELLED", "the guest was not parked"}}));
  } catch (const std::exception&) {
    // It hears nothing of the source, and refuses by itself.
  }
}

void Parking::cancel() noexcept {
  cancelled_ = true;
  progress_->changed.notify_all();
}

void Parking::stop_if_cancelled() const {
  if (cancelled_) throw Failure("CANCELLED", "the park was cancelled");
}

Parking::Stats Parking::stats() const { return {sender_->stats(), eviction_ms_}; }

void Parking::move_out() {
  stop_if_cancelled();
  sender_->connect();
  await([](const Progress& progress, std::uint64_t) { return progress.connected; }, 0);
  sender_->queue_populated();
  settle();
  std::vector<std::string> digests;
  for (std::uint32_t i = 0; i < regions_.size(); ++i) {
    stop_if_cancelled();
    digests.push_back(to_hex(sender_->digest(i)));
  }
  image_->seal(digests);
  image_->put_state(options_.guest, state_);
  const StagedImage::Held held = image_->hold();
  stop_if_cancelled();
  // What a server that does not hold had may be lost with it. With a second copy of everything one may go; but where one
  // was given up before, its pages have had one copy since.
  const std::size_t away = held.not_held + (options_.replicas > 1 ? held.given_up : 0);
  if (held.not_held > 0 && away >= options_.replicas) throw Failure(held.why);
}

// Until a round has left nothing, and no server has failed meanwhile: what such a server took along goes again.
void Parking::settle() {
  std::vector<bool> before = failed_servers();
  for (std::size_t tries = 0; tries <= before.size(); ++tries) {
    const std::uint64_t suspects = round();
    std::vector<bool> failed = failed_servers();
    if (suspects == 0 && failed == before) {
      for (std::size_t at = 0; at < failed.size(); ++at) {
        if (failed[at]) image_->give_up(at, "it did not take the guest's pages");
      }
      return;
    }
    before = std::move(failed);
  }
  throw Failure("PROTOCOL_ERROR", "pages of the guest changed while they were sent: it does not stand");
}

std::uint64_t Parking::round() {
  sender_->start_round(++tag_);
  await([](const Progress& progress, std::uint64_t tag) { return progress.round >= tag; }, tag_);
  const std::lock_guard lock(progress_->mutex);
  return progress_->suspects;
}

void Parking::await(bool (*there)(const Progress&, std::uint64_t tag), std::uint64_t tag) {
  for (;;) {
    {
      std::unique_lock lock(progress_->mutex);
      const auto over = [&] { return cancelled_ || progress_->failed || there(*progress_, tag); };
      (void)progress_->changed.wait_for(lock, kLook, over);
      if (progress_->failed && progress_->failed->code.empty()) throw std::bad_alloc();
      if (progress_->failed) throw Failure(*progress_->failed);
      if (there(*progress_, tag)) return;
    }
    stop_if_cancelled();
    (void)failed_servers();
    image_->keep_open();
  }
}

std::vector<bool> Parking::failed_servers() const {
  const std::vector<SenderStats::Server> servers = sender_->stats().servers;
  if (!servers.front().failed.empty())
    throw Failure("PEER_LOST", "the guest's home server is gone: " + servers.front().failed);
  std::vector<bool> failed;
  failed.reserve(servers.size());
  for (const SenderStats::Server& server : servers) failed.push_back(!server.failed.empty());
  return failed;
}

}  // namespace memferry::control
