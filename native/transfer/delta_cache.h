// What was last sent of pages, and to whom: the bytes that a later round's delta is against. Bounded by what it is
// given; shared by all threads that send rounds. Only for rounds: after the switchover every page goes out once.
//
// A page has a set of kWays places. It enters a free one, or takes the place of that page in the set whose last sending
// lies furthest back, if that was in an earlier round: pages of one round never push each other out, so a first round
// over a memory much larger than the cache fills it once and then costs nothing.
//
// An entry may be wrong without harm: the checksum is over the new pages, so the receiver notices. It goes when the page
// is sent as zeros or to somebody who takes no deltas, when the destination is told to forget it, and when it was
// refused or comes back as suspect. Sent to somebody else it becomes theirs.
//
// Threads: any; a page's calls are serialised by its set's mutex.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "page/range.h"
#include "wire/frame.h"

namespace memferry {

class DeltaCache {
 public:
  static constexpr std::size_t kWays = 4;

  // `bytes` include the tables; with less than kWays pages nothing is ever held.
  DeltaCache(std::uint64_t bytes, std::uint64_t page_size);

  void next_round() { round_.fetch_add(1, std::memory_order_relaxed); }
  // The page as it was last sent, into `base`, if that was to `to` (the server and its replica, or the destination).
  bool get(std::uint32_t region, PageNumber page, wire::Holders to, std::span<std::byte> base);
  void put(std::uint32_t region, PageNumber page, wire::Holders to, std::span<const std::byte> bytes);
  void forget(std::uint32_t region, PageRun run);
  // No more rounds: gives and takes nothing from now on. Its memory stays, since the guest may stand still meanwhile.
  void close() { open_.store(false, std::memory_order_release); }
  // The same, and lets go of the memory; by one thread.
  void end();
  [[nodiscard]] bool open() const { return open_.load(std::memory_order_acquire); }
  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  struct Entry {
    std::uint64_t key = 0;    // region << kRegionShift | page, and 1 more; 0: free
    std::uint32_t round = 0;  // of its last sending
    wire::Holders to;
  };
  static constexpr unsigned kRegionShift = 48;
  static constexpr std::size_t kMutexes = 64;
  static std::uint64_t key_of(std::uint32_t region, PageNumber page) {
    return (std::uint64_t{region} << kRegionShift | page.value) + 1;
  }
  [[nodiscard]] std::size_t set_of(std::uint64_t key) const { return static_cast<std::size_t>(key % sets_); }
  [[nodiscard]] std::mutex& mutex_of(std::size_t set) { return mutexes_[set % kMutexes]; }
  [[nodiscard]] std::byte* data(std::size_t entry) const { return bytes_.get() + entry * page_size_; }
  Entry* find(std::size_t set, std::uint64_t key);

  const std::size_t page_size_;
  const std::size_t sets_;
  std::array<std::mutex, kMutexes> mutexes_;  // of the sets in turn: guard their entries and bytes
  std::vector<Entry> entries_;
  std::unique_ptr<std::byte[]> bytes_;
  std::atomic<std::uint32_t> round_{1};
  std::atomic<std::size_t> held_{0};
  std::atomic<bool> open_;
  std::atomic<bool> allocated_;
};

}  // namespace memferry
