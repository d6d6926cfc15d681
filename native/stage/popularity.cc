#include "stage/popularity.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace memferry {
namespace {

// Pages among which the least useful is looked for.
constexpr unsigned kSampled = 32;
// Looked at with every frame of names: so a table of any size is gone through in time, and never at once.
constexpr std::uint64_t kSwept = 1024;
constexpr std::uint32_t kLongest = 255;

}  // namespace

Popularity::Popularity(std::shared_ptr<Slab> slab, PopularityConfig config)
    : slab_(std::move(slab)),
      config_(config),
      sets_a_block_(slab_->slot_bytes() / (kWays * sizeof(Entry))),
      entries_a_block_(sets_a_block_ * kWays),
      blocks_(static_cast<std::size_t>(std::max<std::uint64_t>(1, config.most_tables))) {}

Popularity::~Popularity() {
  std::vector<Slab::Slot> slots;
  for (std::uint64_t i = 0; i < entries(); ++i) {
    const Entry* const entry = at(i);
    if (entry != nullptr && entry->domain != 0 && entry->slot != 0) slots.push_back(entry->slot - 1);
  }
  for (const Slab::Slot block : blocks_) {
    if (block != 0) slots.push_back(block - 1);
  }
  slab_->drop(slots);
}

// From 1 on: an entry that was never written has period 0.
std::uint32_t Popularity::period_at(std::uint64_t now_ms) const {
  return static_cast<std::uint32_t>(now_ms / std::max<std::uint64_t>(1, config_.period_ms)) + 1;
}

std::uint32_t Popularity::score_of(const Entry& entry, std::uint32_t period) {
  const auto guests = static_cast<std::uint32_t>(std::popcount(entry.now | entry.before));
  return guests * (kLongest + 1) + std::min(kLongest, period - entry.since);
}

Popularity::Entry* Popularity::at(std::uint64_t index) {
  const Slab::Slot block = blocks_[static_cast<std::size_t>(index / entries_a_block_)];
  if (block == 0) return nullptr;
  return reinterpret_cast<Entry*>(slab_->data(block - 1)) + index % entries_a_block_;
}

void Popularity::give_up_page(Entry& entry) {
  if (entry.slot == 0) return;
  const Slab::Slot slot = entry.slot - 1;
  slab_->release(std::span(&slot, 1));
  entry.slot = 0;
  --contents_;
}

void Popularity::clear(Entry& entry) {
  give_up_page(entry);
  entry = {};
  --names_;
}

bool Popularity::alive(Entry& entry, std::uint32_t period) {
  if (entry.domain == 0) return false;
  if (gone_[entry.domain]) {
    clear(entry);
    return false;
  }
  // A caller's clock may be a little behind another's.
  if (period > entry.period) {
    entry.before = period == entry.period + 1 ? entry.now : 0;
    entry.now = 0;
    entry.period = period;
  }
  if ((entry.now | entry.before) != 0) return true;
  clear(entry);
  return false;
}

Popularity::Entry* Popularity::find(std::uint16_t domain, const wire::ContentName& name,
                                    std::uint32_t period) {
  const std::uint64_t block = name[0] % blocks_.size();
  const std::uint64_t first = block * entries_a_block_ + name[1] % sets_a_block_ * kWays;
  Entry* const set = at(first);
  if (set == nullptr) return nullptr;
  for (std::size_t way = 0; way < kWays; ++way) {
    Entry& entry = set[way];
    if (entry.domain == domain && entry.name == name) return alive(entry, period) ? &entry : nullptr;
  }
  return nullptr;
}

// Where its set is full the one that fewest have leaves. Among those that one guest alone has it is none in particular:
// whoever goes through more pages than there is room for would otherwise push out each before it comes again.
Popularity::Entry* Popularity::make(std::uint16_t domain, const wire::ContentName& name,
                                    std::uint32_t period) {
  Slab::Slot& block = blocks_[static_cast<std::size_t>(name[0] % blocks_.size())];
  if (block == 0) {
    std::vector<Slab::Slot> taken;
    if (!slab_->take_all_zeroed(1, taken, Slab::Relief::kNone)) return nullptr;
    block = taken.front() + 1;
    ++tables_;
  }
  Entry* const set = reinterpret_cast<Entry*>(slab_->data(block - 1)) + name[1] % sets_a_block_ * kWays;
  Entry* least = nullptr;
  std::uint32_t least_score = 0;
  ++turn_;
  for (std::size_t i = 0; i < kWays; ++i) {
    Entry& entry = set[(i + turn_) % kWays];
    if (!alive(entry, period)) {
      least = &entry;
      break;
    }
    std::uint32_t score = score_of(entry, period);
    if (score < kPopularFrom * (kLongest + 1)) score = 0;
    if (least != nullptr && score >= least_score) continue;
    least = &entry;
    least_score = score;
  }
  if (least->domain != 0) clear(*least);
  *least = {name, 0, 0, period, period, 0, domain, 0};
  ++names_;
  return least;
}

