#include "transfer/whereabouts.h"

#include <algorithm>

namespace memferry {
namespace {

constexpr std::uint64_t kOneLess = ~std::uint64_t{0};

constexpr std::uint16_t packed(wire::Holders holders) { return static_cast<std::uint16_t>(holders.tag()); }

void append(std::vector<RegionRun>& runs, std::uint32_t region, PageNumber page) {
  const bool joins = !runs.empty() && runs.back().region == region && runs.back().run.end() == page;
  if (joins) {
    ++runs.back().run.count;
  } else {
    runs.push_back({region, {page, 1}});
  }
}

}  // namespace

Whereabouts::Whereabouts(std::span<const std::uint64_t> capacities, unsigned servers, unsigned index_servers)
    : servers_(servers),
      index_servers_(std::min(index_servers, servers)),
      capacities_(capacities.begin(), capacities.end()) {
  for (const std::uint64_t pages : capacities_) {
    const auto count = static_cast<std::size_t>(pages);
    // Not touched before they are used: a region's capacity may be far beyond its length.
    hashes_.emplace_back(new std::uint64_t[count]);
    holders_.emplace_back(new std::atomic<std::uint16_t>[count]);
    for (std::size_t i = 0; i < count; ++i) holders_.back()[i].store(packed({}), std::memory_order_relaxed);
    zero_.push_back(std::make_unique<AtomicBitmap>(pages));
    safe_.push_back(std::make_unique<AtomicBitmap>(pages));
    spare_.push_back(std::make_unique<AtomicBitmap>(pages));
  }
  for (unsigned i = 0; i <= servers_; ++i) {
    auto listener = std::make_unique<Listener>();
    for (const std::uint64_t pages : capacities_)
      listener->untold.push_back(std::make_unique<AtomicBitmap>(pages));
    listeners_.push_back(std::move(listener));
  }
}

void Whereabouts::note_hash(std::uint32_t region, PageNumber page, std::uint64_t xxh3, bool zero) {
  std::atomic_ref(hashes_[region][page.value]).store(xxh3, std::memory_order_relaxed);
  if (zero) {
    zero_[region]->set(page);
  } else if (zero_[region]->test(page)) {
    zero_[region]->clear(page);
  }
}

std::uint64_t Whereabouts::settle(std::uint32_t region, PageRun run, wire::Holders holders) {
  const std::lock_guard lock(mutex_);
  const std::uint16_t now = packed(holders);
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    const std::uint16_t before = holders_[region][page.value].exchange(now, std::memory_order_relaxed);
    // A former holder that is no index server would keep its copy for ever.
    const wire::Holders former = wire::Holders::of(before);
    if (safe_[region]->test(page)) count_locked(former, kOneLess);
    count_locked(holders, 1);
    if (before == now) continue;
    for (const std::uint8_t each : {former.first, former.second}) {
      if (each < servers_ && each >= index_servers_ && !holders.has(each))
        mark_untold(each, region, {page, 1});
    }
  }
  spare_[region]->clear_run(run);
  const std::uint64_t newly = safe_[region]->set_run(run);
  safe_count_.fetch_add(newly, std::memory_order_acq_rel);
  for (unsigned i = 0; i < index_servers_; ++i) mark_untold(i, region, run);
  // The destination knows best what it holds itself.
  if (holders.first != wire::Holders::kDestination) mark_untold(destination(), region, run);
  return newly;
}

void Whereabouts::count_locked(wire::Holders holders, std::uint64_t by) {
  at_[holders.first] += by;
  if (holders.first < servers_ && holders.second == wire::Holders::kNobody) single_ += by;
}

// With the mutex held. False: it was not safe.
bool Whereabouts::unsettle_locked(std::uint32_t region, PageNumber page) {
  if (!safe_[region]->clear(page)) return false;
  count_locked(holders(region, page), kOneLess);
  safe_count_.fetch_sub(1, std::memory_order_acq_rel);
  // What waits to be told of it is out of date.
  for (const auto& listener : listeners_) {
    if (listener->untold[region]->clear(page)) listener->count.fetch_sub(1, std::memory_order_acq_rel);
  }
  return true;
}

