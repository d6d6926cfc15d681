// What an answer settles: which copies are safe, what goes again, and when nothing is left to send.
#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "transfer/scatter_dedup.h"

namespace memferry {
namespace {

// Ascending and disjoint: a batch of one huge run can be refused page by page.
std::vector<RegionRun> joined(const std::vector<RegionRun>& some, const std::vector<RegionRun>& more) {
  std::vector<RegionRun> all(some);
  all.insert(all.end(), more.begin(), more.end());
  std::sort(all.begin(), all.end(), [](const RegionRun& a, const RegionRun& b) {
    return a.region != b.region ? a.region < b.region : a.run.first < b.run.first;
  });
  std::size_t kept = 0;
  for (const RegionRun& each : all) {
    RegionRun* const last = kept > 0 ? &all[kept - 1] : nullptr;
    if (last != nullptr && last->region == each.region && each.run.first <= last->run.end()) {
      const std::uint64_t end = std::max(last->run.end().value, each.run.end().value);
      last->run.count = end - last->run.first.value;
    } else {
      all[kept++] = each;
    }
  }
  all.resize(kept);
  return all;
}

bool within(const std::vector<RegionRun>& runs, std::uint32_t region, PageNumber page) {
  const auto behind =
      std::upper_bound(runs.begin(), runs.end(), page, [region](PageNumber wanted, const RegionRun& each) {
        return region != each.region ? region < each.region : wanted < each.run.first;
      });
  return behind != runs.begin() && std::prev(behind)->region == region && page < std::prev(behind)->run.end();
}

}  // namespace

void Scatter::note_same(std::uint32_t region, PageRun run, std::span<const std::uint64_t> xxh3) {
  for (std::uint64_t i = 0; i < run.count; ++i) {
    where_.note_hash(region, PageNumber{run.first.value + i}, xxh3[i], false);
  }
  (void)where_.settle(region, run, {wire::Holders::kDestination, wire::Holders::kNobody});
}

void Scatter::answering(Way& way, const RegionRun& run, std::uint64_t bytes) {
  way.sending_since.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  if (run.run.count == 0) return;
  const std::lock_guard lock(mutex_);
  way.lane.sent(std::span(&run, 1), bytes, {wire::Holders::kDestination, wire::Holders::kNobody});
}

bool Scatter::answered(Way& way) {
  way.sending_since.store(0, std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  return way.lane.batch_is_full();
}

std::optional<std::uint64_t> Scatter::close_answers(Way& way) {
  const std::lock_guard lock(mutex_);
  if (!way.lane.anything_open()) return std::nullopt;
  return way.lane.close(Clock::now());
}

bool Scatter::answers_open(const Way& way) const {
  const std::lock_guard lock(mutex_);
  return way.lane.anything_open();
}

std::string Scatter::acknowledged(Way& way, std::uint64_t tag) {
  {
    const std::lock_guard lock(mutex_);
    if (!way.open) return {};
    const std::optional<Lane::Batch> batch = way.lane.acknowledged(tag, Clock::now());
    if (!batch) return "an answer to a barrier that was not sent";
    if (way.server == Way::kNobody && !batch->runs.empty()) destination_barren_ = 0;
    if (std::exchange(way.stalled, false) || way.server == Way::kNobody) look_at_copies_locked();
    if (dedup_ && !batch->references) dedup_->acknowledged(batch->raw_bytes, batch->bytes);
    std::vector<RegionRun> again;
    settle_locked(*batch, again);
    put_back_locked(again);
    changed_.notify_all();
  }
  check_drained();
  return {};
}

// A batch that was given to another way meanwhile: its pages count where they are not safe yet, and need not go
// again then. What was torn in a round waits for the next one, since the guest writes it; a reference that leads nowhere
// goes plainly in this one: its server has let go of the page, and nobody has been told that it is there.
void Scatter::settle_locked(const Lane::Batch& batch, std::vector<RegionRun>& again) {
  again = batch.no_room;
  // Of these the server has forgotten what it had.
  if (DeltaCache* const cache = config_.encoding.cache) {
    for (const RegionRun& each : batch.no_room) cache->forget(each.region, each.run);
    for (const RegionRun& each : batch.torn) cache->forget(each.region, each.run);
  }
  for (const RegionRun& each : batch.torn) {
    if (kind_ == Kind::kRound && !batch.references) {
      suspects_[each.region]->set_run(each.run);
    } else {
      again.push_back(each);
    }
  }
  wire::Holders holders = batch.holders;
  // Its replica's server failed since: one copy is left, and lose() knows nothing of it yet.
  const bool single = holders.second < servers_.size() && !servers_[holders.second]->failed.empty();
  if (single) holders.second = wire::Holders::kNobody;
  std::vector<RegionRun> singles;
  const std::vector<RegionRun> refused = joined(batch.torn, batch.no_room);
  const auto skipped = [&](std::uint32_t region, PageNumber page) {
    return where_.safe(region, page) || within(refused, region, page);
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
        if (batch.returned()) {
          shared_.queue.pending(each.region).clear_run(part);
          sent_twice_[each.region]->set_run(part);
        }
        where_.settle(each.region, part, holders);
        if (single) singles.push_back({each.region, part});
        if (dedup_) dedup_->settled_locked(each.region, part, holders, batch.references);
        if (config_.release_as_evicted && kind_ == Kind::kPush) to_release_.push_back({each.region, part});
      }
      left = {part.end(), left.count - count};
    }
  }
  want_second_locked(singles, again);
}

