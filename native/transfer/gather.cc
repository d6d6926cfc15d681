#include "transfer/gather.h"

#include <algorithm>

#include "transfer/gather_link.h"

namespace memferry {
namespace {

using wire::Holders;

void raise(std::atomic<Gather::Clock::rep>& latest, Gather::Clock::time_point to) {
  Gather::Clock::rep seen = latest.load();
  while (seen < to.time_since_epoch().count() &&
         !latest.compare_exchange_weak(seen, to.time_since_epoch().count())) {
  }
}

// Pages of one block are asked for at the same one of two holders.
constexpr std::uint64_t kBlockPages = 256;
constexpr unsigned kCursorShift = 48;
// A server whose way is longer than twice the source's by no more than this is as near.
constexpr std::chrono::microseconds kNear{500};
// One that takes so long on average, without being late for any one page, is as good as late.
constexpr std::chrono::milliseconds kSlow{5};
// How long a server that answered late is not asked for what the source has.
constexpr std::chrono::milliseconds kLateFor{1000};

}  // namespace

Gather::Gather(Config config, std::vector<ArrivalMap*> maps, Receiver receiver)
    : config_(std::move(config)),
      maps_(std::move(maps)),
      receiver_(std::move(receiver)),
      limit_(config_.limit) {
  for (const ArrivalMap* map : maps_) {
    where_.push_back(std::make_unique<LocationMap>(map->received.capacity()));
    elsewhere_.push_back(std::make_unique<AtomicBitmap>(map->received.capacity()));
  }
  for (const StageServer& address : config_.servers) {
    auto server = std::make_unique<Server>();
    server->address = &address;
    server->ordinal = static_cast<std::uint8_t>(servers_.size());
    server->last_good = Clock::now();
    for (const ArrivalMap* map : maps_)
      server->todo.push_back(std::make_unique<AtomicBitmap>(map->received.capacity()));
    server->ahead = std::make_unique<GatherLink>(*this, *server, wire::StageRole::kGather);
    server->demand = std::make_unique<GatherLink>(*this, *server, wire::StageRole::kDemand);
    servers_.push_back(std::move(server));
  }
}

Gather::~Gather() { close(); }

void Gather::start() {
  for (const auto& server : servers_) {
    server->demand->start();
    server->ahead->start();
  }
}

bool Gather::usable(std::uint8_t ordinal) const {
  return ordinal < servers_.size() && !servers_[ordinal]->failed;
}

std::uint8_t Gather::chosen(PageNumber page, Holders holders) const {
  const bool second_first = (page.value / kBlockPages & 1) != 0;
  const std::uint8_t one = second_first ? holders.second : holders.first;
  const std::uint8_t other = second_first ? holders.first : holders.second;
  // Who is up goes before who is only not given up.
  for (const std::uint8_t each : {one, other}) {
    if (usable(each) && servers_[each]->up) return each;
  }
  for (const std::uint8_t each : {one, other}) {
    if (usable(each)) return each;
  }
  return Holders::kNobody;
}

void Gather::assign(std::uint32_t region, PageNumber page) {
  if (maps_[region]->received.test(page)) return;
  for (;;) {
    const std::uint8_t to = chosen(page, where_[region]->holders(page));
    if (to == Holders::kNobody) return;
    servers_[to]->todo[region]->set(page);
    // fail() says so before it looks what is to do there: one of the two sees the other.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!servers_[to]->failed) return;
  }
}

bool Gather::record(std::uint32_t region, PageRun run, Holders holders, bool zero,
                    std::span<const std::uint64_t> hashes, bool by_source) {
  const auto known = [&](std::uint8_t ordinal) { return ordinal < servers_.size(); };
  if (holders.first == Holders::kDestination || holders.first == Holders::kNobody) return true;
  if (!known(holders.first) || (holders.second != Holders::kNobody && !known(holders.second))) return false;
  if (zero) {
    for (PageRun left = run; left.count > 0;) {
      const auto open = [&](std::uint64_t at) {
        return by_source ||
               where_[region]->holders(PageNumber{left.first.value + at}).first == Holders::kNobody;
      };
      const bool zeros = open(0);
      std::uint64_t count = 1;
      while (count < left.count && open(count) == zeros) ++count;
      if (zeros) receiver_.zeros(region, {left.first, count});
      left = {PageNumber{left.first.value + count}, left.count - count};
    }
    receiver_.changed();
    return true;
  }
  for (std::uint64_t i = 0; i < run.count; ++i) {
    const PageNumber page{run.first.value + i};
    const std::lock_guard lock(records_);
    // Where the source sent it since, a server may be the only one to know.
    const Holders told = where_[region]->holders(page);
    const std::uint64_t hash = hashes[static_cast<std::size_t>(i)];
    const Holders now = by_source ? holders : told_by_server(region, page, told, holders, hash);
    if (!by_source && now == told) continue;
    where_[region]->put(page, now, hash);
    if (now.second != Holders::kNobody) replicas_.store(true, std::memory_order_relaxed);
    assign(region, page);
  }
  wake_ahead();
  receiver_.changed();
  return true;
}

// With records_ held: the page's holders, now that a server's map has these.
Holders Gather::told_by_server(std::uint32_t region, PageNumber page, Holders told, Holders holders,
                               std::uint64_t hash) {
  const auto believed = [&](std::uint8_t each) {
    return each < servers_.size() && !denied(*servers_[each], region, page);
  };
  const bool known = usable(told.first) || usable(told.second);
  if (known && where_[region]->hash(page) != hash) return told;
  Holders now = known ? told : Holders{};
  for (const std::uint8_t each : {holders.first, holders.second}) {
    if (!believed(each) || now.has(each) || (usable(now.first) && usable(now.second))) continue;
    // A place that is free, or that of one that has failed.
    (now.first == Holders::kNobody || usable(now.second) ? now.first : now.second) = each;
  }
  return now;
}

// With records_ held.
void Gather::deny(Server& server, std::uint32_t region, PageNumber page) {
  if (server.denied.empty()) {
    for (const ArrivalMap* map : maps_)
      server.denied.push_back(std::make_unique<AtomicBitmap>(map->received.capacity()));
  }
  server.denied[region]->set(page);
  denials_ = true;
}

bool Gather::denied(const Server& server, std::uint32_t region, PageNumber page) const {
  return !server.denied.empty() && server.denied[region]->test(page);
}

Gather::Doubt Gather::doubted(std::uint32_t region, PageNumber page) {
  if (!denials_) return Doubt::kNone;
  const std::lock_guard lock(records_);
  if (!asked_twice_.empty() && asked_twice_[region]->test(page)) return Doubt::kAskedTwice;
  const auto has_denied = [&](const auto& server) { return denied(*server, region, page); };
  return std::any_of(servers_.begin(), servers_.end(), has_denied) ? Doubt::kAskOnce : Doubt::kNone;
}

// Nobody else is known to have them: whoever denied it may be told of again, once.
void Gather::ask_twice(const std::vector<RegionRun>& pages) {
  const std::lock_guard lock(records_);
  if (asked_twice_.empty()) {
    for (const ArrivalMap* map : maps_)
      asked_twice_.push_back(std::make_unique<AtomicBitmap>(map->received.capacity()));
  }
  for (const auto& [region, run] : pages) {
    for (PageNumber page = run.first; page < run.end(); ++page.value) {
      asked_twice_[region]->set(page);
      for (const auto& server : servers_) {
        if (!server->denied.empty()) server->denied[region]->clear(page);
      }
    }
  }
  raise(displaced_at_, Clock::now());
}

void Gather::forget(std::uint32_t region, PageRun run) {
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    // Without a holder it may still be on its way from one that had it.
    if (where_[region]->holders(page).first == Holders::kNobody && where_[region]->hash(page) == 0) continue;
    where_[region]->clear(page);
    for (const auto& server : servers_) server->todo[region]->clear(page);
  }
}

