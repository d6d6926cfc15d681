// Where pages are, as the source and servers tell: whom to believe where they differ, who turned out not to have a page,
// and when nobody will give one any more.
#include <algorithm>

#include "transfer/gather.h"
#include "transfer/gather_link.h"

namespace memferry {
namespace {

using wire::Holders;

// Of all regions, until `visit` says true. One may come meanwhile.
template <class Visit>
void for_each_missing(const std::vector<ArrivalMap*>& maps, Visit visit) {
  for (std::uint32_t region = 0; region < maps.size(); ++region) {
    const ArrivalMap& map = *maps[region];
    const PageNumber end{map.pages()};
    for (PageNumber from{0};;) {
      const auto run = map.received.next_clear(from, end, map.pages());
      if (!run) break;
      for (PageNumber page = run->first; page < run->end(); ++page.value) {
        if (visit(region, page)) return;
      }
      from = run->end();
    }
  }
}

}  // namespace

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

void Gather::forget(std::uint32_t region, PageRun run) {
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    // Without a holder it may still be on its way from one that had it.
    if (where_[region]->holders(page).first == Holders::kNobody && where_[region]->hash(page) == 0) continue;
    where_[region]->clear(page);
    for (const auto& server : servers_) server->todo[region]->clear(page);
  }
}

bool Gather::is_current(std::uint32_t region, PageNumber page, std::uint64_t hash) const {
  // 0 is also what is there of a page that was forgotten.
  return where_[region]->hash(page) == hash &&
         (hash != 0 || where_[region]->holders(page).first != Holders::kNobody);
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

void Gather::map_done(Server& server, Clock::time_point asked) {
  {
    const std::lock_guard lock(mutex_);
    server.map_at = asked;
  }
  if (base_) base_->map_known();
  receiver_.changed();
}

std::optional<RegionRun> Gather::first_uncovered() const {
  std::optional<RegionRun> found;
  for_each_missing(maps_, [&](std::uint32_t region, PageNumber page) {
    const Holders holders = where_[region]->holders(page);
    // Looked at again: it may have come since.
    if (usable(holders.first) || usable(holders.second) || maps_[region]->received.test(page)) return false;
    found = RegionRun{region, {page, 1}};
    return true;
  });
  return found;
}

Gather::Reach Gather::reach(const std::vector<bool>& away) const {
  Reach reach;
  const auto is_away = [&](std::uint8_t ordinal) {
    return ordinal >= servers_.size() || (ordinal < away.size() && away[ordinal]);
  };
  for_each_missing(maps_, [&](std::uint32_t region, PageNumber page) {
    const Holders holders = where_[region]->holders(page);
    if (maps_[region]->received.test(page)) return false;
    if (holders.first == Holders::kNobody) {
      ++reach.unknown;
    } else if (is_away(holders.first) && is_away(holders.second)) {
      ++reach.away;
    }
    return false;
  });
  return reach;
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

void Gather::raise(std::atomic<Clock::rep>& latest, Clock::time_point to) {
  Clock::rep seen = latest.load();
  while (seen < to.time_since_epoch().count() &&
         !latest.compare_exchange_weak(seen, to.time_since_epoch().count())) {
  }
}

}  // namespace memferry
