// The memory of a VMD server, in slots of one page: pages of guests, blocks of their index, execution states. One
// mapping of the size it was given, so that it can never grow beyond it.
//
// A slot is counted: every owner has one count, everyone who is sending from it another. Whoever takes the last one
// away frees it. A slot that is *settled* never changes its content until it is free; only such a one is shared. Free
// slots are *warm* (there is memory behind them, with what was written last) or *cold* (none; they read as zeros). Warm
// ones are given out first, because touching fresh memory costs more than the copy. Once preallocated there is memory
// behind all of them for good. Until then only so many cold ones are given out as the system has memory for.
//
// Beside the mapping a slab takes kTableBytes a slot, and nothing more however it is used.
//
// Threads: any. Taking and releasing hold a mutex for a few instructions a slot, giving back for a system call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "os/mapping.h"

namespace memferry {

class Slab {
 public:
  using Slot = std::uint32_t;
  static constexpr std::uint64_t kMostSlots = 1ULL << 31;
  static constexpr std::uint32_t kMostCounts = 1U << 20;
  static constexpr std::uint64_t kTableBytes = sizeof(std::uint32_t) + sizeof(std::uint16_t) + sizeof(Slot);

  // Throws SystemError (mmap), std::invalid_argument (no slot, or more than kMostSlots).
  Slab(std::uint64_t bytes, std::uint64_t slot_bytes);

  // Takes the memory behind all slots, now and for good: nothing goes back to the system any more, and nothing is
  // missing later. Blocks as long as the system takes to clear it. Throws SystemError: there
  // is not so much.
  void preallocate();
  // From now on at most so many cold slots are given out, beside those that are given back: what the system can spare.
  // Until it is called, all of them. Not of a slab that is preallocated.
  void limit_cold(std::uint64_t slots);
  // Called when slots are short, with how many: gives up what others need more. Before the first slot is taken. It may
  // release, never take. No lock of the slab is held, but the taker's may be (a HintTable's, Stage::Impl's): it waits
  // for nobody who takes one of those, or who takes slots other than spare ones.
  void set_relief(std::function<void(std::uint64_t)> relief) { relief_ = std::move(relief); }
  enum class Relief { kAsked, kNone };
  // As many slots as there are, at most `wanted`, counted once; ascending where possible. Their content is what it
  // was, or zeros. Appended to `slots`.
  std::uint64_t take(std::uint64_t wanted, std::vector<Slot>& slots);
  // The same of what is free, for things that are themselves given up for others.
  std::uint64_t take_spare(std::uint64_t wanted, std::vector<Slot>& slots);
  // All of them or none.
  bool take_all(std::uint64_t wanted, std::vector<Slot>& slots);
  // The same; they read as zeros, and their memory is not touched until somebody does.
  bool take_all_zeroed(std::uint64_t wanted, std::vector<Slot>& slots, Relief relief = Relief::kAsked);
  void pin(Slot slot);
  // What lies in it is final: from now on it may be shared within this domain (not 0).
  void settle(std::span<const Slot> slots, std::uint16_t domain);
  // Another count of a slot that may be anybody's by now. False when it is free, not settled, another domain's, or
  // shared as often as it may be: so a count never runs over, whatever a peer asks for.
  bool share(Slot slot, std::uint16_t domain);
  // Takes one count of each away.
  void release(std::span<const Slot> slots);
  // The same, and memory whose last count went away goes back to the system: for whole images.
  void drop(std::span<const Slot> slots);
  // Gives the memory behind all free slots back to the system.
  void give_back_free();

  [[nodiscard]] std::byte* data(Slot slot) const {
    return mapping_.data() + std::uint64_t{slot} * slot_bytes_;
  }
  [[nodiscard]] std::uint64_t slot_bytes() const { return slot_bytes_; }
  [[nodiscard]] std::uint64_t slots() const { return slots_; }
  [[nodiscard]] std::uint64_t free_slots() const;
  [[nodiscard]] const std::byte* start() const { return mapping_.data(); }

 private:
  // A stack of free slots, linked through next_.
  struct Stack {
    Slot top = 0;
    std::uint64_t size = 0;
  };
  static constexpr std::uint32_t kSettled = 1U << 31;
  [[nodiscard]] std::atomic_ref<std::uint32_t> counts_of(Slot slot) const {
    return std::atomic_ref(reinterpret_cast<std::uint32_t*>(counts_.data())[slot]);
  }
  [[nodiscard]] std::atomic_ref<std::uint16_t> domain_of(Slot slot) const {
    return std::atomic_ref(reinterpret_cast<std::uint16_t*>(domains_.data())[slot]);
  }
  // Takes one count away; true when it was the last.
  bool let_go(Slot slot);
  void push(Stack& stack, Slot slot);
  [[nodiscard]] Slot pop(Stack& stack);
  void give_out(Slot slot, std::vector<Slot>& slots);
  [[nodiscard]] Slot pop_cold();
  [[nodiscard]] std::uint64_t free_locked() const;
  // Sorts; the memory behind them must be nobody's. They read as zeros after it.
  void give_back(std::span<Slot> slots);
  bool take_zeroed(std::uint64_t wanted, std::vector<Slot>& slots);

  const std::uint64_t slot_bytes_;
  const std::uint64_t slots_;
  Mapping mapping_;
  Mapping counts_;   // and kSettled
  Mapping domains_;  // of settled slots
  std::atomic<bool> preallocated_{false};
  std::function<void(std::uint64_t)> relief_;
  mutable std::mutex mutex_;  // guards what follows
  std::unique_ptr<Slot[]> next_;
  Stack warm_;
  Stack cold_;
  std::uint64_t never_used_ = 0;  // slots from here on were never taken: cold as well
  std::uint64_t cold_left_ = kMostSlots;
};

}  // namespace memferry