bool Gather::is_current(std::uint32_t region, PageNumber page, std::uint64_t hash) const {
  return where_[region]->hash(page) == hash;
}

bool Gather::request(std::uint32_t region, PageRun run) {
  cursor_.store(std::uint64_t{region} << kCursorShift | run.end().value, std::memory_order_relaxed);
  cursor_moves_.fetch_add(1, std::memory_order_relaxed);
  const LocationMap& where = *where_[region];
  const Holders holders = where.holders(run.first);
  std::uint64_t count = 1;
  while (count < run.count && where.holders(PageNumber{run.first.value + count}) == holders) ++count;
  for (const std::uint8_t each : {chosen(run.first, holders), holders.first, holders.second}) {
    if (usable(each) && servers_[each]->demand->ask(region, {run.first, count})) return true;
  }
  return false;
}

bool Gather::request_near(std::uint32_t region, PageRun run, DemandWriter& to_source) {
  const std::uint8_t to = chosen(run.first, where_[region]->holders(run.first));
  if (to == Holders::kNobody) return false;
  const Server& server = *servers_[to];
  if (!server.up || Clock::now().time_since_epoch().count() < server.late_until) return false;
  const auto there = server.demand->round_trip();
  const auto to_it = to_source.round_trip();
  return there && to_it && *there <= 2 * *to_it + kNear && request(region, run);
}

