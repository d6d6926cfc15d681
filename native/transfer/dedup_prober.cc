// The thread that looks at pages ahead of the lanes, and what it makes of the answers.
#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "transfer/scatter_dedup.h"

namespace memferry {
namespace {

// Asked for once more together.
constexpr std::uint64_t kAskedAgainAtOnce = 512;
static_assert(kMostLookPages <= wire::kMostNames);
// Fewer are not worth a question, unless they are the last.
constexpr std::uint64_t kLeastBatch = 64;
// When it does not pay, how often a few pages are looked at to see whether it does by now.
constexpr std::chrono::milliseconds kSampleEvery{250};
constexpr std::chrono::milliseconds kRateTime{50};
constexpr std::chrono::milliseconds kIdle{5};
constexpr std::chrono::milliseconds kIdleWhenDry{1};  // somebody waits
// The list of those that wait is gone through so often; oftener when nothing else is left.
constexpr std::chrono::milliseconds kRetryEvery{20};
// So many of them with the mutex held.
constexpr std::size_t kLookedAtOnce = 512;
// And of those that are new to it.
constexpr std::size_t kNotedAtOnce = 128;
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
  deferred_twins_ = 0;
  for (const Deferred& each : asking_) {
    if (each.claimed && !each.given_up) give_up_locked(each.page, true);
  }
  asking_.clear();
  asked_again_ = 0;
  for (std::size_t server = 0; server < references_.size(); ++server)
    give_back_locked(static_cast<int>(server));
}

void Scatter::Dedup::run_until_closed(WorkerThread& self) {
  dial();
  bool busy = false;
  for (;;) {
    {
      std::unique_lock lock(scatter_.mutex_);
      // What was acknowledged last is told of when the round is over.
      const auto due = [&] { return scatter_.closing_ || scatter_.begun_ || !settled_.empty(); };
      if (!due()) {
        scatter_.changed_.wait(lock, due);
        busy = true;  // before the lanes have sent it all
      }
      if (!busy) {
        const bool dry = scatter_.dry_;
        scatter_.changed_.wait_for(lock, rest_locked(),
                                   [&] { return scatter_.closing_ || scatter_.dry_ != dry; });
      }
      if (scatter_.closing_ || scatter_.shared_.gate.closed() || self.stopping()) return;
    }
    busy = step();
  }
}

// Until something may be due.
Scatter::Clock::duration Scatter::Dedup::rest_locked() const {
  const bool waits = scatter_.dry_ && !deferred_.empty();
  return waits ? Clock::duration(kIdleWhenDry) : Clock::duration(kIdle);
}

bool Scatter::Dedup::step() {
  const auto now = Clock::now();
  measure(now);
  const bool told = tell();
  const bool retried = retry(now);
  {
    const std::lock_guard lock(scatter_.mutex_);
    give_up_waiting_locked(Clock::now());
  }
  return examine(now) || told || retried;
}

// What the link takes: by what was acknowledged, since a socket takes anything at first, and only while there is
// something to send.
void Scatter::Dedup::measure(Clock::time_point now) {
  const std::uint64_t bytes = acknowledged_bytes_.load(std::memory_order_relaxed);
  const std::uint64_t wire_bytes = acknowledged_wire_bytes_.load(std::memory_order_relaxed);
  const std::lock_guard lock(scatter_.mutex_);
  const bool busy = scatter_.begun_ && !scatter_.dry_;
  if (busy && measured_at_) {
    busy_time_ += now - *measured_at_;
    busy_bytes_ += bytes - measured_bytes_;
    busy_wire_bytes_ += wire_bytes - measured_wire_bytes_;
  }
  measured_at_ = busy ? std::optional(now) : std::nullopt;
  measured_bytes_ = bytes;
  measured_wire_bytes_ = wire_bytes;
  if (busy_time_ < kRateTime || busy_bytes_ == 0) return;  // or nothing has come back yet
  const double seconds = std::chrono::duration<double>(busy_time_).count();
  const double rate = static_cast<double>(busy_bytes_) / seconds;
  const double wire_rate = static_cast<double>(busy_wire_bytes_) / seconds;
  wire_bytes_per_second_ = link_bytes_per_second_ ? (wire_bytes_per_second_ + wire_rate) / 2 : wire_rate;
  link_bytes_per_second_ = (link_bytes_per_second_.value_or(rate) + rate) / 2;
  measured_.link_bytes_per_second = link_bytes_per_second_;
  busy_time_ = {};
  busy_bytes_ = busy_wire_bytes_ = 0;
}

bool Scatter::Dedup::examine(Clock::time_point now) {
  if (std::all_of(identities_.begin(), identities_.end(), [](std::uint64_t each) { return each == 0; }))
    return false;
  std::uint64_t round = 0;
  {
    // Before anything is copied: what is claimed later was looked at in this round.
    const std::lock_guard lock(scatter_.mutex_);
    // Enough for the ways to do.
    if (!scatter_.begun_ || !looks_ || reference_count_ >= kMostDeferred) return false;
    round = round_;
  }
  const std::uint64_t lead = dedup_lead_pages(measured_.link_bytes_per_second, scatter_.page_size_);
  const std::uint64_t unsent = unsent_pages();
  std::uint64_t most = dedup_look_pages(measured_, lead, unsent, now - looked_at_);
  if (!dedup_pays(measured_)) {
    if (now < next_sample_) return false;
    next_sample_ = now + kSampleEvery;
    most = std::min(most, kDedupSamplePages);
  } else if (most < kLeastBatch) {
    return false;
  }
  if (placed_in_ != round) {
    placed_in_ = round;
    std::tie(at_region_, at_page_) = scatter_.shared_.queue.server_cursor();
  }
  pick(most);
  if (batch_.empty()) return false;
  looked_at_ = now;

  for (std::size_t at = 0; at < batch_.size();) {
    const std::lock_guard lock(scatter_.mutex_);
    const bool current = scatter_.begun_ && round_ == round;
    for (const std::size_t end = std::min(batch_.size(), at + kNotedAtOnce); at < end; ++at) {
      const Page& page = batch_[at].page;
      if (current) {
        note_look_locked(batch_[at], now);
      } else {
        // Looked at too early: in this round it is looked at again.
        regions_[page.region]->examined.clear(page.page);
      }
    }
  }
  measured_.examined_pages += batch_.size();
  ask(round);
  if (measured_.examined_pages > kRemembered) {
    measured_.examined_pages /= 2;
    measured_.hits /= 2;
  }
  return true;
}

void Scatter::Dedup::note_look_locked(Deferred& look, Clock::time_point now) {
  const Page& page = look.page;
  Region& region = *regions_[page.region];
  region.names[page.page.value] = name_of(page.hash);
  region.seen[page.page.value] = page.xxh3;
  region.named.set(page.page);
  look.twin = twin_of(page);
  if (look.twin) {
    ++measured_.hits;
    // Waits for its twin, wherever that is on its way to; retry() finds out. On the list first: where there is no
    // memory for that, nobody has claimed it.
    if (deferred_.size() >= kMostDeferred) return;
    look.next = now;
    put_off_locked(look);
    if (claim_locked(page, false)) return;
    deferred_.pop_back();
    --deferred_twins_;
    return;
  }
  ask_locked(look, false);
  if (!scatter_.where_.safe(page.region, page.page)) {
    region.to_tell.set(page.page);
  } else if (settled_.size() < kMostSettled) {
    // A lane was faster, and did not know its name.
    settled_.push_back({page.region, {page.page, 1}, scatter_.where_.holders(page.region, page.page)});
  }
}

void Scatter::Dedup::put_off_locked(const Deferred& page) {
  deferred_.push_back(page);
  if (page.twin) ++deferred_twins_;
}

void Scatter::Dedup::take_off_locked() {
  if (deferred_.front().twin) --deferred_twins_;
  deferred_.pop_front();
}

void Scatter::Dedup::ask_locked(const Deferred& page, bool claimed) {
  names_to_ask_.push_back(name_of(page.page.hash));
  asking_.push_back(page);
  asking_.back().claimed = claimed;
  asking_.back().given_up = false;
  if (claimed) ++asked_again_;
}

// About asking_: each is settled by its answer, and waits in deferred_ where that says so. A round does not end while
// any of them is claimed; those that are not belong to nobody, whatever round it is by then.
void Scatter::Dedup::ask(std::uint64_t round) {
  if (names_to_ask_.empty()) return;
  probe(answers_);
  for (std::size_t at = 0; at < asking_.size();) {
    const std::lock_guard lock(scatter_.mutex_);
    const bool current = scatter_.begun_ && round_ == round;
    for (const std::size_t end = std::min(asking_.size(), at + kNotedAtOnce); at < end; ++at) {
      Deferred& each = asking_[at];
      if (each.given_up || !current) continue;
      if (!each.claimed && answers_[at].first != wire::KnownHolders::kNobody) ++measured_.hits;
      settle_answer_locked(each, answers_[at]);
      // It is in another list now, or pending again.
      if (std::exchange(each.claimed, false)) --asked_again_;
    }
    scatter_.changed_.notify_all();
  }
  const std::lock_guard lock(scatter_.mutex_);
  asking_.clear();
  names_to_ask_.clear();
  asked_again_ = 0;
}

void Scatter::Dedup::settle_answer_locked(Deferred& page, wire::KnownHolders known) {
  if (known.first == wire::KnownHolders::kOnItsWay) {
    if (!page.claimed && deferred_.size() >= kMostDeferred) return;
    const auto wait =
        std::min<std::chrono::milliseconds>(kFirstRetry * (1U << std::min(page.tries, 3U)), kLongestRetry);
    page.next = Clock::now() + wait;
    ++page.tries;
    put_off_locked(page);
    if (claim_locked(page.page, page.claimed)) return;
    deferred_.pop_back();
    return;
  }
  if (known.first == wire::KnownHolders::kNobody) {
    give_up_locked(page.page, page.claimed);
    // Before those that are still asked for, which may need no sending.
    scatter_.shared_.queue.put_first(page.page.region, page.page.page);
    return;
  }
  const auto holders = usable_locked(known);
  if (!holders || !refer_locked(page.page, *holders, page.claimed)) give_up_locked(page.page, page.claimed);
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
    const auto of_next = scatter_.holders_for(way);
    if (way.replicas[holders.second] || (of_next && of_next->second == holders.second)) return holders;
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
  std::uint64_t round = 0;
  std::size_t left = 0;
  bool dry = false;
  {
    const std::lock_guard lock(scatter_.mutex_);
    dry = scatter_.dry_;
    if (deferred_.empty() || (!dry && now < next_retry_)) return false;
    next_retry_ = now + kRetryEvery;
    round = round_;
    left = deferred_.size();
  }
  std::map<Place, Place> leads;
  while (left > 0) {
    // A few at a time, since every way needs the mutex for every chunk. Meanwhile they may have been given up.
    const std::lock_guard lock(scatter_.mutex_);
    if (round_ != round || deferred_.empty()) break;
    for (std::size_t i = 0; i < kLookedAtOnce && left > 0 && !deferred_.empty(); ++i, --left)
      look_again_locked(now, dry, leads);
    scatter_.changed_.notify_all();
  }
  if (names_to_ask_.empty()) return false;
  ask(round);
  return true;
}

// Where an equal page is of no use, or a slow receiver has it in hand and nothing else is left to send, the first of
// those that wait for it leads the others, once: it is asked for in place of it, or goes plainly at once, and they wait
// for that instead. `leads`: by the page that they waited for.
void Scatter::Dedup::look_again_locked(Clock::time_point now, bool dry, std::map<Place, Place>& leads) {
  Deferred each = deferred_.front();
  const auto again = [&] {
    // At the end first: where there is no memory for that, it is still where it was.
    put_off_locked(each);
    take_off_locked();
  };
  if (scatter_.where_.safe(each.page.region, each.page.page))
    return take_off_locked();  // a fault's answer was faster
  if (!each.twin) {
    const bool due = each.next <= now || (dry && each.next <= now + kRetryWhenDry);
    if (!due || asking_.size() >= kAskedAgainAtOnce) return again();
    ask_locked(each, true);
    return take_off_locked();
  }
  const Twin twin = look_at_twin_locked(each);
  if (twin == Twin::kReferred) return take_off_locked();
  const bool slow = dry && !scatter_.where_.safe(each.twin->first, each.twin->second);
  if (twin == Twin::kWaits && (!slow || each.second_twin)) return again();
  if (each.second_twin || (twin == Twin::kNoUse && asking_.size() >= kAskedAgainAtOnce)) {
    give_up_locked(each.page, true);
    return take_off_locked();
  }
  const Place before = *each.twin;
  const Place here(each.page.region, each.page.page);
  const Place lead = leads.try_emplace(before, here).first->second;
  if (lead != here) {
    each.twin = lead;
    each.second_twin = true;
    return again();
  }
  replace_twin(each.page, before);
  if (twin == Twin::kNoUse) {
    each.twin.reset();
    ask_locked(each, true);
  } else {
    give_up_locked(each.page, true);
  }
  take_off_locked();
}

Scatter::Dedup::Twin Scatter::Dedup::look_at_twin_locked(const Deferred& page) {
  const auto [region, twin] = *page.twin;
  const Region& of = *regions_[region];
  if (!scatter_.where_.safe(region, twin)) return Twin::kWaits;
  const wire::Holders holders = scatter_.where_.holders(region, twin);
  const bool here = holders.first < scatter_.servers_.size();
  const bool enough = scatter_.config_.replicas < 2 || holders.second != wire::Holders::kNobody;
  // It was written after it was looked at, has gone straight to the destination, or nobody will ever know it by its
  // name.
  const bool same = of.named.test(twin) && of.seen[twin.value] == page.page.xxh3 &&
                    scatter_.where_.hash(region, twin) == page.page.xxh3;
  if (!same || !here || !enough || identities_[holders.first] == 0) return Twin::kNoUse;
  const auto alive = [&](std::uint8_t ordinal) {
    return ordinal == wire::Holders::kNobody ||
           (ordinal < scatter_.servers_.size() && scatter_.servers_[ordinal]->failed.empty());
  };
  if (!of.told.test(twin) || !alive(holders.first) || !alive(holders.second)) return Twin::kWaits;
  return refer_locked(page.page, holders, true) ? Twin::kReferred : Twin::kWaits;
}

// Waiting in vain is paid for already, however often it begins anew.
void Scatter::Dedup::give_up_waiting_locked(Clock::time_point now) {
  if (!scatter_.begun_ || !scatter_.dry_ || (deferred_.empty() && asked_again_ == 0)) {
    waiting_.interrupted(now);
    return;
  }
  const auto wait = dedup_wait((pages_ - pages_before_) * scatter_.page_size_,
                               deferred_twins_ * scatter_.page_size_, link_bytes_per_second_);
  if (!waiting_.too_long(scatter_.dry_since_, now, wait)) return;
  std::vector<RegionRun> runs;
  runs.reserve(deferred_.size() + asked_again_);
  const auto give_up = [&](const Page& page) {
    regions_[page.region]->to_tell.set(page.page);
    runs.push_back({page.region, {page.page, 1}});
  };
  for (const Deferred& each : deferred_) give_up(each.page);
  for (Deferred& each : asking_) {
    if (each.claimed && !std::exchange(each.given_up, true)) give_up(each.page);
  }
  deferred_.clear();
  deferred_twins_ = 0;
  asked_again_ = 0;
  scatter_.put_back_locked(runs);
}

}  // namespace memferry
