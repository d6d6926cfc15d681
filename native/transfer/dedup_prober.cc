// The thread that looks at pages ahead of the lanes, and what it makes of the answers.
#include <algorithm>
#include <map>

#include "transfer/scatter_dedup.h"

namespace memferry {
namespace {

// Looked at and asked for together: a few milliseconds of hashing.
constexpr std::uint64_t kBatchPages = 512;
// Fewer are not worth a question, unless they are the last.
constexpr std::uint64_t kLeastBatch = 64;
// When it does not pay, how often a few pages are looked at to see whether it does by now.
constexpr std::chrono::milliseconds kSampleEvery{250};
constexpr std::chrono::milliseconds kRateTime{50};
constexpr std::chrono::milliseconds kIdle{5};
// The list of those that wait is gone through so often, with the mutex held; oftener when nothing else is left.
constexpr std::chrono::milliseconds kRetryEvery{20};
constexpr std::chrono::milliseconds kFirstRetry{30};
constexpr std::chrono::milliseconds kLongestRetry{240};
constexpr std::chrono::milliseconds kRetryWhenDry{10};
// Figures are halved at so many, so that they follow the guest's memory.
constexpr std::uint64_t kRemembered = 8192;

wire::ContentName name_of(const ContentDigest& hash) { return ContentDomain::name_of(hash); }

}  // namespace

void Scatter::Dedup::run(WorkerThread& self) {
  try {
    return run_until_closed(self);
  } catch (const std::exception&) {
    // No memory, most probably. Without it everything goes plainly.
  }
  const std::lock_guard lock(scatter_.mutex_);
  for (const Deferred& each : deferred_) give_up_locked(each.page, true);
  deferred_.clear();
  for (const Deferred& each : asking_) {
    if (each.tries > 0) give_up_locked(each.page, true);
  }
  for (std::size_t server = 0; server < references_.size(); ++server)
    give_back_locked(static_cast<int>(server));
}

void Scatter::Dedup::run_until_closed(WorkerThread& self) {
  dial();
  bool busy = false;
  for (;;) {
    {
      std::unique_lock lock(scatter_.mutex_);
      const auto pushing = [&] { return scatter_.begun_ && scatter_.kind_ == Kind::kPush; };
      if (!pushing()) {
        scatter_.changed_.wait(lock, [&] { return scatter_.closing_ || pushing(); });
        busy = true;  // before the lanes have sent it all
      }
      if (!busy && !scatter_.closing_)
        scatter_.changed_.wait_for(lock, kIdle, [&] { return scatter_.closing_; });
      if (scatter_.closing_ || scatter_.shared_.gate.closed() || self.stopping()) return;
    }
    busy = step();
  }
}

bool Scatter::Dedup::step() {
  const auto now = Clock::now();
  measure(now);
  const bool told = tell();
  const bool retried = retry(now);
  give_up_waiting_when_dry(now);
  return examine(now) || told || retried;
}

// What the link takes: by what was acknowledged, since a socket takes anything at first.
void Scatter::Dedup::measure(Clock::time_point now) {
  const std::uint64_t bytes = acknowledged_bytes_.load(std::memory_order_relaxed);
  if (measured_at_ == Clock::time_point{}) {
    measured_at_ = now;
    measured_bytes_ = bytes;
    return;
  }
  if (now - measured_at_ < kRateTime) return;
  const double rate = static_cast<double>(bytes - measured_bytes_) /
                      std::chrono::duration<double>(now - measured_at_).count();
  measured_at_ = now;
  if (bytes == measured_bytes_) return;  // nobody sends anything, or nothing has come back yet
  measured_bytes_ = bytes;
  const double before = measured_.link_bytes_per_second.value_or(rate);
  measured_.link_bytes_per_second = (before + rate) / 2;
}

bool Scatter::Dedup::examine(Clock::time_point now) {
  if (std::all_of(identities_.begin(), identities_.end(), [](std::uint64_t each) { return each == 0; }))
    return false;
  const std::uint64_t lead = dedup_lead_pages(measured_.link_bytes_per_second, scatter_.page_size_);
  const std::uint64_t unsent = unsent_pages();
  {
    // Enough for the ways to do.
    const std::lock_guard lock(scatter_.mutex_);
    if (reference_count_ >= kMostDeferred) return false;
  }
  std::uint64_t most = std::min(kBatchPages, lead - std::min(lead, unsent));
  if (!dedup_pays(measured_)) {
    if (now < next_sample_) return false;
    next_sample_ = now + kSampleEvery;
    most = std::min(most, kDedupSamplePages);
  } else if (most < kLeastBatch) {
    return false;
  }
  pick(most);
  if (batch_.empty()) return false;

  asking_.clear();
  for (Deferred& each : batch_) {
    Region& region = *regions_[each.page.region];
    region.names[each.page.page.value] = name_of(each.page.hash);
    region.named.set(each.page.page);
    each.twin = twin_of(each.page);
    if (!each.twin) {
      region.to_tell.set(each.page.page);
      asking_.push_back(each);
    }
  }
  {
    const std::lock_guard lock(scatter_.mutex_);
    for (Deferred& each : batch_) {
      Region& region = *regions_[each.page.region];
      if (each.twin) {
        ++measured_.hits;
        // Waits for its twin, wherever that is on its way to; retry() finds out. On the list first: where there is
        // no memory for that, nobody has claimed it.
        if (deferred_.size() < kMostDeferred) {
          each.next = now;
          deferred_.push_back(each);
          if (!claim_locked(each.page, false)) deferred_.pop_back();
        }
      } else if (scatter_.where_.safe(each.page.region, each.page.page)) {
        // A lane was faster, and did not know its name.
        settled_.push_back({each.page.region,
                            {each.page.page, 1},
                            scatter_.where_.holders(each.page.region, each.page.page)});
        region.to_tell.clear(each.page.page);
      }
    }
  }
  measured_.examined_pages += batch_.size();
  ask();
  if (measured_.examined_pages > kRemembered) {
    measured_.examined_pages /= 2;
    measured_.hits /= 2;
  }
  return true;
}

// About asking_: each is settled by its answer, and waits in deferred_ where that says so.
void Scatter::Dedup::ask() {
  names_to_ask_.clear();
  for (const Deferred& each : asking_) names_to_ask_.push_back(name_of(each.page.hash));
  probe(answers_);
  const std::lock_guard lock(scatter_.mutex_);
  for (std::size_t i = 0; i < asking_.size(); ++i) {
    const bool owned = asking_[i].tries > 0;
    const bool somebodys = answers_[i].first != wire::KnownHolders::kNobody;
    if (!owned && somebodys) ++measured_.hits;
    settle_answer(asking_[i], answers_[i], owned);
    if (asking_[i].tries == 0) continue;
    deferred_.push_back(asking_[i]);
    asking_[i].tries = 0;
  }
  asking_.clear();
  scatter_.changed_.notify_all();
}

void Scatter::Dedup::settle_answer(Deferred& page, wire::KnownHolders known, bool owned) {
  if (known.first == wire::KnownHolders::kOnItsWay) {
    if (!owned && (deferred_.size() >= kMostDeferred || !claim_locked(page.page, false))) return;
    const auto wait =
        std::min<std::chrono::milliseconds>(kFirstRetry * (1U << std::min(page.tries, 3U)), kLongestRetry);
    page.next = Clock::now() + wait;
    ++page.tries;
    return;
  }
  const auto holders = known.first == wire::KnownHolders::kNobody ? std::nullopt : usable_locked(known);
  if (!holders || !refer_locked(page.page, *holders, owned)) give_up_locked(page.page, owned);
  page.tries = 0;
}

// Servers of this migration that live, as many as a page is to have.
std::optional<wire::Holders> Scatter::Dedup::usable_locked(wire::KnownHolders known) const {
  const auto ordinal = [&](std::uint64_t identity) {
    for (const auto& server : scatter_.servers_) {
      const bool it = identity != 0 && server->address.identity == identity;
      if (it && server->failed.empty() && server->way && server->way->open && !server->way->stalled)
        return server->ordinal;
    }
    return wire::Holders::kNobody;
  };
  const std::uint8_t first = ordinal(known.first);
  const std::uint8_t second = ordinal(known.second);
  const std::uint8_t any = first != wire::Holders::kNobody ? first : second;
  if (any == wire::Holders::kNobody) return std::nullopt;
  if (scatter_.config_.replicas < 2) return wire::Holders{any, wire::Holders::kNobody};
  if (first == second || first == wire::Holders::kNobody || second == wire::Holders::kNobody)
    return std::nullopt;
  // Only chains that are there, or would be without this: a server has but so many for an image.
  for (const wire::Holders holders : {wire::Holders{first, second}, wire::Holders{second, first}}) {
    const Way& way = *scatter_.servers_[holders.first]->way;
    if (way.replicas[holders.second] || scatter_.holders_for(way).second == holders.second) return holders;
  }
  return std::nullopt;
}

// From here on no lane takes it. False: one has.
bool Scatter::Dedup::claim_locked(const Page& page, bool owned) {
  if (!owned && !scatter_.shared_.queue.pending(page.region).clear(page.page)) return false;
  regions_[page.region]->to_tell.clear(page.page);
  return true;
}

bool Scatter::Dedup::refer_locked(const Page& page, wire::Holders holders, bool owned) {
  if (reference_count_ >= kMostDeferred) return false;
  auto& references = references_[holders.first];
  // On the list first: where there is no memory for that, nobody has claimed it.
  references.push_back({page, holders, Clock::now()});
  if (claim_locked(page, owned)) {
    ++reference_count_;
    return true;
  }
  references.pop_back();
  return false;
}

// It goes plainly.
void Scatter::Dedup::give_up_locked(const Page& page, bool owned) {
  regions_[page.region]->to_tell.set(page.page);
  const RegionRun run{page.region, {page.page, 1}};
  if (owned) scatter_.put_back_locked({run});
}

bool Scatter::Dedup::retry(Clock::time_point now) {
  asking_.clear();
  std::size_t keep = 0;
  {
    const std::lock_guard lock(scatter_.mutex_);
    const bool dry = scatter_.dry_;
    if (deferred_.empty() || (!dry && now < next_retry_)) return false;
    next_retry_ = now + kRetryEvery;
    for (Deferred& each : deferred_) {
      if (scatter_.where_.safe(each.page.region, each.page.page)) continue;  // a fault's answer was faster
      if (each.twin) {
        const auto [region, page] = *each.twin;
        const wire::Holders holders = scatter_.where_.holders(region, page);
        const bool safe = scatter_.where_.safe(region, page);
        const bool told = regions_[region]->told.test(page);
        const auto alive = [&](std::uint8_t ordinal) {
          return ordinal == wire::Holders::kNobody ||
                 (ordinal < scatter_.servers_.size() && scatter_.servers_[ordinal]->failed.empty());
        };
        const bool here = safe && holders.first < scatter_.servers_.size();
        const bool enough = scatter_.config_.replicas < 2 || holders.second != wire::Holders::kNobody;
        if (here && told && enough && alive(holders.first) && alive(holders.second) &&
            refer_locked(each.page, holders, true)) {
          scatter_.changed_.notify_all();
          continue;
        }
        // Gone straight to the destination, or nobody will ever know it by its name.
        if (safe && (!here || !enough || identities_[holders.first] == 0)) {
          give_up_locked(each.page, true);
          continue;
        }
      } else if (asking_.size() < kBatchPages &&
                 (each.next <= now || (dry && each.next <= now + kRetryWhenDry))) {
        asking_.push_back(each);
        continue;
      }
      if (&deferred_[keep] != &each) deferred_[keep] = each;
      ++keep;
    }
    deferred_.resize(keep);
  }
  if (asking_.empty()) return false;
  ask();
  return true;
}

// Nothing else is left to send, and pages wait for an equal one that a slow receiver has in hand: one of them goes
// plainly at once, by whoever is idle, and the others wait for that instead.
bool Scatter::Dedup::send_second_twins_locked() {
  using Place = std::pair<std::uint32_t, PageNumber>;
  std::map<Place, Place> seconds;
  std::vector<RegionRun> runs;
  const auto waits = [&](const Deferred& each) {
    return each.twin && !each.second_twin && !scatter_.where_.safe(each.twin->first, each.twin->second);
  };
  // Whatever needs memory comes before anything leaves its list.
  for (const Deferred& each : deferred_) {
    if (!waits(each) || !seconds.try_emplace(*each.twin, each.page.region, each.page.page).second) continue;
    runs.push_back({each.page.region, {each.page.page, 1}});
  }
  std::size_t keep = 0;
  for (Deferred& each : deferred_) {
    if (waits(each)) {
      const Place& second = seconds.at(*each.twin);
      if (second == Place(each.page.region, each.page.page)) {
        regions_[each.page.region]->to_tell.set(each.page.page);
        continue;
      }
      each.twin = second;
      each.second_twin = true;
    }
    deferred_[keep++] = each;
  }
  deferred_.resize(keep);
  scatter_.put_back_locked(runs);
  return !runs.empty();
}

// Nothing else is left to send: what waits for somebody else waits no longer than it has paid for.
void Scatter::Dedup::give_up_waiting_when_dry(Clock::time_point now) {
  const std::lock_guard lock(scatter_.mutex_);
  if (!scatter_.dry_ || deferred_.empty() || send_second_twins_locked()) return;
  std::uint64_t twins = 0;
  for (const Deferred& each : deferred_) twins += each.twin ? 1U : 0U;
  const auto wait =
      dedup_wait(pages_ * scatter_.page_size_, twins * scatter_.page_size_, measured_.link_bytes_per_second);
  if (now - scatter_.dry_since_ <= wait) return;
  std::vector<RegionRun> runs;
  runs.reserve(deferred_.size());
  for (const Deferred& each : deferred_) {
    regions_[each.page.region]->to_tell.set(each.page.page);
    runs.push_back({each.page.region, {each.page.page, 1}});
  }
  deferred_.clear();
  scatter_.put_back_locked(runs);
}

}  // namespace memferry