void Gather::spare(Server& server) const {
  server.late_until = (Clock::now() + kLateFor).time_since_epoch().count();
}

void Gather::late(std::uint32_t region, PageNumber page) {
  for (const auto& server : servers_) {
    if (server->demand->under_way(region, page)) spare(*server);
  }
}

void Gather::answered_demand(Server& server, Clock::duration took) const {
  server.answers_within += (took - server.answers_within) / 8;
  if (server.answers_within < kSlow) return;
  spare(server);
  server.answers_within = {};
}

bool Gather::coming(std::uint32_t region, PageNumber page) const {
  return std::any_of(servers_.begin(), servers_.end(),
                     [&](const auto& server) { return server->ahead->under_way(region, page); });
}

void Gather::wake_ahead() {
  for (const auto& server : servers_) server->ahead->wake();
}

void Gather::set_elsewhere(std::uint32_t region, PageNumber page) { elsewhere_[region]->set(page); }

bool Gather::elsewhere(std::uint32_t region, PageNumber page) const { return elsewhere_[region]->test(page); }

void Gather::fetch_map() {
  for (std::size_t i = 0; i < servers_.size() && i < kIndexServers; ++i) {
    if (!servers_[i]->failed) servers_[i]->ahead->want_map();
  }
}

void Gather::map_done(Server& server, Clock::time_point asked) {
  {
    const std::lock_guard lock(mutex_);
    server.map_at = asked;
  }
  receiver_.changed();
}

bool Gather::covers_missing() const {
  for (std::size_t region = 0; region < maps_.size(); ++region) {
    const ArrivalMap& map = *maps_[region];
    const PageNumber end{map.pages()};
    for (PageNumber from{0};;) {
      const auto run = map.received.next_clear(from, end, map.pages());
      if (!run) break;
      for (PageNumber page = run->first; page < run->end(); ++page.value) {
        const Holders holders = where_[region]->holders(page);
        // Looked at again: it may have come since.
        if (!usable(holders.first) && !usable(holders.second) && !map.received.test(page)) return false;
      }
      from = run->end();
    }
  }
  return true;
}

// Of each index server: a source that died may have told one of them what the others do not know.
bool Gather::maps_since(Clock::time_point since) const {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < servers_.size() && i < kIndexServers; ++i) {
    if (!servers_[i]->failed && servers_[i]->map_at <= since) return false;
  }
  return true;
}

