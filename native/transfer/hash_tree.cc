#include "transfer/hash_tree.h"

#include <algorithm>
#include <stdexcept>

#include "page/hash.h"
#include "page/racy_read.h"

namespace memferry {
namespace {

// Copied and hashed twice from the second-level cache.
constexpr std::uint64_t kPieceBytes = 128 * 1024;

}  // namespace

HashTree::HashTree(std::shared_ptr<Region> region, std::uint64_t pages, const KeyedHashKey& key)
    : region_(std::move(region)),
      pages_(pages),
      page_size_(region_->page_size()),
      hasher_(key),
      copy_(std::max(kPieceBytes, page_size_)),
      hashes_(new KeyedHash[pages]),
      xxh3_(new std::uint64_t[pages]),
      nodes_(wire::tree_nodes(pages)),
      hashed_(wire::tree_nodes(pages)) {
  const std::span<const std::byte> zeros(copy_.data(), page_size_);
  hasher_.pages(zeros, page_size_, &zero_hash_);
  zero_xxh3_ = xxh3_64(zeros);
}

PageRun HashTree::pages_of(NodeRun nodes) const {
  const std::uint64_t first = nodes.first * wire::kTreeNodePages;
  return {PageNumber{first}, std::min(nodes.end() * wire::kTreeNodePages, pages_) - first};
}

NodeRun HashTree::nodes_of(std::uint64_t first_page, std::uint64_t page_count) const {
  if (!wire::run_inside(first_page, page_count, pages_)) return {};
  const std::uint64_t end = first_page + page_count;
  if (first_page % wire::kTreeNodePages != 0 || (end % wire::kTreeNodePages != 0 && end != pages_)) return {};
  return {first_page / wire::kTreeNodePages, wire::tree_nodes(page_count)};
}

void HashTree::hash(std::uint64_t node, const AtomicBitmap* untouched) {
  if (hashed_.at(node)) return;
  const PageRun run = pages_of({node, 1});
  for (PageNumber at = run.first; at < run.end();) {
    const auto zeros = untouched == nullptr ? std::nullopt : untouched->next_set(at, run.end(), run.count);
    const PageNumber read_to = zeros ? zeros->first : run.end();
    while (at < read_to) {
      const std::uint64_t most = copy_.size() / page_size_;
      const PageRun piece{at, std::min(most, read_to.value - at.value)};
      const std::uint64_t got = region_->contiguous_run(piece).count;
      hash_piece({at, got});
      at = PageNumber{at.value + got};
    }
    if (!zeros) break;
    std::fill_n(&hashes_[zeros->first.value], zeros->count, zero_hash_);
    std::fill_n(&xxh3_[zeros->first.value], zeros->count, zero_xxh3_);
    at = zeros->end();
  }
  nodes_[node] = hasher_.node({&hashes_[run.first.value], run.count});
  hashed_[node] = true;
  ++hashed_count_;
}

void HashTree::forget(std::uint64_t node) {
  if (!hashed_.at(node)) return;
  hashed_[node] = false;
  --hashed_count_;
}

void HashTree::hash_piece(PageRun run) {
  reader_.reset();
  const std::span<const std::byte> memory = reader_.read(*region_, run);
  racy_copy(copy_.data(), memory.data(), memory.size());
  const std::span<const std::byte> bytes(copy_.data(), memory.size());
  hasher_.pages(bytes, page_size_, &hashes_[run.first.value]);
  hash_pages(bytes, page_size_, &xxh3_[run.first.value]);
}

std::span<const KeyedHash> HashTree::page_hashes(PageRun run) const {
  return {&hashes_[run.first.value], static_cast<std::size_t>(run.count)};
}

std::span<const KeyedHash> HashTree::node_hashes(NodeRun nodes) const {
  return std::span(nodes_).subspan(nodes.first, nodes.count);
}

std::span<const std::uint64_t> HashTree::xxh3(PageRun run) const {
  return {&xxh3_[run.first.value], static_cast<std::size_t>(run.count)};
}

std::uint64_t HashTree::memory_bytes() const {
  const std::uint64_t pages = std::min(pages_, hashed_count_ * wire::kTreeNodePages);
  return pages * (sizeof(KeyedHash) + sizeof(std::uint64_t)) + nodes_.size() * sizeof(KeyedHash);
}

}  // namespace memferry
