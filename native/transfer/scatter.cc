// A scatter from its first connection to its last. What goes out on a way: scatter_way.cc; what its answers mean:
// scatter_settle.cc; who does not answer: scatter_watch.cc; the connections to servers: scatter_server.cc.
#include "transfer/scatter.h"

#include <algorithm>
#include <utility>

#include "transfer/scatter_dedup.h"

namespace memferry {
namespace {

std::vector<std::uint64_t> capacities(const SendQueue& queue) {
  std::vector<std::uint64_t> pages;
  for (std::uint32_t region = 0; region < queue.regions(); ++region) {
    pages.push_back(queue.region(region)->capacity_pages());
  }
  return pages;
}

}  // namespace

Scatter::Scatter(ScatterConfig config, Shared shared, std::uint64_t page_size)
    : config_(std::move(config)),
      shared_(std::move(shared)),
      page_size_(page_size),
      where_(capacities(shared_.queue), static_cast<unsigned>(config_.servers.size()), kIndexServers) {
  for (std::uint32_t region = 0; region < shared_.queue.regions(); ++region) {
    const std::uint64_t pages = shared_.queue.region(region)->capacity_pages();
    suspects_.push_back(std::make_unique<AtomicBitmap>(pages));
    for_second_.push_back(std::make_unique<AtomicBitmap>(pages));
    released_.push_back(std::make_unique<AtomicBitmap>(pages));
    discarders_.emplace_back();
    sent_twice_.push_back(std::make_unique<AtomicBitmap>(pages));
    note_sinks_.push_back([this, region](PageNumber page, std::uint64_t xxh3, bool zero) {
      where_.note_hash(region, page, xxh3, zero);
    });
  }
  if (!config_.direct) where_.silence(where_.destination());
  for (const StageServer& address : config_.servers) {
    servers_.push_back(std::make_unique<Server>(address));
    servers_.back()->ordinal = static_cast<std::uint8_t>(servers_.size() - 1);
  }
  if (config_.dedup) dedup_ = std::make_unique<Dedup>(*this, *config_.dedup);
}

Scatter::~Scatter() { close(); }

std::string Scatter::open() {
  for (const auto& server : servers_) {
    Server& own = *server;
    own.thread.start("mf-scatter-" + std::to_string(own.ordinal),
                     [this, &own](WorkerThread&) { serve(own); });
  }
  watcher_.start("mf-evict", [this](WorkerThread& self) { watch(self); });
  if (dedup_) dedup_->start();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] {
    return closing_ ||
           std::all_of(servers_.begin(), servers_.end(), [](const auto& each) { return each->tried; });
  });
  std::string why;
  for (const auto& server : servers_) {
    if (server->failed.empty()) return {};
    why += (why.empty() ? "" : "; ") + server->failed;
  }
  return why;
}

void Scatter::forget_pending() {
  for (std::uint32_t region = 0; region < shared_.queue.regions(); ++region) {
    const AtomicBitmap& pending = shared_.queue.pending(region);
    PageNumber at{0};
    while (const auto run = pending.next_set(at, PageNumber{pending.capacity()}, pending.capacity())) {
      where_.forget(region, *run);
      at = run->end();
    }
  }
}

void Scatter::begin(Kind kind, std::vector<PageFrames::OnHash> sinks, bool references) {
  {
    const std::lock_guard lock(mutex_);
    // A server that failed since the last round took them along.
    queue_suspects_locked();
    forget_pending();
    kind_ = kind;
    look_at_copies_locked();
    queue_seconds_locked();
    if (dedup_) dedup_->begin_locked(kind, references);
    auto all = std::make_shared<std::vector<PageFrames::OnHash>>(note_sinks_);
    for (std::size_t i = 0; i < sinks.size(); ++i) {
      if (!sinks[i]) continue;
      (*all)[i] = [note = note_sinks_[i], sink = std::move(sinks[i])](PageNumber page, std::uint64_t xxh3,
                                                                      bool zero) {
        note(page, xxh3, zero);
        sink(page, xxh3, zero);
      };
    }
    sinks_ = std::move(all);
    begun_ = true;
    dry_ = false;
    changed_.notify_all();
  }
  check_drained();  // nothing may be pending at all
}