std::vector<RegionRun> Gather::hopeless(bool no_source, Clock::time_point map_since,
                                        std::vector<std::string>& names, std::size_t max_runs) {
  const Clock::rep failed_at = failed_at_;
  const Clock::rep displaced_at = displaced_at_;
  const auto since = [&](Clock::rep at) {
    return std::max(map_since, Clock::time_point(Clock::duration(at)));
  };
  const bool maps_are_new = maps_since(since(failed_at));
  const bool newer = maps_since(since(std::max(failed_at, displaced_at)));
  // Of those that nobody has denied, and of the others; and those that are asked for once more.
  std::vector<RegionRun> runs;
  std::vector<RegionRun> doubtful;
  std::vector<RegionRun> twice;
  const auto add = [max_runs](std::vector<RegionRun>& to, std::uint32_t region, PageNumber page) {
    if (!to.empty() && to.back().region == region && to.back().run.end() == page) {
      ++to.back().run.count;
    } else if (to.size() < max_runs) {
      to.push_back({region, {page, 1}});
    }
  };
  std::vector<bool> named(servers_.size());
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    const ArrivalMap& map = *maps_[region];
    for (PageNumber from{0};;) {
      const auto run = map.received.next_clear(from, PageNumber{map.pages()}, map.pages());
      if (!run) break;
      for (PageNumber page = run->first; page < run->end(); ++page.value) {
        const Holders holders = where_[region]->holders(page);
        if (usable(holders.first) || usable(holders.second)) continue;
        if (!no_source && !elsewhere_[region]->test(page)) continue;
        if (!maps_are_new) continue;
        const Doubt doubt = doubted(region, page);
        if (doubt != Doubt::kNone && !newer) continue;
        if (doubt == Doubt::kAskOnce) {
          add(twice, region, page);
          continue;
        }
        for (const std::uint8_t each : {holders.first, holders.second}) {
          if (each < servers_.size()) named[each] = true;
        }
        add(doubt == Doubt::kNone ? runs : doubtful, region, page);
      }
      from = run->end();
    }
  }
  // What was found while that changed may have been found too early.
  if (failed_at_ != failed_at) return {};
  if (displaced_at_ == displaced_at) {
    if (!twice.empty()) ask_twice(twice);
    runs.insert(runs.end(), doubtful.begin(), doubtful.end());
  }
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < servers_.size(); ++i) {
    // A page without a location may have been anywhere that is gone.
    if (named[i] || servers_[i]->failed) names.push_back(servers_[i]->address->name);
  }
  return runs;
}

void Gather::came(Server& server, std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                  std::span<const std::uint64_t> hashes, std::span<const std::uint64_t> expected) {
  enum class Kind { kRight, kStale, kWrong };
  const auto page_size = static_cast<std::size_t>(config_.page_size);
  const auto kind_of = [&](std::size_t i) {
    if (where_[region]->hash(PageNumber{run.first.value + i}) == hashes[i]) return Kind::kRight;
    // Asked for before the page was written anew: what came is what was asked for.
    return hashes[i] == expected[i] ? Kind::kStale : Kind::kWrong;
  };
  const auto count = static_cast<std::size_t>(run.count);
  for (std::size_t i = 0; i < count;) {
    const Kind kind = kind_of(i);
    std::size_t end = i + 1;
    while (end < count && kind_of(end) == kind) ++end;
    const PageRun part{PageNumber{run.first.value + i}, end - i};
    if (kind == Kind::kRight) {
      server.pages.fetch_add(part.count, std::memory_order_relaxed);
      receiver_.pages(region, part, bytes.subspan(i * page_size, (end - i) * page_size),
                      hashes.subspan(i, end - i));
    } else if (kind == Kind::kStale) {
      for (PageNumber page = part.first; page < part.end(); ++page.value) assign(region, page);
      receiver_.ask_again();
    } else {
      // While the guest still runs at its source a server may be ahead of the map; its record is on its way.
      const bool lying = receiver_.frozen() &&
                         not_held(server.ordinal, region, part, expected.subspan(i, end - i)) &&
                         maps_[region]->received.count(part) < part.count;
      if (!receiver_.frozen()) not_held(server.ordinal, region, part, expected.subspan(i, end - i));
      if (lying && ++server.wrong > GatherLink::kWrongForgiven) {
        fail(server, "server " + server.address->name + ": answers with other bytes than it was given");
      }
    }
    i = end;
  }
}

// It does not have them, or has something else: not what was `expected` when it was asked. What the map says since
// then is left alone. Gives whether any of them was still expected there.
bool Gather::not_held(std::uint8_t ordinal, std::uint32_t region, PageRun run,
                      std::span<const std::uint64_t> expected) {
  bool any = false;
  {
    const std::lock_guard lock(records_);
    for (std::uint64_t i = 0; i < run.count; ++i) {
      const PageNumber page{run.first.value + i};
      if (maps_[region]->received.test(page)) continue;
      if (where_[region]->hash(page) == expected[static_cast<std::size_t>(i)]) {
        const Holders told = where_[region]->holders(page);
        any = any || told.has(ordinal);
        // Before that it may have had another version.
        if (receiver_.frozen()) deny(*servers_[ordinal], region, page);
        // First: who sees that nobody has it sees as well that the maps are too old to say so.
        if (told.has(ordinal) && !usable(told.first == ordinal ? told.second : told.first))
          raise(displaced_at_, Clock::now());
        where_[region]->drop_holder(page, ordinal);
      }
      assign(region, page);
    }
  }
  for (const auto& server : servers_) server->ahead->wake();
  receiver_.ask_again();
  return any;
}

