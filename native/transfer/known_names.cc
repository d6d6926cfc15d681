#include "transfer/known_names.h"

#include <sys/random.h>

#include <algorithm>
#include <utility>

#include "os/sys_error.h"

namespace memferry {
namespace {

constexpr std::size_t kSmallestTable = 1024;
// Of a table that is half full at most, hardly a name is further from its place.
constexpr std::size_t kLongestWalk = 64;

}  // namespace

KnownNames::KnownNames() {
  if (::getrandom(&seed_, sizeof seed_, 0) != sizeof seed_) throw_errno("getrandom");
}

// Names are parts of keyed hashes, but it is the destination that says them: where one stands is not for it to choose,
// nor is how long somebody walks. Nothing: neither there nor room for it.
std::optional<std::size_t> KnownNames::place_of(wire::KnownName name) const {
  const std::size_t mask = table_.size() - 1;
  std::uint64_t mixed = name ^ seed_;
  mixed = (mixed ^ mixed >> 30U) * 0xbf58476d1ce4e5b9ULL;
  mixed = (mixed ^ mixed >> 27U) * 0x94d049bb133111ebULL;
  mixed ^= mixed >> 31U;
  for (std::size_t step = 0; step < kLongestWalk; ++step) {
    const std::size_t at = (mixed + step) & mask;
    if (table_[at] == 0 || table_[at] == name) return at;
  }
  return std::nullopt;
}

// How many more there are.
std::size_t KnownNames::put(wire::KnownName name) {
  const auto at = place_of(name);
  if (!at) return 0;
  return std::exchange(table_[*at], name) == 0 ? 1 : 0;
}

void KnownNames::grow() {
  std::vector<wire::KnownName> former(std::max(kSmallestTable, 2 * table_.size()));
  former.swap(table_);
  std::size_t kept = 0;
  for (const wire::KnownName name : former) {
    if (name != 0) kept += put(name);
  }
  size_.store(kept, std::memory_order_relaxed);
}

void KnownNames::add(std::span<const wire::KnownName> names) {
  const std::lock_guard lock(mutex_);
  for (const wire::KnownName told : names) {
    if (size_ >= kMost) return;
    if (2 * (size_ + 1) > table_.size()) grow();
    size_.fetch_add(put(stored(told)), std::memory_order_relaxed);
  }
}

void KnownNames::erase(wire::KnownName told) {
  const std::lock_guard lock(mutex_);
  if (table_.empty()) return;
  const std::size_t mask = table_.size() - 1;
  const auto place = place_of(stored(told));
  if (!place || table_[*place] == 0) return;
  table_[*place] = 0;
  size_.fetch_sub(1, std::memory_order_relaxed);
  // Whoever stands behind it may have been pushed there.
  for (std::size_t at = (*place + 1) & mask; table_[at] != 0; at = (at + 1) & mask) {
    const wire::KnownName moved = std::exchange(table_[at], 0);
    put(moved);
  }
}

void KnownNames::look_up(std::span<const wire::KnownName> names, std::vector<bool>& known) const {
  known.assign(names.size(), false);
  const std::shared_lock lock(mutex_);
  if (table_.empty()) return;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto at = place_of(stored(names[i]));
    known[i] = at && table_[*at] != 0;
  }
}

std::uint64_t KnownNames::memory_bytes() const {
  const std::shared_lock lock(mutex_);
  return table_.capacity() * sizeof(wire::KnownName);
}

}  // namespace memferry