bool Popularity::wants(const Entry& entry, std::uint64_t now_ms) {
  const std::uint32_t score = score_of(entry, entry.period);
  if (entry.slot != 0 || score < kPopularFrom * (kLongest + 1) || config_.most_contents == 0) return false;
  const auto now_s = static_cast<std::uint16_t>(now_ms / 1000);
  const auto waited_s = static_cast<std::uint16_t>(now_s - entry.asked_s);
  if (entry.asked_s != 0 && waited_s < kPatienceMs / 1000) return false;
  if (slab_->free_slots() <= slab_->slots() / kFreeShare) return false;
  return contents_ < config_.most_contents || score > floor_;
}

void Popularity::report(std::uint16_t domain, std::span<const wire::ContentName> names, unsigned seat,
                        std::uint64_t now_ms, std::span<std::uint64_t> wanted) {
  const std::uint32_t period = period_at(now_ms);
  std::ranges::fill(wanted, 0);
  const std::lock_guard lock(mutex_);
  if (period > period_) {
    period_ = period;
    floor_ = 0;
  }
  for (std::size_t i = 0; i < names.size(); ++i) {
    Entry* entry = find(domain, names[i], period);
    if (entry == nullptr) entry = make(domain, names[i], period);
    if (entry == nullptr) continue;
    entry->now |= std::uint64_t{1} << (seat % kSeats);
    if (!wants(*entry, now_ms)) continue;
    wanted[i / 64] |= std::uint64_t{1} << (i % 64);
    entry->asked_s = std::max<std::uint16_t>(1, static_cast<std::uint16_t>(now_ms / 1000));
  }
  sweep(period);
}

// What has faded gives its page back, though nobody asks for it any more.
void Popularity::sweep(std::uint32_t period) {
  for (std::uint64_t i = 0; i < std::min(kSwept, entries());) {
    hand_ %= entries();
    Entry* const entry = at(hand_);
    const std::uint64_t step = entry == nullptr ? entries_a_block_ - hand_ % entries_a_block_ : 1;
    if (entry != nullptr && entry->domain != 0) (void)alive(*entry, period);
    hand_ += step;
    i += step;
    swept_ += step;
  }
  while (!going_.empty() && going_.front().swept <= swept_) {
    gone_.reset(going_.front().domain);
    going_.pop_front();
  }
}

bool Popularity::make_room_for(std::uint32_t score, std::uint32_t period) {
  Entry* least = nullptr;
  std::uint32_t least_score = 0;
  unsigned sampled = 0;
  for (std::uint64_t i = 0; i < entries() && sampled < kSampled;) {
    clock_ %= entries();
    Entry* const entry = at(clock_);
    const std::uint64_t step = entry == nullptr ? entries_a_block_ - clock_ % entries_a_block_ : 1;
    clock_ += step;
    i += step;
    if (entry == nullptr || !alive(*entry, period) || entry->slot == 0) continue;
    ++sampled;
    const std::uint32_t its = score_of(*entry, period);
    if (least != nullptr && its >= least_score) continue;
    least = entry;
    least_score = its;
  }
  if (contents_ < config_.most_contents) return true;  // something had faded
  if (least == nullptr) return false;
  floor_ = least_score;
  if (least_score >= score) return false;
  give_up_page(*least);
  return true;
}

