#include "share/slot_table.h"

#include <algorithm>
#include <cstring>

namespace memferry::share {
namespace {

constexpr std::size_t kSmallestTable = 64;

}  // namespace

// A hash under a key that guests have not: any part of it is as good as random.
std::uint64_t SlotTable::hash_of(const ContentDigest& digest) {
  std::uint64_t value = 0;
  std::memcpy(&value, digest.data() + sizeof value, sizeof value);
  return value;
}

bool SlotTable::before(std::uint32_t a, std::uint32_t b) const {
  const Slot& left = slots_[a];
  const Slot& right = slots_[b];
  return left.score != right.score ? left.score < right.score : left.age < right.age;
}

void SlotTable::place(std::uint32_t slot, std::size_t at) {
  heap_[at] = slot;
  slots_[slot].heap_at = static_cast<std::uint32_t>(at);
}

void SlotTable::up(std::size_t at) {
  const std::uint32_t slot = heap_[at];
  while (at > 0 && before(slot, heap_[(at - 1) / 2])) {
    place(heap_[(at - 1) / 2], at);
    at = (at - 1) / 2;
  }
  place(slot, at);
}

void SlotTable::down(std::size_t at) {
  const std::uint32_t slot = heap_[at];
  for (;;) {
    std::size_t child = 2 * at + 1;
    if (child >= heap_.size()) break;
    if (child + 1 < heap_.size() && before(heap_[child + 1], heap_[child])) ++child;
    if (!before(heap_[child], slot)) break;
    place(heap_[child], at);
    at = child;
  }
  place(slot, at);
}

void SlotTable::put_in_table(std::uint32_t slot) {
  const std::size_t mask = by_digest_.size() - 1;
  std::size_t at = hash_of(slots_[slot].digest) & mask;
  while (by_digest_[at] != kNone) at = (at + 1) & mask;
  by_digest_[at] = slot;
}

void SlotTable::grow_table() {
  if (2 * (heap_.size() + 1) <= by_digest_.size()) return;
  by_digest_.assign(std::max(kSmallestTable, 2 * by_digest_.size()), kNone);
  for (const std::uint32_t slot : heap_) put_in_table(slot);
}

void SlotTable::add(std::uint32_t slot, const ContentDigest& digest, double score) {
  grow_table();
  if (slots_.size() <= slot) slots_.resize(slot + 1);
  slots_[slot] = {digest, score, next_age_++, kNone};
  put_in_table(slot);
  heap_.push_back(slot);
  up(heap_.size() - 1);
}

void SlotTable::remove(std::uint32_t slot) {
  const std::size_t mask = by_digest_.size() - 1;
  std::size_t gap = hash_of(slots_[slot].digest) & mask;
  while (by_digest_[gap] != slot) gap = (gap + 1) & mask;
  for (std::size_t at = (gap + 1) & mask; by_digest_[at] != kNone; at = (at + 1) & mask) {
    // Whoever would be found from before the gap on moves into it.
    const std::size_t home = hash_of(slots_[by_digest_[at]].digest) & mask;
    if (((at - home) & mask) < ((at - gap) & mask)) continue;
    by_digest_[gap] = by_digest_[at];
    gap = at;
  }
  by_digest_[gap] = kNone;

  const std::size_t hole = slots_[slot].heap_at;
  const std::uint32_t last = heap_.back();
  heap_.pop_back();
  slots_[slot].heap_at = kNone;
  if (last == slot) return;
  place(last, hole);
  up(hole);
  down(slots_[last].heap_at);
}

void SlotTable::set_score(std::uint32_t slot, double score) {
  slots_[slot].score = score;
  up(slots_[slot].heap_at);
  down(slots_[slot].heap_at);
}

void SlotTable::clear() {
  slots_.clear();
  heap_.clear();
  by_digest_.clear();
}

std::optional<std::uint32_t> SlotTable::find(const ContentDigest& digest) const {
  if (by_digest_.empty()) return std::nullopt;
  const std::size_t mask = by_digest_.size() - 1;
  for (std::size_t at = hash_of(digest) & mask; by_digest_[at] != kNone; at = (at + 1) & mask) {
    if (slots_[by_digest_[at]].digest == digest) return by_digest_[at];
  }
  return std::nullopt;
}

}  // namespace memferry::share
