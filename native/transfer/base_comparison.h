// The source's side of a comparison with the destination's base: which pages does it have already, as they are here?
//
//   choose()   which nodes: a few of them, evenly spread, or all that are left
//   ask        kTreeRequest; the destination hashes while this side hashes its own
//   find       nodes that differ are asked for again page by page; equal pages are told by kSame
//
// An estimate counts equal pages and tells of none: a base that a log is still to be applied to changes.
//
// Why a guest that writes meanwhile loses nothing: its tracker is armed before the first page is hashed. Let a page be
// confirmed by the bytes that were read of it, perhaps a mixture of old and new. If it was written after arm(), by
// the contract of trackers the next collect() has it, and it is sent or discarded again like any page written after
// it was sent. If it was not, nothing changed while it was read, and the bytes are the page. A tracker that compares
// content is told the XXH3 of exactly these bytes, as if they had been sent.
//
// Threads: the channel's sending thread compares; its reading thread brings the answers (answered()).
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "transfer/events.h"
#include "transfer/hash_tree.h"
#include "wire/frame.h"

namespace memferry {

// How far a comparison goes: by nodes first and of all of them; page by page, of a few; the same, and nothing of it
// counts on either side afterwards.
enum class CompareDepth : std::uint8_t { kAll, kSample, kEstimate };

struct BaseStats {
  std::uint64_t pages_compared = 0;
  std::uint64_t pages_same = 0;
  std::uint64_t bytes_same = 0;       // of those with content
  std::uint64_t pages_estimated = 0;  // by estimates, and how many of them were equal
  std::uint64_t pages_alike = 0;
  std::uint64_t bytes_out = 0;  // requests and lists; also in bytes_on_wire
  std::uint64_t bytes_in = 0;   // the destination's hashes
  std::uint64_t round_trips = 0;
  std::uint64_t source_hash_us = 0;  // CPU time of the comparing thread
  std::uint64_t destination_hash_us = 0;
  std::uint64_t memory_bytes = 0;  // peak
};

class BaseComparison {
 public:
  using Clock = std::chrono::steady_clock;

  // What it needs of the sender. `say` writes to the channel; false: the connection is over. `go_on` is asked often.
  struct Way {
    std::function<bool(std::span<const std::byte>)> say;
    std::function<bool()> go_on;
    // Hashing touches the regions; false: they are gone.
    std::function<bool(const std::function<void()>&)> touching;
    // A run that the base has, with the hashes of its pages.
    std::function<void(std::uint32_t region, PageRun run, std::span<const std::uint64_t> xxh3)> same;
    std::function<void(std::string)> cut;
  };

  // `base_pages`: one a region, how many pages of it the destination has; 0 for none.
  BaseComparison(std::vector<std::shared_ptr<Region>> regions, std::vector<std::uint64_t> base_pages,
                 const KeyedHashKey& key, std::chrono::milliseconds answer_timeout);

  // Compares at most `most_nodes` of those that were not compared yet. `untouched` as HashTree::hash() has it, one a region. False when the connection is over.
  bool run(std::uint64_t most_nodes, CompareDepth depth, const std::vector<const AtomicBitmap*>& untouched,
           const Way& way);

  // A kTree frame. Empty, or what the destination did wrong.
  std::string answered(const wire::FrameHeader& header, std::span<const std::byte> payload);
  void wake();     // go_on may give something else now
  void release();  // no run() follows: the hashes may go

  [[nodiscard]] BaseStats stats() const;

 private:
  struct Asked {
    std::uint32_t region = 0;
    std::uint64_t level = 0;
    NodeRun nodes;
    std::uint64_t answered_pages = 0;  // guarded by mutex_
    std::vector<KeyedHash> hashes;     // likewise, until all is answered
  };
  bool compare(std::uint64_t most_nodes, CompareDepth depth,
               const std::vector<const AtomicBitmap*>& untouched, const Way& way);
  std::vector<Asked> choose(std::uint64_t most_nodes) const;
  bool ask(std::vector<Asked>& asked, std::uint64_t level, const Way& way);
  bool hash_own(const std::vector<Asked>& asked, const std::vector<const AtomicBitmap*>& untouched,
                const Way& way);
  bool wait(const Way& way);
  void estimate(const Asked& asked);
  void compare_pages(const Asked& asked, std::vector<RegionRun>& same);
  void compare_nodes(const Asked& asked, std::vector<RegionRun>& same, std::vector<Asked>& differ);
  bool tell(const std::vector<RegionRun>& same, const Way& way);

  const std::vector<std::shared_ptr<Region>> regions_;
  const std::vector<std::uint64_t> base_pages_;
  const KeyedHashKey key_;
  const std::chrono::milliseconds answer_timeout_;
  const std::uint64_t page_size_;
  std::vector<std::unique_ptr<HashTree>> trees_;  // made by the first run()
  std::vector<std::vector<bool>> compared_;       // nodes

  mutable std::mutex mutex_;  // guards everything below
  std::condition_variable changed_;
  std::deque<Asked*> outstanding_;  // in the order of their requests; they live in compare()
  Clock::time_point heard_at_{};
  BaseStats stats_;
};

}  // namespace memferry
