#include "stage/slab.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "os/kernel_abi.h"
#include "os/sys_error.h"

namespace memferry {
namespace {

// Given back in one go: a system call for each stretch of them, with the mutex held at worst.
constexpr std::size_t kBatch = 512;
// Taken in one system call, which a signal or the end of the process can end.
constexpr std::uint64_t kPreallocatedAtOnce = 64ULL << 20;

// Zeros, there once they are written: a server of terabytes starts at once.
Mapping table(std::uint64_t bytes) {
  return Mapping::anonymous(bytes, PROT_READ | PROT_WRITE, MAP_NORESERVE);
}

}  // namespace

Slab::Slab(std::uint64_t bytes, std::uint64_t slot_bytes)
    : slot_bytes_(slot_bytes),
      slots_(bytes / slot_bytes),
      // Not reserved: memory is there once it is written, as far as the system has it then.
      mapping_(Mapping::anonymous(std::max<std::uint64_t>(slots_, 1) * slot_bytes, PROT_READ | PROT_WRITE,
                                  MAP_NORESERVE)),
      counts_(table(std::max<std::uint64_t>(slots_, 1) * sizeof(std::uint32_t))),
      domains_(table(std::max<std::uint64_t>(slots_, 1) * sizeof(std::uint16_t))) {
  if (slots_ == 0 || slots_ > kMostSlots) throw std::invalid_argument("a slab of so many slots");
  // Receiving into fresh memory was two to four times as fast with huge pages, giving it back three times; where the
  // system has none it is as before. A part of one that is given back counts as ours no longer, and is the system's
  // once it needs it.
  (void)::madvise(mapping_.data(), mapping_.size(), MADV_HUGEPAGE);
  next_ = std::make_unique_for_overwrite<Slot[]>(static_cast<std::size_t>(slots_));
}

void Slab::preallocate() {
  for (std::uint64_t at = 0; at < mapping_.size();) {
    const std::uint64_t bytes = std::min(kPreallocatedAtOnce, mapping_.size() - at);
    if (::madvise(mapping_.data() + at, static_cast<std::size_t>(bytes), abi::kMadvPopulateWrite) == 0) {
      at += bytes;
    } else if (errno == EINVAL) {
      // A kernel before 5.14. Nothing is stored yet; where memory is short, this ends by a signal, not by an error.
      for (const std::uint64_t end = at + bytes; at < end; at += system_page_size()) {
        *static_cast<volatile std::byte*>(mapping_.data() + at) = std::byte{0};
      }
    } else if (errno != EINTR && errno != EAGAIN) {
      throw_errno("madvise(MADV_POPULATE_WRITE)");
    }
  }
  preallocated_ = true;
}

void Slab::push(Stack& stack, Slot slot) {
  next_[slot] = stack.top;
  stack.top = slot;
  ++stack.size;
}

Slab::Slot Slab::pop(Stack& stack) {
  const Slot slot = stack.top;
  stack.top = next_[slot];
  --stack.size;
  return slot;
}

Slab::Slot Slab::pop_cold() {
  --cold_left_;
  return cold_.size > 0 ? pop(cold_) : static_cast<Slot>(never_used_++);
}

std::uint64_t Slab::free_locked() const {
  return warm_.size + std::min(cold_.size + (slots_ - never_used_), cold_left_);
}

void Slab::limit_cold(std::uint64_t slots) {
  const std::lock_guard lock(mutex_);
  cold_left_ = std::min(slots, kMostSlots);
}

void Slab::give_out(Slot slot, std::vector<Slot>& slots) {
  counts_of(slot).store(1, std::memory_order_relaxed);
  slots.push_back(slot);
}

std::uint64_t Slab::take(std::uint64_t wanted, std::vector<Slot>& slots) {
  const std::uint64_t taken = take_spare(wanted, slots);
  if (taken == wanted || !relief_) return taken;
  relief_(wanted - taken);
  return taken + take_spare(wanted - taken, slots);
}

std::uint64_t Slab::take_spare(std::uint64_t wanted, std::vector<Slot>& slots) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t taken = std::min(wanted, free_locked());
  slots.reserve(slots.size() + static_cast<std::size_t>(taken));  // may throw, with nothing taken yet
  for (std::uint64_t i = 0; i < taken; ++i) {
    give_out(warm_.size > 0 ? pop(warm_) : pop_cold(), slots);
  }
  return taken;
}

bool Slab::take_all(std::uint64_t wanted, std::vector<Slot>& slots) {
  if (wanted > slots_) return false;
  const std::size_t before = slots.size();
  if (take(wanted, slots) == wanted) return true;
  release(std::span(slots).subspan(before));
  slots.resize(before);
  return false;
}

bool Slab::take_all_zeroed(std::uint64_t wanted, std::vector<Slot>& slots, Relief relief) {
  if (take_zeroed(wanted, slots)) return true;
  if (relief == Relief::kNone || !relief_ || wanted > slots_) return false;
  const std::uint64_t free = free_slots();
  if (free < wanted) relief_(wanted - free);
  return take_zeroed(wanted, slots);
}

