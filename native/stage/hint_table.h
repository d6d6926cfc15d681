// What a server remembers of contents by their names, as far as there is room: a cache in slots of the slab. Each
// block of it is one slot, taken when its first entry comes; each set holds kWays names, and where a new one finds it
// full, the one that was used least lately leaves. Everything in it is a hint: whoever relies on it checks.
//
// Threads: any; a mutex is held for one name at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "stage/slab.h"
#include "wire/frame.h"

namespace memferry {

class HintTable {
 public:
  static constexpr std::size_t kWays = 8;

  struct Value {
    std::uint64_t first = 0;  // never 0 in the table
    std::uint64_t second = 0;
    bool operator==(const Value&) const = default;
  };

  // At most so many slots of the slab, at least one.
  HintTable(std::shared_ptr<Slab> slab, std::uint64_t most_slots);
  ~HintTable() { clear(); }
  HintTable(const HintTable&) = delete;
  HintTable& operator=(const HintTable&) = delete;

  std::optional<Value> find(const wire::ContentName& name);
  // Nothing happens where there is no room for a new block.
  void put(const wire::ContentName& name, Value value);
  void erase(const wire::ContentName& name);
  // Looks and puts in one step: to_of(what is known, or nullopt) gives what is to be known, nullopt nothing.
  template <typename Change>
  void change(const wire::ContentName& name, const Change& to_of) {
    const std::lock_guard lock(mutex_);
    const std::optional<Value> to = to_of(find_locked(name));
    if (to) {
      put_locked(name, *to);
    } else {
      erase_locked(name);
    }
  }
  // Gives all memory back.
  void clear();
  [[nodiscard]] std::uint64_t slots_used() const;

 private:
  struct Entry {
    wire::ContentName name;
    Value value;
  };
  static_assert(sizeof(Entry) == 32);
  // The set that the name belongs to; nullptr: it has no memory yet (`make`: nor is there any).
  Entry* set_of(const wire::ContentName& name, bool make);
  std::optional<Value> find_locked(const wire::ContentName& name);
  void put_locked(const wire::ContentName& name, Value value);
  void erase_locked(const wire::ContentName& name);

  const std::shared_ptr<Slab> slab_;
  const std::uint64_t sets_a_block_;
  mutable std::mutex mutex_;        // guards the rest
  std::vector<Slab::Slot> blocks_;  // one above the slot; 0: none yet
  std::uint64_t used_ = 0;
};

}  // namespace memferry