void Whereabouts::forget(std::uint32_t region, PageRun run) {
  const std::lock_guard lock(mutex_);
  spare_[region]->clear_run(run);
  for (PageNumber page = run.first; page < run.end(); ++page.value) unsettle_locked(region, page);
}

void Whereabouts::make_spare(std::uint32_t region, PageRun run) {
  const std::lock_guard lock(mutex_);
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    if (unsettle_locked(region, page)) spare_[region]->set(page);
  }
}

void Whereabouts::drop_spares(std::uint32_t region, PageRun run, const std::bitset<256>& holders,
                              const std::vector<std::unique_ptr<AtomicBitmap>>& gone) {
  const std::lock_guard lock(mutex_);
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    const wire::Holders at = this->holders(region, page);
    if (!holders[at.first] || spare_[region]->clear(page)) continue;
    // One that counts again by now, while it was on its way to its only holder.
    if (at.second == wire::Holders::kNobody && !gone[region]->test(page)) unsettle_locked(region, page);
  }
}

std::vector<RegionRun> Whereabouts::restore() {
  std::vector<RegionRun> restored;
  const std::lock_guard lock(mutex_);
  for (std::uint32_t region = 0; region < capacities_.size(); ++region) {
    const PageNumber end{capacities_[region]};
    PageNumber at{0};
    while (const auto run = spare_[region]->take_run(at, end, capacities_[region])) {
      at = run->end();
      for (PageNumber page = run->first; page < run->end(); ++page.value) {
        count_locked(holders(region, page), 1);
        append(restored, region, page);
      }
      safe_count_.fetch_add(safe_[region]->set_run(*run), std::memory_order_acq_rel);
      for (unsigned i = 0; i < index_servers_; ++i) mark_untold(i, region, *run);
      mark_untold(destination(), region, *run);
    }
  }
  return restored;
}

Whereabouts::Lost Whereabouts::lose(std::uint8_t ordinal,
                                    const std::vector<std::unique_ptr<AtomicBitmap>>* gone) {
  Lost lost;
  const std::lock_guard lock(mutex_);
  for (std::uint32_t region = 0; region < capacities_.size(); ++region) {
    const PageNumber end{capacities_[region]};
    PageNumber at{0};
    while (const auto run = spare_[region]->next_set(at, end, capacities_[region])) {
      at = run->end();
      for (PageNumber page = run->first; page < run->end(); ++page.value) {
        if (holders(region, page).first == ordinal) spare_[region]->clear(page);
      }
    }
    at = PageNumber{0};
    while (const auto run = safe_[region]->next_set(at, end, capacities_[region])) {
      at = run->end();
      for (PageNumber page = run->first; page < run->end(); ++page.value) {
        const wire::Holders now = holders(region, page);
        if (!now.has(ordinal)) continue;
        const bool here = gone == nullptr || !(*gone)[region]->test(page);
        const std::uint8_t other = now.first == ordinal ? now.second : now.first;
        if (other != wire::Holders::kNobody) {
          count_locked(now, kOneLess);
          count_locked({other, wire::Holders::kNobody}, 1);
          holders_[region][page.value].store(packed({other, wire::Holders::kNobody}),
                                             std::memory_order_relaxed);
          for (unsigned i = 0; i < index_servers_; ++i) mark_untold(i, region, {page, 1});
          mark_untold(destination(), region, {page, 1});
          if (here) append(lost.single, region, page);
        } else if (here) {
          unsettle_locked(region, page);
          append(lost.nowhere, region, page);
        }
      }
    }
  }
  return lost;
}

wire::Holders Whereabouts::holders(std::uint32_t region, PageNumber page) const {
  return wire::Holders::of(holders_[region][page.value].load(std::memory_order_relaxed));
}

std::uint64_t Whereabouts::hash(std::uint32_t region, PageNumber page) const {
  return std::atomic_ref(hashes_[region][page.value]).load(std::memory_order_relaxed);
}