bool Slab::take_zeroed(std::uint64_t wanted, std::vector<Slot>& slots) {
  const std::size_t before = slots.size();
  std::size_t warm_from = 0;
  {
    const std::lock_guard lock(mutex_);
    if (wanted > free_locked()) return false;
    slots.reserve(before + static_cast<std::size_t>(wanted));
    const std::uint64_t cold = std::min(wanted, free_locked() - warm_.size);
    for (std::uint64_t i = 0; i < cold; ++i) give_out(pop_cold(), slots);
    warm_from = slots.size();
    for (std::uint64_t i = cold; i < wanted; ++i) give_out(pop(warm_), slots);
  }
  give_back(std::span(slots).subspan(warm_from));
  return true;
}

void Slab::pin(Slot slot) {
  // From 0 the slot would be somebody else's already. Who shares stays far below what readers have left.
  const std::uint32_t before = counts_of(slot).fetch_add(1, std::memory_order_relaxed) & ~kSettled;
  if (before == 0 || before >= kSettled - 1) std::abort();
}

void Slab::settle(std::span<const Slot> slots, std::uint16_t domain) {
  for (const Slot slot : slots) {
    domain_of(slot).store(domain, std::memory_order_relaxed);
    // Releases that, and what was written into the slot, to whoever shares it.
    counts_of(slot).fetch_or(kSettled, std::memory_order_release);
  }
}

bool Slab::share(Slot slot, std::uint16_t domain) {
  if (slot >= slots_) return false;
  std::uint32_t seen = counts_of(slot).load(std::memory_order_relaxed);
  do {
    const std::uint32_t counts = seen & ~kSettled;
    if ((seen & kSettled) == 0 || counts == 0 || counts >= kMostCounts) return false;
  } while (!counts_of(slot).compare_exchange_weak(seen, seen + 1, std::memory_order_acquire,
                                                  std::memory_order_relaxed));
  // Settled and counted, so it is one domain's for as long as we have it.
  if (domain_of(slot).load(std::memory_order_relaxed) == domain) return true;
  release(std::span(&slot, 1));
  return false;
}

bool Slab::let_go(Slot slot) {
  const std::uint32_t before = counts_of(slot).fetch_sub(1, std::memory_order_acq_rel) & ~kSettled;
  if (before == 0) std::abort();
  if (before > 1) return false;
  // Nobody shares what has no count, so nobody changes it any more.
  counts_of(slot).store(0, std::memory_order_release);
  return true;
}

void Slab::release(std::span<const Slot> slots) {
  if (slots.empty()) return;
  const std::lock_guard lock(mutex_);
  // From the back: the first of them is taken first, so neighbours stay neighbours.
  for (std::size_t i = slots.size(); i > 0; --i) {
    const Slot slot = slots[i - 1];
    if (let_go(slot)) push(warm_, slot);
  }
}

void Slab::drop(std::span<const Slot> slots) {
  if (preallocated_) return release(slots);
  std::array<Slot, kBatch> batch;
  while (!slots.empty()) {
    std::size_t count = 0;
    std::size_t seen = 0;
    for (; seen < slots.size() && count < batch.size(); ++seen) {
      if (let_go(slots[seen])) batch[count++] = slots[seen];
    }
    slots = slots.subspan(seen);
    // Before anyone can take them again.
    give_back(std::span(batch).first(count));
    const std::lock_guard lock(mutex_);
    for (std::size_t i = count; i > 0; --i) push(cold_, batch[i - 1]);
    cold_left_ = std::min(cold_left_ + count, kMostSlots);
  }
}

void Slab::give_back_free() {
  if (preallocated_) return;
  std::array<Slot, kBatch> batch;
  for (;;) {
    // Held meanwhile: slots that are in nobody's hands must not look as if the slab were full.
    const std::lock_guard lock(mutex_);
    std::size_t count = 0;
    while (count < batch.size() && warm_.size > 0) batch[count++] = pop(warm_);
    if (count == 0) return;
    give_back(std::span(batch).first(count));
    for (std::size_t i = count; i > 0; --i) push(cold_, batch[i - 1]);
    cold_left_ = std::min(cold_left_ + count, kMostSlots);
  }
}

void Slab::give_back(std::span<Slot> slots) {
  std::sort(slots.begin(), slots.end());
  for (std::size_t from = 0; from < slots.size();) {
    std::size_t end = from + 1;
    while (end < slots.size() && slots[end] == slots[end - 1] + 1) ++end;
    if (preallocated_) {
      std::memset(data(slots[from]), 0, (end - from) * slot_bytes_);
      from = end;
      continue;
    }
    // On memory of our own, not locked and in whole pages, this cannot fail; slots are taken for zeros after it.
    if (::madvise(data(slots[from]), (end - from) * slot_bytes_, MADV_DONTNEED) != 0) std::abort();
    from = end;
  }
}

std::uint64_t Slab::free_slots() const {
  const std::lock_guard lock(mutex_);
  return free_locked();
}

}  // namespace memferry
