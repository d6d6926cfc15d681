#include "stage/hint_table.h"

#include <algorithm>
#include <utility>

namespace memferry {

HintTable::HintTable(std::shared_ptr<Slab> slab, std::uint64_t most_slots)
    : slab_(std::move(slab)),
      sets_a_block_(slab_->slot_bytes() / (kWays * sizeof(Entry))),
      blocks_(static_cast<std::size_t>(std::max<std::uint64_t>(1, most_slots))) {}

// Names are hashes: any of their bits are as good as others.
HintTable::Entry* HintTable::set_of(const wire::ContentName& name, bool make) {
  Slab::Slot& block = blocks_[static_cast<std::size_t>(name[0] % blocks_.size())];
  if (block == 0) {
    std::vector<Slab::Slot> taken;
    if (!make || !slab_->take_all_zeroed(1, taken)) return nullptr;
    block = taken.front() + 1;
    ++used_;
  }
  return reinterpret_cast<Entry*>(slab_->data(block - 1)) + name[1] % sets_a_block_ * kWays;
}

// The newest comes first in its set.
std::optional<HintTable::Value> HintTable::find_locked(const wire::ContentName& name) {
  Entry* const set = set_of(name, false);
  if (set == nullptr) return std::nullopt;
  Entry* const end = set + kWays;
  Entry* const found =
      std::find_if(set, end, [&](const Entry& each) { return each.value.first != 0 && each.name == name; });
  if (found == end) return std::nullopt;
  std::rotate(set, found, found + 1);
  return set->value;
}

void HintTable::put_locked(const wire::ContentName& name, Value value) {
  Entry* const set = set_of(name, true);
  if (set == nullptr) return;
  Entry* const end = set + kWays;
  Entry* place =
      std::find_if(set, end, [&](const Entry& each) { return each.value.first != 0 && each.name == name; });
  if (place == end) place = std::find_if(set, end, [](const Entry& each) { return each.value.first == 0; });
  if (place == end) --place;
  *place = {name, value};
  std::rotate(set, place, place + 1);
}

void HintTable::erase_locked(const wire::ContentName& name) {
  if (!find_locked(name)) return;
  Entry* const set = set_of(name, false);
  std::rotate(set, set + 1, set + kWays);
  set[kWays - 1] = {};
}

std::optional<HintTable::Value> HintTable::find(const wire::ContentName& name) {
  const std::lock_guard lock(mutex_);
  return find_locked(name);
}

void HintTable::put(const wire::ContentName& name, Value value) {
  const std::lock_guard lock(mutex_);
  put_locked(name, value);
}

void HintTable::erase(const wire::ContentName& name) {
  const std::lock_guard lock(mutex_);
  erase_locked(name);
}

void HintTable::clear() {
  const std::lock_guard lock(mutex_);
  std::vector<Slab::Slot> slots;
  for (Slab::Slot& block : blocks_) {
    if (block != 0) slots.push_back(std::exchange(block, 0) - 1);
  }
  slab_->drop(slots);
  used_ = 0;
}

std::uint64_t HintTable::slots_used() const {
  const std::lock_guard lock(mutex_);
  return used_;
}

}  // namespace memferry
