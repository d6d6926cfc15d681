// What the destination says it has, by name: a set of bounded size that forgets nothing but what is erased.
//
// Threads: any.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>
#include <vector>

#include "wire/frame.h"

namespace memferry {

class KnownNames {
 public:
  // 64 MiB of table at most, half as much again while it grows; what is told beyond is passed over.
  static constexpr std::size_t kMost = std::size_t{1} << 22;

  KnownNames();  // throws SystemError (getrandom)

  void add(std::span<const wire::KnownName> names);
  void erase(wire::KnownName name);
  // known[i]: whether names[i] is there.
  void look_up(std::span<const wire::KnownName> names, std::vector<bool>& known) const;
  [[nodiscard]] bool empty() const { return size_.load(std::memory_order_relaxed) == 0; }
  [[nodiscard]] std::size_t size() const { return size_.load(std::memory_order_relaxed); }
  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  // An entry of 0 is free; the name 0 goes by 1, whose holder it then finds or not, like any other name.
  static wire::KnownName stored(wire::KnownName name) { return name == 0 ? 1 : name; }
  [[nodiscard]] std::optional<std::size_t> place_of(wire::KnownName name) const;
  std::size_t put(wire::KnownName name);
  void grow();

  std::uint64_t seed_ = 0;
  mutable std::shared_mutex mutex_;  // guards table_
  std::vector<wire::KnownName> table_;
  std::atomic<std::size_t> size_{0};
};

}  // namespace memferry
