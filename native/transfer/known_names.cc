#include "transfer/known_names.h"

#include <algorithm>

namespace memferry {
namespace {

constexpr std::size_t kSmallestTable = 1024;

}  // namespace

// Names are parts of keyed hashes, spread already; a destination that chooses them badly slows its own migration.
// The walk ends: the table is at most half full.
std::size_t KnownNames::place_of(wire::KnownName name) const {
  const std::size_t mask = table_.size() - 1;
  std::size_t at = (name * 0x9e3779b97f4a7c15ULL >> 20U) & mask;
  while (table_[at] != 0 && table_[at] != name) at = (at + 1) & mask;
  return at;
}

void KnownNames::grow() {
  std::vector<wire::KnownName> former(std::max(kSmallestTable, 2 * table_.size()));
  former.swap(table_);
  for (const wire::KnownName name : former) {
    if (name != 0) table_[place_of(name)] = name;
  }
}

void KnownNames::add(std::span<const wire::KnownName> names) {
  const std::lock_guard lock(mutex_);
  for (const wire::KnownName told : names) {
    const wire::KnownName name = stored(told);
    if (size_ >= kMost) return;
    if (2 * (size_ + 1) > table_.size()) grow();
    wire::KnownName& entry = table_[place_of(name)];
    if (entry == 0) size_.fetch_add(1, std::memory_order_relaxed);
    entry = name;
  }
}

void KnownNames::erase(wire::KnownName told) {
  const std::lock_guard lock(mutex_);
  if (table_.empty()) return;
  const std::size_t mask = table_.size() - 1;
  std::size_t at = place_of(stored(told));
  if (table_[at] == 0) return;
  table_[at] = 0;
  size_.fetch_sub(1, std::memory_order_relaxed);
  // Whoever stands behind it may have been pushed there.
  for (at = (at + 1) & mask; table_[at] != 0; at = (at + 1) & mask) {
    const wire::KnownName moved = table_[at];
    table_[at] = 0;
    table_[place_of(moved)] = moved;
  }
}

void KnownNames::look_up(std::span<const wire::KnownName> names, std::vector<bool>& known) const {
  known.assign(names.size(), false);
  const std::shared_lock lock(mutex_);
  if (table_.empty()) return;
  for (std::size_t i = 0; i < names.size(); ++i) known[i] = table_[place_of(stored(names[i]))] != 0;
}

std::uint64_t KnownNames::memory_bytes() const {
  const std::shared_lock lock(mutex_);
  return table_.capacity() * sizeof(wire::KnownName);
}

}  // namespace memferry