// Whether a page that one server holds is to go out for a second copy: two live that take pages, or may again soon.
bool Scatter::second_copies_locked() const {
  return config_.replicas > 1 && std::count_if(servers_.begin(), servers_.end(), [](const auto& server) {
                                   return server->failed.empty() && !server->full;
                                 }) > 1;
}

// One that is cut off is dialled again, and has as long as anybody to give a sign. Being connected is none.
bool Scatter::destination_takes_locked() const {
  if (!config_.direct || destination_barren_ >= kMostBarren) return false;
  if (direct_.empty()) return Clock::now() - destination_left_ < config_.stall_timeout;
  return std::any_of(direct_.begin(), direct_.end(), [](const auto& way) { return !way->stalled; });
}

// They are safe at one server each. In a round as what is lost: in the next one. When all is evicted nothing is sent
// any more.
void Scatter::want_second_locked(const std::vector<RegionRun>& single, std::vector<RegionRun>& again) {
  if (first_copy_counts_) return;
  for (const RegionRun& each : single) {
    if (kind_ == Kind::kRound) {
      for_second_[each.region]->set_run(each.run);
    } else if (begun_) {
      where_.make_spare(each.region, each.run);
      again.push_back(each);
    }
  }
}

// A round or the push begins. What was written since is pending, and not safe any more. A guest that runs, as it does
// in the rounds before a destination takes over, may write the rest while it is sent: then the copy that there is may
// come to be another version than the one that is told.
void Scatter::queue_seconds_locked() {
  const bool wanted = !first_copy_counts_;
  const bool as_it_is = kind_ == Kind::kPush || !config_.direct;
  for (std::uint32_t region = 0; region < for_second_.size(); ++region) {
    const PageNumber end{for_second_[region]->capacity()};
    PageNumber at{0};
    while (const auto run = for_second_[region]->take_run(at, end, end.value)) {
      at = run->end();
      for (PageNumber page = run->first; wanted && page < run->end(); ++page.value) {
        const wire::Holders holders = where_.holders(region, page);
        const bool single = holders.first < servers_.size() && holders.second == wire::Holders::kNobody;
        if (!single || !where_.safe(region, page)) continue;
        if (as_it_is) {
          where_.make_spare(region, {page, 1});
        } else {
          where_.forget(region, {page, 1});
        }
        shared_.queue.pending(region).set(page);
      }
    }
  }
}

