// The writer's own index of a page share: which slot has a hash, and which slot is worth least.
//
// A table by hash (open addressing; what is removed leaves no marker, the entries behind it move up) and a heap by
// score, in arrays: some 60 bytes a slot. Threads: one at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "page/content_hash.h"

namespace memferry::share {

class SlotTable {
 public:
  struct Slot {
    ContentDigest digest{};
    double score = 0;
    std::uint64_t age = 0;          // the order of insertion: among equal scores what came first leaves first
    std::uint32_t heap_at = kNone;  // kNone: not in use
  };

  // `slot` is not in use, `digest` is in no other.
  void add(std::uint32_t slot, const ContentDigest& digest, double score);
  void remove(std::uint32_t slot);
  void set_score(std::uint32_t slot, double score);
  void clear();

  [[nodiscard]] std::optional<std::uint32_t> find(const ContentDigest& digest) const;
  // Of least worth; there must be one.
  [[nodiscard]] std::uint32_t least() const { return heap_.front(); }
  [[nodiscard]] bool in_use(std::uint32_t slot) const {
    return slot < slots_.size() && slots_[slot].heap_at != kNone;
  }
  // What the next one to be added gets.
  [[nodiscard]] std::uint64_t next_age() const { return next_age_; }
  [[nodiscard]] std::uint32_t end() const { return static_cast<std::uint32_t>(slots_.size()); }
  [[nodiscard]] const Slot& operator[](std::uint32_t slot) const { return slots_[slot]; }
  [[nodiscard]] std::size_t size() const { return heap_.size(); }
  [[nodiscard]] std::uint64_t memory_bytes() const {
    return slots_.capacity() * sizeof(Slot) +
           (heap_.capacity() + by_digest_.capacity()) * sizeof(std::uint32_t);
  }

 private:
  static constexpr std::uint32_t kNone = ~0U;
  static std::uint64_t hash_of(const ContentDigest& digest);
  [[nodiscard]] bool before(std::uint32_t a, std::uint32_t b) const;
  void place(std::uint32_t slot, std::size_t at);
  void up(std::size_t at);
  void down(std::size_t at);
  void grow_table();
  void put_in_table(std::uint32_t slot);

  std::vector<Slot> slots_;
  std::vector<std::uint32_t> heap_;       // slots
  std::vector<std::uint32_t> by_digest_;  // slots; a power of two, at most half full
  std::uint64_t next_age_ = 0;
};

}  // namespace memferry::share
