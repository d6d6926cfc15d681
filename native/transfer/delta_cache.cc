#include "transfer/delta_cache.h"

#include <algorithm>
#include <cstring>

namespace memferry {

DeltaCache::DeltaCache(std::uint64_t bytes, std::uint64_t page_size)
    : page_size_(static_cast<std::size_t>(page_size)),
      sets_(static_cast<std::size_t>(bytes / (kWays * (page_size + sizeof(Entry))))),
      entries_(sets_ * kWays),
      // Not touched before it is used.
      bytes_(new std::byte[sets_ * kWays * page_size_]),
      open_(sets_ > 0),
      allocated_(sets_ > 0) {}

DeltaCache::Entry* DeltaCache::find(std::size_t set, std::uint64_t key) {
  const auto first = entries_.begin() + static_cast<std::ptrdiff_t>(set * kWays);
  const auto last = first + kWays;
  const auto found = std::find_if(first, last, [key](const Entry& entry) { return entry.key == key; });
  return found == last ? nullptr : &*found;
}

bool DeltaCache::get(std::uint32_t region, PageNumber page, wire::Holders to, std::span<std::byte> base) {
  if (!open()) return false;
  const std::uint64_t key = key_of(region, page);
  const std::size_t set = set_of(key);
  const std::lock_guard lock(mutex_of(set));
  if (!open()) return false;
  const Entry* entry = find(set, key);
  // Of this round it may not be there yet: nothing was acknowledged since.
  if (entry == nullptr || entry->to != to || entry->round == round_.load(std::memory_order_relaxed))
    return false;
  std::memcpy(base.data(), data(static_cast<std::size_t>(entry - entries_.data())), page_size_);
  return true;
}

void DeltaCache::put(std::uint32_t region, PageNumber page, wire::Holders to,
                     std::span<const std::byte> bytes) {
  if (!open()) return;
  const std::uint64_t key = key_of(region, page);
  const std::size_t set = set_of(key);
  const std::uint32_t round = round_.load(std::memory_order_relaxed);
  const std::lock_guard lock(mutex_of(set));
  if (!open()) return;
  Entry* entry = find(set, key);
  if (entry == nullptr) {
    Entry* const first = &entries_[set * kWays];
    entry = std::min_element(first, first + kWays, [](const Entry& a, const Entry& b) {
      return (a.key == 0 ? 0 : a.round) < (b.key == 0 ? 0 : b.round);
    });
    if (entry->key != 0 && entry->round == round) return;
    if (entry->key == 0) held_.fetch_add(1, std::memory_order_relaxed);
  }
  *entry = {key, round, to};
  std::memcpy(data(static_cast<std::size_t>(entry - entries_.data())), bytes.data(), page_size_);
}

void DeltaCache::forget(std::uint32_t region, PageRun run) {
  if (!open() || held_.load(std::memory_order_relaxed) == 0) return;
  const auto drop = [this](Entry& entry) {
    entry.key = 0;
    held_.fetch_sub(1, std::memory_order_relaxed);
  };
  const std::uint64_t first = key_of(region, run.first);
  if (run.count < sets_) {
    for (std::uint64_t key = first; key < first + run.count; ++key) {
      const std::size_t set = set_of(key);
      const std::lock_guard lock(mutex_of(set));
      if (!open()) return;
      if (Entry* entry = find(set, key)) drop(*entry);
    }
    return;
  }
  for (std::size_t set = 0; set < sets_; ++set) {
    const std::lock_guard lock(mutex_of(set));
    if (!open()) return;
    for (std::size_t way = 0; way < kWays; ++way) {
      Entry& entry = entries_[set * kWays + way];
      if (entry.key >= first && entry.key < first + run.count) drop(entry);
    }
  }
}

void DeltaCache::end() {
  close();
  // Whoever is still in it is let out: under each of the mutexes it was open, or is seen not to be.
  for (std::mutex& each : mutexes_) const std::lock_guard out(each);
  bytes_.reset();
  entries_ = {};
  allocated_.store(false, std::memory_order_relaxed);
}

std::uint64_t DeltaCache::memory_bytes() const {
  return allocated_.load(std::memory_order_relaxed) ? sets_ * kWays * (page_size_ + sizeof(Entry)) : 0;
}

}  // namespace memferry