// A server takes no pages any more, or the destination does, or does not.
void Scatter::look_at_copies_locked() {
  const auto living = std::count_if(servers_.begin(), servers_.end(),
                                    [](const auto& server) { return server->failed.empty(); });
  const bool alone = config_.replicas < 2 || living < 2;
  const bool nobody_else = !second_copies_locked() && !destination_takes_locked();
  // Who parks has no destination that could take anything: it is told that there is no room, and the guest stays.
  const bool does = alone || (nobody_else && config_.direct);
  if (does != std::exchange(one_copy_does_, does)) changed_.notify_all();
  const bool counts = alone || nobody_else;
  if (counts && !first_copy_counts_) {
    for (const auto& each : for_second_) each->clear_run({PageNumber{0}, each->capacity()});
    for (const RegionRun& each : where_.restore()) shared_.queue.pending(each.region).clear_run(each.run);
    changed_.notify_all();
  }
  first_copy_counts_ = counts;
}

void Scatter::put_back_locked(const std::vector<RegionRun>& runs) {
  bool any = false;
  for (const RegionRun& each : runs) {
    for (PageNumber page = each.run.first; page < each.run.end(); ++page.value) {
      if (where_.safe(each.region, page)) continue;
      sent_twice_[each.region]->set(page);
      if (dedup_) dedup_->put_back_locked(each.region, page);
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
    if (held_) return false;
    std::uint64_t all = 0;
    for (std::uint32_t region = 0; region < shared_.queue.regions(); ++region)
      all += shared_.queue.known_pages(region);
    if (where_.safe_count() < all) return false;
    const bool at_servers = where_.pages_at(wire::Holders::kDestination) < all;
    if (at_servers && !index_lives_locked() && !destination_knows_locked()) return false;
  } else {
    if (!dry_ || (dedup_ && !dedup_->idle_locked())) return false;
    for (const auto& way : direct_) {
      if (!way->idle()) return false;
    }
    if (config_.direct ? !told(where_.destination()) : !index_lives_locked()) return false;
  }
  for (const auto& server : servers_) {
    if (!server->failed.empty()) {
      // Pages that its thread has in hand are in no list; when that ends they are pending again.
      if (kind_ == Kind::kRound && server->way && !server->way->idle()) return false;
      continue;
    }
    const bool index = server->ordinal < where_.index_servers();
    // In a push only what has to be told is waited for: every page is safe already.
    if (index && (!told(server->ordinal) || !server->way || !server->way->idle())) return false;
    // Nor does a record of this round come behind a page of the next one.
    if (kind_ == Kind::kRound && (!told(server->ordinal) || !server->way || !server->way->idle()))
      return false;
  }
  return true;
}

bool Scatter::index_lives_locked() const {
  return std::any_of(servers_.begin(), servers_.begin() + where_.index_servers(),
                     [](const auto& server) { return server->failed.empty(); });
}

// Of everything that servers hold, and it has said so.
bool Scatter::destination_knows_locked() const {
  const unsigned destination = where_.destination();
  return config_.direct && !where_.anything_untold(destination) &&
         std::any_of(direct_.begin(), direct_.end(), [&](const auto& way) {
           return way->listener == static_cast<int>(destination) && way->open && way->idle();
         });
}

// Said by the watcher: whoever finds it out may hold locks of its own.
void Scatter::check_drained() {
  const std::lock_guard lock(mutex_);
  if (!drained_locked()) return;
  begun_ = false;
  drained_due_ = true;
  changed_.notify_all();
  watcher_.wake();
}

std::uint64_t Scatter::take_suspects() {
  const std::lock_guard lock(mutex_);
  return queue_suspects_locked();
}

std::uint64_t Scatter::queue_suspects_locked() {
  std::uint64_t listed = 0;
  for (std::uint32_t region = 0; region < suspects_.size(); ++region) {
    AtomicBitmap& bitmap = *suspects_[region];
    listed += bitmap.count() + for_second_[region]->count();
    for (std::uint64_t i = 0; i < bitmap.words(); ++i)
      shared_.queue.pending(region).or_word(i, bitmap.word(i));
    bitmap.clear_run({PageNumber{0}, bitmap.capacity()});
  }
  return listed;
}

}  // namespace memferry
