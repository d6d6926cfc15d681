#include "transfer/gather.h"

#include <algorithm>

#include "transfer/gather_link.h"

namespace memferry {
namespace {

using wire::Holders;

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
  const auto given = [](const BaseImage& image) { return !image.path.empty(); };
  if (std::any_of(config_.base.begin(), config_.base.end(), given))
    base_ = std::make_unique<GatherBase>(*this, config_.base);
}

Gather::~Gather() { close(); }

void Gather::start() {
  if (base_) base_->start();
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
  if (base_) {
    // Whoever lets go of it looks for its place afterwards: one of the two sees the other.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (base_->holds(region, page)) return;
  }
  for (;;) {
    const std::uint8_t to = chosen(page, where_[region]->holders(page));
    if (to == Holders::kNobody) return;
    servers_[to]->todo[region]->set(page);
    // fail() says so before it looks what is to do there: one of the two sees the other.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (!servers_[to]->failed) return;
  }
}

void Gather::follow_faults(GatherCursor& cursor) const {
  const std::uint64_t moves = cursor_moves_.load(std::memory_order_relaxed);
  if (moves == cursor.seen_moves) return;
  cursor.seen_moves = moves;
  const std::uint64_t at = cursor_.load(std::memory_order_relaxed);
  cursor.region = static_cast<std::uint32_t>((at >> kCursorShift) % maps_.size());
  cursor.page = PageNumber{at & ((1ULL << kCursorShift) - 1)};
}

bool Gather::request(std::uint32_t region, PageRun run) {
  cursor_.store(std::uint64_t{region} << kCursorShift | run.end().value, std::memory_order_relaxed);
  cursor_moves_.fetch_add(1, std::memory_order_relaxed);
  const LocationMap& where = *where_[region];
  const Holders holders = where.holders(run.first);
  // What follows the page is a guess, and counts as reading ahead.
  const std::uint64_t most = limit_.urgent_delay() > wire::Duration::zero() ? 1 : run.count;
  std::uint64_t count = 1;
  while (count < most && where.holders(PageNumber{run.first.value + count}) == holders) ++count;
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

void Gather::came(Server& server, std::uint32_t region, PageRun run, std::span<const std::byte> bytes,
                  std::span<const std::uint64_t> hashes, std::span<const std::uint64_t> expected) {
  enum class Kind { kRight, kStale, kWrong };
  const auto page_size = static_cast<std::size_t>(config_.page_size);
  const auto kind_of = [&](std::size_t i) {
    if (is_current(region, PageNumber{run.first.value + i}, hashes[i])) return Kind::kRight;
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
  if (base_) base_->drop(server.ordinal);
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
  if (base_) base_->drop(server.ordinal);
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
  {
    const std::lock_guard lock(records_);
    const auto of = [](const auto& bitmaps) {
      std::uint64_t all = 0;
      for (const auto& bitmap : bitmaps) all += bitmap->capacity() / 8;
      return all;
    };
    bytes += of(asked_twice_);
    for (const auto& server : servers_) bytes += of(server->denied);
  }
  if (base_) bytes += base_->stats().memory_bytes;
  return bytes + servers_.size() * 2 * wire::max_payload(config_.page_size);
}

GatherBase::Stats Gather::base_stats() const { return base_ ? base_->stats() : GatherBase::Stats{}; }

void Gather::shut_down() {
  closing_ = true;
  if (base_) base_->shut_down();
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
  if (base_) base_->close();
}

}  // namespace memferry
