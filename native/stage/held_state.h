// An execution state in slots of the slab. It is written and read in pieces, so that no copy of it need stand anywhere
// else: what a VMD server holds of it counts from the first byte.
//
// Threads: written by one before anybody else has it, then read by any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "stage/slab.h"

namespace memferry {

class HeldState {
 public:
  // Room for so many bytes, as they happen to be; nullptr: there is none.
  static std::shared_ptr<HeldState> make(std::shared_ptr<Slab> slab, std::uint64_t bytes);
  ~HeldState() { slab_->drop(slots_); }
  HeldState(const HeldState&) = delete;
  HeldState& operator=(const HeldState&) = delete;

  [[nodiscard]] std::uint64_t size() const { return bytes_; }
  [[nodiscard]] std::uint64_t slots() const { return slots_.size(); }
  // Throw std::invalid_argument: not all of it is inside.
  void write(std::uint64_t at, std::span<const std::byte> bytes);
  void read(std::uint64_t at, std::span<std::byte> into) const;

 private:
  HeldState(std::shared_ptr<Slab> slab, std::uint64_t bytes) : slab_(std::move(slab)), bytes_(bytes) {}
  // each(where it lies, position in what is asked for, how much)
  template <typename Each>
  void pieces(std::uint64_t at, std::uint64_t length, const Each& each) const;

  const std::shared_ptr<Slab> slab_;
  const std::uint64_t bytes_;
  std::vector<Slab::Slot> slots_;
};

}  // namespace memferry