std::span<const std::uint64_t> Whereabouts::hashes(std::uint32_t region) const {
  return {hashes_[region].get(), static_cast<std::size_t>(capacities_[region])};
}

void Whereabouts::mark_untold(unsigned listener, std::uint32_t region, PageRun run) {
  Listener& to = *listeners_[listener];
  if (to.silent.load(std::memory_order_relaxed)) return;
  to.count.fetch_add(to.untold[region]->set_run(run), std::memory_order_acq_rel);
}

bool Whereabouts::anything_untold(unsigned listener) const {
  const Listener& to = *listeners_[listener];
  return !to.silent.load(std::memory_order_acquire) && to.count.load(std::memory_order_acquire) > 0;
}

bool Whereabouts::next_untold(unsigned listener, std::uint64_t max_pages, Record& record) {
  Listener& to = *listeners_[listener];
  const auto regions = static_cast<std::uint32_t>(capacities_.size());
  for (std::uint32_t step = 0; step <= regions && anything_untold(listener); ++step) {
    const auto taken = to.untold[to.region]->take_run(to.at, PageNumber{capacities_[to.region]}, max_pages);
    if (!taken) {
      to.region = (to.region + 1) % regions;
      to.at = PageNumber{0};
      continue;
    }
    const auto holders_at = [&](PageNumber page) {
      return holders_[to.region][page.value].load(std::memory_order_relaxed);
    };
    const std::uint16_t first = holders_at(taken->first);
    const bool zero = zero_[to.region]->test(taken->first);
    const bool safe = safe_[to.region]->test(taken->first);
    std::uint64_t count = 1;
    while (count < taken->count) {
      const PageNumber page{taken->first.value + count};
      if (holders_at(page) != first || zero_[to.region]->test(page) != zero ||
          safe_[to.region]->test(page) != safe) {
        break;
      }
      ++count;
    }
    if (count < taken->count) {
      // Marked by somebody else meanwhile: counted there already.
      const PageRun rest{PageNumber{taken->first.value + count}, taken->count - count};
      to.count.fetch_sub(rest.count - to.untold[to.region]->set_run(rest), std::memory_order_acq_rel);
    }
    to.count.fetch_sub(count, std::memory_order_acq_rel);
    to.at = PageNumber{taken->first.value + count};
    record.region = to.region;
    record.run = {taken->first, count};
    record.holders = wire::Holders::of(first);
    record.zero = zero;
    const bool bare = zero || record.holders.first == wire::Holders::kDestination;
    record.hashes = bare
                        ? std::span<const std::uint64_t>()
                        : std::span(&hashes_[to.region][taken->first.value], static_cast<std::size_t>(count));
    // Lost again since it was marked: whoever settles it next marks it anew.
    if (!safe) {
      step = 0;
      continue;
    }
    return true;
  }
  return false;
}

void Whereabouts::tell_again(unsigned listener) {
  for (std::uint32_t region = 0; region < capacities_.size(); ++region) {
    PageNumber at{0};
    while (const auto run =
               safe_[region]->next_set(at, PageNumber{capacities_[region]}, capacities_[region])) {
      mark_untold(listener, region, *run);
      at = run->end();
    }
  }
}

void Whereabouts::silence(unsigned listener) { listeners_[listener]->silent = true; }

std::uint64_t Whereabouts::pages_at(std::uint8_t holder) const {
  const std::lock_guard lock(mutex_);
  return at_[holder];
}

std::uint64_t Whereabouts::pages_single() const {
  const std::lock_guard lock(mutex_);
  return single_;
}

std::uint64_t Whereabouts::memory_bytes() const {
  std::uint64_t bytes = 0;
  for (const std::uint64_t pages : capacities_) {
    bytes += pages * (sizeof(std::uint64_t) + sizeof(std::uint16_t)) +
             (3 + listeners_.size()) * ((pages + 63) / 64) * 8;
  }
  return bytes;
}

}  // namespace memferry