void Gather::reassign_all(Server& from) {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    AtomicBitmap& todo = *from.todo[region];
    const PageNumber end{maps_[region]->pages()};
    for (PageNumber at{0};;) {
      const auto run = todo.next_set(at, end, kBlockPages);
      if (!run) break;
      at = run->end();
      for (PageNumber page = run->first; page < run->end(); ++page.value) {
        const std::uint8_t to = chosen(page, where_[region]->holders(page));
        // Nobody else has it: for when this one comes back.
        if (to == from.ordinal || (to == Holders::kNobody && !from.failed)) continue;
        if (todo.clear(page)) assign(region, page);
      }
    }
  }
}

// By a thread that reads ahead: this may take a while where there is much to do.
void Gather::rebalance() {
  if (!rebalance_.exchange(false)) return;
  for (const auto& server : servers_) reassign_all(*server);
  wake_ahead();
}

void Gather::link_up(Server& server, wire::StageRole role) {
  const auto connected = [&](wire::StageRole each) {
    return server.connected[static_cast<std::size_t>(each)];
  };
  {
    const std::lock_guard lock(mutex_);
    server.last_good = Clock::now();
    server.connected[static_cast<std::size_t>(role)] = true;
    server.up = connected(wire::StageRole::kGather) && connected(wire::StageRole::kDemand);
  }
  // What others were given in its absence, and it would have been given.
  if (server.up && replicas_) rebalance_ = true;
  wake_ahead();
  receiver_.changed();
}

void Gather::link_down(Server& server, wire::StageRole role) {
  if (closing_) return;
  {
    // It was there until now: recover_timeout counts from here, not from when the connection was made.
    const std::lock_guard lock(mutex_);
    server.last_good = Clock::now();
    // A server that answers nobody who reads ahead will not answer who waits either.
    server.connected[static_cast<std::size_t>(role)] = false;
    server.up = false;
  }
  reassign_all(server);
  for (const auto& other : servers_) other->ahead->wake();
  if (role == wire::StageRole::kDemand) receiver_.ask_again();
}

bool Gather::link_failed(Server& server, const std::string& why, bool for_good) {
  {
    const std::lock_guard lock(mutex_);
    if (server.failed) return true;
    if (!for_good && Clock::now() - server.last_good < config_.recover_timeout) return false;
  }
  fail(server, why);
  return true;
}

void Gather::fail(Server& server, const std::string& why) {
  {
    const std::lock_guard lock(mutex_);
    if (server.failed) return;
    raise(failed_at_, Clock::now());  // first, see hopeless()
    server.failed = true;
    server.up = false;
    server.why = why;
  }
  server.ahead->shut_down();
  server.demand->shut_down();
  reassign_all(server);
  for (const auto& other : servers_) other->ahead->wake();
  receiver_.ask_again();
  receiver_.changed();
}

std::vector<Gather::ServerStats> Gather::stats() const {
  std::vector<ServerStats> all;
  const std::lock_guard lock(mutex_);
  for (const auto& server : servers_) all.push_back({server->pages, server->bytes, server->why});
  return all;
}

std::uint64_t Gather::memory_bytes() const {
  std::uint64_t bytes = 0;
  for (const ArrivalMap* map : maps_) {
    bytes += map->pages() * (sizeof(std::uint64_t) + sizeof(std::uint16_t)) +
             (servers_.size() + 1) * map->pages() / 8;
  }
  return bytes + servers_.size() * 2 * wire::max_payload(config_.page_size);
}

void Gather::shut_down() {
  closing_ = true;
  for (const auto& server : servers_) {
    server->ahead->shut_down();
    server->demand->shut_down();
  }
}

void Gather::close() {
  shut_down();
  for (const auto& server : servers_) {
    server->ahead->stop();
    server->demand->stop();
  }
}

}  // namespace memferry