std::shared_ptr<Scatter::Way> Scatter::open_direct(unsigned index, std::shared_ptr<wire::Stream> stream,
                                                   std::string name) {
  auto way = std::make_shared<Way>();
  way->name = std::move(name);
  way->stream = std::move(stream);
  if (index == 0) way->listener = static_cast<int>(where_.destination());
  way->chunks = std::make_unique<ChunkGatherer>(
      shared_.queue, Towards::kDestination, shared_.pacer, page_size_,
      PageEncoder::create(config_.encoding, Towards::kDestination, page_size_));
  // What was told on a connection that was cut may not have arrived.
  if (index == 0) where_.tell_again(where_.destination());
  const std::lock_guard lock(mutex_);
  direct_.push_back(way);
  look_at_copies_locked();
  attach_pacer_locked();
  changed_.notify_all();
  return way;
}

std::shared_ptr<Scatter::Way> Scatter::open_demand() {
  auto way = std::make_shared<Way>();
  way->name = "demand channel";
  way->demand = true;
  const std::lock_guard lock(mutex_);
  demand_ = way;
  return way;
}

void Scatter::close_direct(Way& way) {
  {
    const std::lock_guard lock(mutex_);
    way.open = false;
    put_back_locked(way.lane.take_back(true));
    std::erase_if(direct_, [&](const auto& each) { return each.get() == &way; });
    if (!way.demand && direct_.empty()) {
      destination_left_ = Clock::now();
      ++destination_barren_;
    }
    look_at_copies_locked();
    attach_pacer_locked();
    if (demand_.get() == &way) demand_.reset();
    changed_.notify_all();
  }
  check_drained();
}

void Scatter::hold(bool held) {
  {
    const std::lock_guard lock(mutex_);
    held_ = held;
  }
  check_drained();
}

void Scatter::wake() {
  const std::lock_guard lock(mutex_);
  changed_.notify_all();
}

bool Scatter::goes_on_alone() const {
  const std::lock_guard lock(mutex_);
  return index_lives_locked() && std::any_of(servers_.begin(), servers_.end(), [](const auto& server) {
           return server->failed.empty() && !server->full;
         });
}

std::vector<Scatter::ServerStats> Scatter::server_stats() const {
  std::vector<ServerStats> all;
  const std::lock_guard lock(mutex_);
  for (const auto& server : servers_) {
    all.push_back({where_.pages_at(server->ordinal), server->bytes, server->failed});
  }
  return all;
}

std::optional<DedupStats> Scatter::dedup_stats() const {
  return dedup_ ? std::optional(dedup_->stats()) : std::nullopt;
}

std::uint64_t Scatter::pages_single() const { return config_.replicas > 1 ? where_.pages_single() : 0; }

std::uint64_t Scatter::pages_direct() const { return where_.pages_at(wire::Holders::kDestination); }

bool Scatter::encodes() const {
  const bool deltas = config_.encoding.cache != nullptr && (config_.encoding.servers & wire::kFlagDelta) != 0;
  return deltas || (config_.encoding.compress != wire::Compress::kOff && config_.encoding.servers != 0);
}

std::uint64_t Scatter::memory_bytes() const {
  return where_.memory_bytes() + (dedup_ ? dedup_->memory_bytes() : 0) +
         (config_.servers.size() + 1) * PageFrames(page_size_).memory_bytes() +
         (encodes() ? config_.servers.size() * PageEncoder::most_memory_bytes(page_size_) : 0);
}

void Scatter::shut_down() {
  const std::lock_guard lock(mutex_);
  closing_ = true;
  link_pacer_.cancel();
  for (const auto& server : servers_) {
    if (server->way && server->way->stream) server->way->stream->shutdown();
  }
  if (dedup_) dedup_->shut_down_locked();
  changed_.notify_all();
}

void Scatter::close() {
  shut_down();
  if (dedup_) dedup_->stop();
  watcher_.stop();
  for (const auto& server : servers_) server->thread.stop();
}

}  // namespace memferry
