#include "transfer/scatter.h"

#include <algorithm>
#include <utility>

#include "fault/discard.h"
#include "transfer/scatter_impl.h"

namespace memferry {
namespace {

constexpr std::chrono::milliseconds kWatchInterval{20};
// A longer pause of the watcher's own says nothing about its peers.
constexpr std::chrono::milliseconds kWatchGap{500};
// In a socket for so long: the connection takes what it can.
constexpr std::chrono::microseconds kBlocked{300};
// Until the direct way is looked at again.
constexpr std::chrono::microseconds kDirectFirst{500};
constexpr std::uint64_t kRecordPages = 8192;  // hashes of 64 KiB a frame

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
    released_.push_back(std::make_unique<AtomicBitmap>(pages));
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
}

Scatter::~Scatter() { close(); }

std::string Scatter::open() {
  for (const auto& server : servers_) {
    Server& own = *server;
    own.thread.start("mf-scatter-" + std::to_string(own.ordinal),
                     [this, &own](WorkerThread&) { serve(own); });
  }
  watcher_.start("mf-evict", [this](WorkerThread& self) { watch(self); });
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

void Scatter::begin(Kind kind, std::vector<PageFrames::OnHash> sinks) {
  {
    const std::lock_guard lock(mutex_);
    for (std::uint32_t region = 0; region < shared_.queue.regions(); ++region) {
      // Written since it was acknowledged, or never sent.
      const AtomicBitmap& pending = shared_.queue.pending(region);
      PageNumber at{0};
      while (const auto run = pending.next_set(at, PageNumber{pending.capacity()}, pending.capacity())) {
        where_.forget(region, *run);
        at = run->end();
      }
    }
    kind_ = kind;
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
  way->chunks = std::make_unique<ChunkGatherer>(shared_.queue, shared_.pacer, page_size_);
  // What was told on a connection that was cut may not have arrived.
  if (index == 0) where_.tell_again(where_.destination());
  const std::lock_guard lock(mutex_);
  direct_.push_back(way);
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
    if (demand_.get() == &way) demand_.reset();
    changed_.notify_all();
  }
  check_drained();
}

bool Scatter::direct_is_full() const {
  const auto now = Clock::now().time_since_epoch();
  return std::all_of(direct_.begin(), direct_.end(), [&](const auto& way) {
    const Clock::rep since = way->sending_since.load(std::memory_order_relaxed);
    return way->stalled || !way->lane.has_room() || (since != 0 && now - Clock::duration(since) > kBlocked);
  });
}

wire::Holders Scatter::holders_for(const Way& way) const {
  if (way.server == Way::kNobody) return {wire::Holders::kDestination, wire::Holders::kNobody};
  wire::Holders holders{static_cast<std::uint8_t>(way.server), wire::Holders::kNobody};
  if (config_.replicas < 2) return holders;
  for (std::size_t step = 1; step < servers_.size(); ++step) {
    const auto& next = servers_[(static_cast<std::size_t>(way.server) + step) % servers_.size()];
    if (next->failed.empty() && next->way && !next->way->full) {
      holders.second = next->ordinal;
      break;
    }
  }
  return holders;
}

bool Scatter::may_take(const Way& way) const {
  return !dry_ && !way.demand && !way.stalled && !way.full && way.lane.has_room();
}

bool Scatter::wants_work(const Way& way) const {
  if (way.server == Way::kNobody) return may_take(way);
  return may_take(way) && direct_is_full();
}

bool Scatter::run_direct(Way& way, const std::function<bool()>& over, std::string& cut) {
  return run(way, over, cut);
}

bool Scatter::run(Way& way, const std::function<bool()>& over, std::string& cut) {
  CpuCourtesy courtesy(wire::shared_key(shared_.migration));
  const bool server = way.server != Way::kNobody;
  wire::Pacer& pacer = server ? server_pacer_ : shared_.pacer;
  const auto ended = [&] { return over() || shared_.gate.closed(); };
  std::vector<std::byte> buffer;
  for (;;) {
    bool records = false;
    bool chunk = false;
    bool guest_left = false;
    {
      std::unique_lock lock(mutex_);
      for (;;) {
        if (closing_ || !way.open || ended()) return false;
        if (!begun_ && !server) return true;
        records = way.listener != Way::kNobody && where_.anything_untold(static_cast<unsigned>(way.listener));
        chunk = begun_ && wants_work(way);
        if (records || chunk || way.lane.anything_open()) break;
        if (server && begun_ && may_take(way)) {
          changed_.wait_for(lock, kDirectFirst);
        } else {
          changed_.wait(lock);
        }
      }
      guest_left = kind_ == Kind::kPush;
    }
    if (records) {
      if (!send_records(way, buffer, cut)) return false;
    } else if (chunk) {
      if (!shared_.pacer.wait_limit(ended)) return false;
      if (!pacer.wait_turn() && (!server || ended())) return false;
      courtesy.follow(guest_left && pacer.should_stand_back());
      if (!send_chunk(way, *way.chunks, cut)) return false;
    }
    if (!send_barrier(way, !records && !chunk, cut)) return false;
  }
}

bool Scatter::send_records(Way& way, std::vector<std::byte>& buffer, std::string& cut) {
  buffer.clear();
  Whereabouts::Record record;
  const auto listener = static_cast<unsigned>(way.listener);
  bool final = false;
  {
    // From taking a record off the list until it lies in the lane.
    const std::lock_guard lock(mutex_);
    way.in_hand = true;
    final = kind_ == Kind::kPush;
  }
  while (buffer.size() < wire::kRunBytes && where_.next_untold(listener, kRecordPages, record)) {
    wire::FrameHeader header =
        wire::make_header(wire::FrameType::kMap, record.region, record.run, record.holders.tag());
    if (record.zero) header.flags |= wire::kFlagZero;
    if (final) header.flags |= wire::kFlagFinal;
    // By value: a page that is being sent again may have its (equal) hash written right now.
    std::vector<std::uint64_t> hashes(record.hashes.size());
    for (std::size_t i = 0; i < hashes.size(); ++i) {
      hashes[i] =
          std::atomic_ref(const_cast<std::uint64_t&>(record.hashes[i])).load(std::memory_order_relaxed);
    }
    const auto payload = std::as_bytes(std::span(hashes));
    wire::seal(header, payload);
    const auto* head = reinterpret_cast<const std::byte*>(&header);
    buffer.insert(buffer.end(), head, head + sizeof header);
    buffer.insert(buffer.end(), payload.begin(), payload.end());
  }
  {
    // Before it leaves: as long as it is not acknowledged, not everything is told.
    const std::lock_guard lock(mutex_);
    way.in_hand = false;
    if (!buffer.empty()) way.lane.sent({}, buffer.size(), {});
    if (way.server != Way::kNobody) servers_[static_cast<std::size_t>(way.server)]->bytes += buffer.size();
  }
  if (buffer.empty()) return true;
  shared_.count_bytes(buffer.size());
  way.sending_since.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  const wire::IoResult result = way.stream->send_all(std::span<const std::byte>(buffer));
  way.sending_since.store(0, std::memory_order_relaxed);
  if (!result.done()) cut = way.name + ": " + result.describe();
  return result.done();
}

bool Scatter::send_chunk(Way& way, ChunkGatherer& chunks, std::string& cut) {
  wire::Holders holders;
  std::uint64_t returns = 0;
  std::shared_ptr<const std::vector<PageFrames::OnHash>> sinks;
  bool other_holders = false;
  {
    const std::lock_guard lock(mutex_);
    holders = holders_for(way);
    returns = returns_;
    sinks = sinks_;
    other_holders = way.lane.holders_change(holders);
    way.in_hand = true;
  }
  if (other_holders && !send_barrier(way, true, cut)) return false;
  const bool server = way.server != Way::kNobody;
  // Inside the gate from taking on: what is taken is sent, or the region is gone.
  const TouchGate::Pass pass(shared_.gate);
  if (!pass) return false;
  chunks.frames().set_tag(server ? holders.tag() : 0);
  const bool more = chunks.gather(*sinks);
  if (chunks.frames().empty()) {
    {
      const std::lock_guard lock(mutex_);
      looked_locked(more, chunks.gave_back(), returns);
      way.in_hand = false;
      changed_.notify_all();
    }
    check_drained();
    return true;
  }
  {
    // Before it leaves: a refusal may be faster than this thread.
    const std::lock_guard lock(mutex_);
    way.lane.sent(chunks.frames().runs(), chunks.frames().bytes(), holders);
    way.in_hand = false;
    looked_locked(more, chunks.gave_back(), returns);
    if (server) servers_[static_cast<std::size_t>(way.server)]->bytes += chunks.frames().bytes();
    if (!more) changed_.notify_all();
  }
  way.sending_since.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  const PageFrames::Sent sent = chunks.frames().send(*way.stream);
  way.sending_since.store(0, std::memory_order_relaxed);
  if (server) {
    server_pacer_.debit(sent.bytes);
    shared_.pacer.debit_limit(sent.bytes);
  } else {
    shared_.pacer.debit(sent.bytes);
  }
  shared_.count_sent(sent);
  if (!sent.result.done()) cut = way.name + ": " + sent.result.describe();
  return sent.result.done();
}

// What a look at the queue has shown; others may have looked while this one had pages in its hands that it put back.
void Scatter::looked_locked(bool more, bool gave_back, std::uint64_t returns_before) {
  if (gave_back) {
    ++returns_;
    dry_ = false;
    changed_.notify_all();
  } else if (!more && returns_before == returns_) {
    dry_ = true;
  }
}

// Behind what is enough for one, or behind everything when there is nothing more to send right now.
bool Scatter::send_barrier(Way& way, bool now, std::string& cut) {
  std::uint64_t tag = 0;
  {
    // Before it is sent: its answer may be faster than this thread.
    const std::lock_guard lock(mutex_);
    if (!way.lane.anything_open() || (!now && way.lane.open_bytes() < Lane::kBatchBytes)) return true;
    tag = way.lane.close(Clock::now());
  }
  wire::FrameHeader header = wire::make_header(wire::FrameType::kBarrier, 0, {}, tag);
  wire::seal(header);
  shared_.count_bytes(sizeof header);
  const wire::IoResult result = way.stream->send_all(std::as_bytes(std::span(&header, 1)));
  if (!result.done()) cut = way.name + ": " + result.describe();
  return result.done();
}

std::uint64_t Scatter::answered(Way& way, std::span<const RegionRun> runs, std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  way.lane.sent(runs, bytes, {wire::Holders::kDestination, wire::Holders::kNobody});
  return way.lane.close(Clock::now());
}

std::string Scatter::acknowledged(Way& way, std::uint64_t tag) {
  {
    const std::lock_guard lock(mutex_);
    if (!way.open) return {};
    const std::optional<Lane::Batch> batch = way.lane.acknowledged(tag, Clock::now());
    if (!batch) return "an answer to a barrier that was not sent";
    way.stalled = false;
    std::vector<RegionRun> again;
    settle_locked(*batch, again);
    put_back_locked(again);
    changed_.notify_all();
  }
  check_drained();
  return {};
}

// A batch that was given to another way meanwhile: its pages count where they are not safe yet, and need not go
// again then.
void Scatter::settle_locked(const Lane::Batch& batch, std::vector<RegionRun>& again) {
  again = batch.no_room;
  for (const RegionRun& each : batch.torn) {
    if (kind_ == Kind::kRound) {
      suspects_[each.region]->set_run(each.run);
    } else {
      again.push_back(each);
    }
  }
  wire::Holders holders = batch.holders;
  // Its replica's server failed since: one copy is left, and lose() knows nothing of it yet.
  if (holders.second < servers_.size() && !servers_[holders.second]->failed.empty()) {
    holders.second = wire::Holders::kNobody;
  }
  const auto within = [](const std::vector<RegionRun>& runs, std::uint32_t region, PageNumber page) {
    return std::any_of(runs.begin(), runs.end(), [&](const RegionRun& each) {
      return each.region == region && each.run.first <= page && page < each.run.end();
    });
  };
  const auto skipped = [&](std::uint32_t region, PageNumber page) {
    return where_.safe(region, page) || within(batch.torn, region, page) ||
           within(batch.no_room, region, page);
  };
  for (const RegionRun& each : batch.runs) {
    PageRun left = each.run;
    while (left.count > 0) {
      const bool skip = skipped(each.region, left.first);
      std::uint64_t count = 1;
      for (; count < left.count; ++count) {
        if (skipped(each.region, PageNumber{left.first.value + count}) != skip) break;
      }
      const PageRun part{left.first, count};
      if (!skip) {
        if (batch.returned) {
          shared_.queue.pending(each.region).clear_run(part);
          sent_twice_[each.region]->set_run(part);
        }
        where_.settle(each.region, part, holders);
        if (config_.release_as_evicted && kind_ == Kind::kPush) to_release_.push_back({each.region, part});
      }
      left = {part.end(), left.count - count};
    }
  }
}

void Scatter::put_back_locked(const std::vector<RegionRun>& runs) {
  bool any = false;
  for (const RegionRun& each : runs) {
    for (PageNumber page = each.run.first; page < each.run.end(); ++page.value) {
      if (where_.safe(each.region, page)) continue;
      sent_twice_[each.region]->set(page);
      shared_.queue.pending(each.region).set(page);
      any = true;
    }
  }
  if (!any) return;
  ++returns_;
  dry_ = false;
  changed_.notify_all();
}

void Scatter::suspect(std::uint32_t region, PageRun run) { suspects_[region]->set_run(run); }

bool Scatter::released(std::uint32_t region, PageNumber page, wire::Holders& holders) const {
  if (!config_.release_as_evicted || !released_[region]->test(page)) return false;
  holders = where_.holders(region, page);
  return true;
}

void Scatter::never_release(std::uint32_t region, PageNumber page) { sent_twice_[region]->set(page); }

void Scatter::reconcile(std::uint32_t region, const AtomicBitmap& have) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t known = shared_.queue.known_pages(region);
  AtomicBitmap& pending = shared_.queue.pending(region);
  bool again = false;
  for (PageNumber page{0}; page.value < known; ++page.value) {
    const bool there = have.test(page);
    if (there) {
      pending.clear(page);
      if (!where_.safe(region, page))
        where_.settle(region, {page, 1}, {wire::Holders::kDestination, wire::Holders::kNobody});
    } else if (where_.safe(region, page) &&
               where_.holders(region, page).first == wire::Holders::kDestination &&
               !released_[region]->test(page)) {
      where_.forget(region, {page, 1});
      sent_twice_[region]->set(page);
      pending.set(page);
      again = true;
    }
  }
  if (again) {
    ++returns_;
    dry_ = false;
  }
  changed_.notify_all();
}

bool Scatter::drained_locked() const {
  if (!begun_) return false;
  const auto told = [&](unsigned listener) { return !where_.anything_untold(listener); };
  if (kind_ == Kind::kPush) {
    std::uint64_t all = 0;
    for (std::uint32_t region = 0; region < shared_.queue.regions(); ++region)
      all += shared_.queue.known_pages(region);
    if (where_.safe_count() < all) return false;
  } else {
    if (!dry_) return false;
    for (const auto& way : direct_) {
      if (!way->idle()) return false;
    }
    if (config_.direct && !told(where_.destination())) return false;
  }
  for (const auto& server : servers_) {
    if (!server->failed.empty()) continue;
    const bool index = server->ordinal < where_.index_servers();
    // In a push only what has to be told is waited for: every page is safe already.
    if (index && (!told(server->ordinal) || !server->way || !server->way->idle())) return false;
    if (kind_ == Kind::kRound && (!server->way || !server->way->idle())) return false;
  }
  return true;
}

// Said by the watcher: whoever finds it out may hold locks of its own.
void Scatter::check_drained() {
  const std::lock_guard lock(mutex_);
  if (!drained_locked()) return;
  begun_ = false;
  drained_due_ = true;
  if (kind_ == Kind::kRound) {
    for (std::uint32_t region = 0; region < suspects_.size(); ++region) {
      for (std::uint64_t i = 0; i < suspects_[region]->words(); ++i) {
        shared_.queue.pending(region).or_word(i, suspects_[region]->word(i));
      }
    }
  }
  changed_.notify_all();
  watcher_.wake();
}

std::uint64_t Scatter::take_suspects() {
  std::uint64_t listed = 0;
  for (const auto& bitmap : suspects_) {
    listed += bitmap->count();
    bitmap->clear_run({PageNumber{0}, bitmap->capacity()});
  }
  return listed;
}

void Scatter::wake() {
  const std::lock_guard lock(mutex_);
  changed_.notify_all();
}

// Since when a way has given no sign: a batch is not acknowledged, or its thread is stuck in the socket.
std::optional<Scatter::Clock::time_point> Scatter::waits_since(const Way& way) const {
  std::optional<Clock::time_point> since = way.lane.waiting_since();
  if (const Clock::rep sending = way.sending_since.load(std::memory_order_relaxed); sending != 0) {
    const Clock::time_point stuck{Clock::duration(sending)};
    if (!since || stuck < *since) since = stuck;
  }
  return since;
}

// Who does not acknowledge, and what to do about it.
void Scatter::watch(WorkerThread& self) {
  try {
    watch_until_stopped(self);
  } catch (const std::exception& error) {
    shared_.broken(error.what());
  }
}

void Scatter::watch_until_stopped(WorkerThread& self) {
  Clock::time_point looked_at = Clock::now();
  while (!self.stopping()) {
    self.wait(static_cast<int>(kWatchInterval.count()));
    bool due = false;
    bool hopeless = false;
    {
      const std::lock_guard lock(mutex_);
      if (closing_) return;
      due = std::exchange(drained_due_, false);
      const Clock::time_point now = Clock::now();
      std::vector<Way*> ways;
      for (const auto& way : direct_) ways.push_back(way.get());
      for (const auto& server : servers_) {
        if (server->way) ways.push_back(server->way.get());
      }
      const bool somebody_idle = std::any_of(ways.begin(), ways.end(), [](const Way* way) {
        return way->idle() && way->open && !way->stalled && !way->full;
      });
      if (demand_) ways.push_back(demand_.get());
      // With no destination only servers can take what is left.
      hopeless =
          begun_ && !config_.direct && !dry_ &&
          std::all_of(servers_.begin(), servers_.end(), [](const auto& server) {
            return !server->failed.empty() || (server->way && server->way->full && server->way->idle());
          });
      // After a stop of this process its peers' answers are read before anyone is judged.
      const bool awake = now - looked_at < kWatchGap;
      looked_at = now;
      for (Way* way : ways) {
        const auto since = waits_since(*way);
        if (!since || !awake) continue;
        const auto age = now - *since;
        if (age > config_.stall_timeout && way->server != Way::kNobody) {
          Server& server = *servers_[static_cast<std::size_t>(way->server)];
          fail_server_locked(server, way->name + " does not acknowledge what it is sent");
          continue;
        }
        if (age > config_.answer_timeout && way->stream) way->stream->shutdown();
        // In a round only servers are given up: to the destination an older copy must never come after a newer one.
        if (kind_ != Kind::kPush || !begun_) continue;
        if (age > config_.stall_timeout || (dry_ && age > kTailPatience && somebody_idle)) {
          way->stalled = way->stalled || age > config_.stall_timeout;
          // What is in the socket cannot be taken back while its thread is in it: end that.
          if (way->stalled && way->sending_since.load(std::memory_order_relaxed) != 0 && way->stream) {
            way->stream->shutdown();
          }
          if (way->lane.anything_to_take_back()) put_back_locked(way->lane.take_back(false));
        }
      }
    }
    if (due) shared_.drained();
    if (hopeless) {
      shared_.broken({});
      return;
    }
    check_drained();
    if (config_.release_as_evicted) release_settled();
  }
}

// Gives back what others hold now. A page that may still be read here (it went out twice) waits for the end.
void Scatter::release_settled() {
  const std::unique_lock reading(release_mutex_, std::try_to_lock);
  const TouchGate::Pass pass(shared_.gate);
  if (!reading || !pass) return;
  std::vector<RegionRun> once;
  {
    // Decided together with the mark: whoever makes a page pending again sees it, or is seen here.
    const std::lock_guard lock(mutex_);
    for (const RegionRun& each : std::exchange(to_release_, {})) {
      for (PageNumber page = each.run.first; page < each.run.end(); ++page.value) {
        if (!where_.safe(each.region, page) || sent_twice_[each.region]->test(page) ||
            shared_.queue.pending(each.region).test(page)) {
          continue;
        }
        released_[each.region]->set(page);
        if (!once.empty() && once.back().region == each.region && once.back().run.end() == page) {
          ++once.back().run.count;
        } else {
          once.push_back({each.region, {page, 1}});
        }
      }
    }
  }
  try {
    for (const RegionRun& each : once) {
      const auto& region = shared_.queue.region(each.region);
      Discarder discarder(backing_of(*region));
      for (PageRun part = each.run; part.count > 0;) {
        const auto bytes = region->contiguous(part);
        discarder.add(Address::of(bytes.data()), bytes.size());
        part = {PageNumber{part.first.value + bytes.size() / page_size_},
                part.count - bytes.size() / page_size_};
      }
      discarder.flush();
    }
  } catch (const std::exception&) {
    // Memory that cannot be given back early (it is locked, say) goes when its owner lets it go.
  }
}

bool Scatter::servers_can_take() const {
  const std::lock_guard lock(mutex_);
  return std::any_of(servers_.begin(), servers_.end(), [](const auto& server) {
    return server->failed.empty() && (!server->way || !server->way->full);
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

std::uint64_t Scatter::pages_direct() const { return where_.pages_at(wire::Holders::kDestination); }

std::uint64_t Scatter::memory_bytes() const {
  return where_.memory_bytes() + (config_.servers.size() + 1) * PageFrames(page_size_).memory_bytes();
}

void Scatter::shut_down() {
  const std::lock_guard lock(mutex_);
  closing_ = true;
  server_pacer_.cancel();
  for (const auto& server : servers_) {
    if (server->way && server->way->stream) server->way->stream->shutdown();
  }
  changed_.notify_all();
}

void Scatter::close() {
  shut_down();
  watcher_.stop();
  for (const auto& server : servers_) server->thread.stop();
}

}  // namespace memferry
