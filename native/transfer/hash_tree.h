// The hashes of one region's pages and of its nodes (wire::kTreeNodePages pages each), as far as somebody asked for
// them. Both sides of a comparison have one for each region; a node is hashed once.
//
// A page is copied before it is hashed, so that its two hashes are of the same bytes though the guest writes: the
// keyed one that is compared, and the XXH3 that trackers, digests and map records are about.
//
// Memory: 24 bytes for each page of a node that was hashed (rounded to pages of the system), and 16 a node.
//
// Threads: one at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "page/bitmap.h"
#include "page/keyed_hash.h"
#include "page/region_reader.h"
#include "wire/frame.h"

namespace memferry {

static_assert(std::is_same_v<KeyedHash, wire::TreeHash>);

// Nodes [first, first + count).
struct NodeRun {
  std::uint64_t first = 0;
  std::uint64_t count = 0;
  [[nodiscard]] std::uint64_t end() const { return first + count; }
};

class HashTree {
 public:
  HashTree(std::shared_ptr<Region> region, std::uint64_t pages, const KeyedHashKey& key);

  [[nodiscard]] std::uint64_t pages() const { return pages_; }
  [[nodiscard]] std::uint64_t nodes() const { return nodes_.size(); }
  [[nodiscard]] PageRun pages_of(NodeRun nodes) const;
  // The nodes that this run of pages consists of; count 0 when it is none of whole nodes inside the region.
  [[nodiscard]] NodeRun nodes_of(std::uint64_t first_page, std::uint64_t page_count) const;

  // Hashes what is not hashed yet of one node. `untouched`: pages known to be zeros, which are not read; may be
  // nullptr. The caller makes sure that the memory stays where it is meanwhile.
  void hash(std::uint64_t node, const AtomicBitmap* untouched);
  [[nodiscard]] bool hashed(std::uint64_t node) const { return hashed_[node]; }
  // A hashed node counts as not hashed any more: its memory may be another one next time.
  void forget(std::uint64_t node);

  // All of these of hashed nodes only.
  [[nodiscard]] std::span<const KeyedHash> page_hashes(PageRun run) const;
  [[nodiscard]] std::span<const KeyedHash> node_hashes(NodeRun nodes) const;
  [[nodiscard]] std::span<const std::uint64_t> xxh3(PageRun run) const;
  [[nodiscard]] bool zero(PageNumber page) const { return xxh3_[page.value] == zero_xxh3_; }

  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  void hash_piece(PageRun run);

  std::shared_ptr<Region> region_;
  const std::uint64_t pages_;
  const std::uint64_t page_size_;
  KeyedHasher hasher_;
  std::vector<std::byte> copy_;
  RegionReader reader_;
  KeyedHash zero_hash_{};
  std::uint64_t zero_xxh3_ = 0;
  std::unique_ptr<KeyedHash[]> hashes_;  // not touched before their nodes are hashed
  std::unique_ptr<std::uint64_t[]> xxh3_;
  std::vector<KeyedHash> nodes_;
  std::vector<bool> hashed_;
  std::uint64_t hashed_count_ = 0;
};

}  // namespace memferry