bool Popularity::give(std::uint16_t domain, const wire::ContentName& name, std::span<const std::byte> page,
                      std::uint64_t now_ms) {
  const std::uint32_t period = period_at(now_ms);
  const std::lock_guard lock(mutex_);
  Entry* const entry = find(domain, name, period);
  if (entry == nullptr || entry->asked_s == 0 || entry->slot != 0) return false;
  const std::uint32_t score = score_of(*entry, period);
  if (slab_->free_slots() <= slab_->slots() / kFreeShare) return false;
  if (contents_ >= config_.most_contents && !make_room_for(score, period)) return false;
  std::vector<Slab::Slot> taken;
  if (slab_->take_spare(1, taken) == 0) return false;
  std::memcpy(slab_->data(taken.front()), page.data(), page.size());
  entry->slot = taken.front() + 1;
  entry->asked_s = 0;
  ++contents_;
  return true;
}

void Popularity::list(std::uint16_t domain, std::uint64_t& cursor, std::uint32_t least_score,
                      std::size_t most, std::uint64_t now_ms, std::vector<wire::PopularName>& into) {
  const std::uint32_t period = period_at(now_ms);
  const std::size_t before = into.size();
  const std::lock_guard lock(mutex_);
  std::uint64_t seen = 0;
  while (cursor < entries() && seen < kEntriesAtOnce && into.size() - before < most) {
    Entry* const entry = at(cursor);
    const std::uint64_t step = entry == nullptr ? entries_a_block_ - cursor % entries_a_block_ : 1;
    cursor += step;
    seen += entry == nullptr ? 1 : step;
    if (entry == nullptr || entry->domain != domain || !alive(*entry, period) || entry->slot == 0) continue;
    const std::uint32_t score = score_of(*entry, period);
    if (score >= least_score) into.push_back({entry->name, score, 0});
  }
  if (cursor >= entries()) cursor = 0;
}

std::optional<Slab::Slot> Popularity::pin(std::uint16_t domain, const wire::ContentName& name,
                                          std::uint64_t now_ms) {
  const std::lock_guard lock(mutex_);
  const Entry* const entry = find(domain, name, period_at(now_ms));
  if (entry == nullptr || entry->slot == 0) return std::nullopt;
  slab_->pin(entry->slot - 1);
  return entry->slot - 1;
}

std::uint32_t Popularity::score(std::uint16_t domain, const wire::ContentName& name, std::uint64_t now_ms) {
  const std::lock_guard lock(mutex_);
  const std::uint32_t period = period_at(now_ms);
  const Entry* const entry = find(domain, name, period);
  return entry == nullptr ? 0 : score_of(*entry, period);
}

// Once around the table those below what a sample says is the middle leave, and in a second round anybody.
void Popularity::relieve(std::uint64_t slots) {
  const std::lock_guard lock(mutex_);
  if (contents_ == 0) return;
  std::uint64_t left = std::min(contents_, std::max(slots, config_.most_contents / 8));
  std::vector<std::uint32_t> sample;
  for (std::uint64_t i = 0; i < entries() && sample.size() < kSampled;) {
    const std::uint64_t index = (clock_ + i) % entries();
    const Entry* const entry = at(index);
    i += entry == nullptr ? entries_a_block_ - index % entries_a_block_ : 1;
    if (entry != nullptr && entry->domain != 0 && entry->slot != 0)
      sample.push_back(score_of(*entry, entry->period));
  }
  std::ranges::sort(sample);
  const std::uint32_t middle = sample.empty() ? 0 : sample[sample.size() / 2];
  for (std::uint64_t i = 0; i < 2 * entries() && left > 0;) {
    clock_ %= entries();
    Entry* const entry = at(clock_);
    const std::uint64_t step = entry == nullptr ? entries_a_block_ - clock_ % entries_a_block_ : 1;
    clock_ += step;
    i += step;
    if (entry == nullptr || entry->domain == 0 || entry->slot == 0) continue;
    if (i <= entries() && score_of(*entry, entry->period) > middle) continue;
    give_up_page(*entry);
    --left;
  }
}

void Popularity::tend(std::uint64_t now_ms) {
  const std::lock_guard lock(mutex_);
  sweep(period_at(now_ms));
}

void Popularity::forget(std::uint16_t domain) {
  const std::lock_guard lock(mutex_);
  gone_.set(domain);
  going_.push_back({domain, swept_ + entries()});
  // So what is forgotten is swept as fast as more can be.
  sweep(period_);
}

bool Popularity::forgotten(std::uint16_t domain) const {
  const std::lock_guard lock(mutex_);
  return !gone_[domain];
}

PopularityStats Popularity::stats() const {
  const std::lock_guard lock(mutex_);
  return {names_, contents_, tables_};
}

}  // namespace memferry
