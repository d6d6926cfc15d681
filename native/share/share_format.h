// The file of a page share: groups of slots, each an index block of one page and the pages of its entries.
//
//   page 0      ShareHeader
//   group g     page 1 + g * (1 + entries a group): index block, ShareEntry each; then one page a slot
//
// The writer may die, shorten the file or write nonsense at any time; a reader believes nothing but a page whose
// HMAC it has computed itself. So there are no locks and no checksums here.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

#include "page/content_hash.h"

namespace memferry::share {

inline constexpr std::array<char, 8> kMagic = {'M', 'F', 'S', 'H', 'A', 'R', 'E', '1'};
inline constexpr std::uint32_t kVersion = 1;

// No secrets: `check` is an HMAC of a constant under the domain's key.
struct ShareHeader {
  std::array<char, 8> magic;
  std::uint32_t version;
  std::uint32_t page_size;
  ContentDigest check;
};
static_assert(sizeof(ShareHeader) == 48);

struct ShareEntry {
  ContentDigest digest;
  double score;
  std::uint64_t used;  // 0: nothing
};
static_assert(sizeof(ShareEntry) == 48);

// The check of a domain's share files.
[[nodiscard]] ContentDigest check_of(const ContentHasher& hasher);

// Which bytes of the file belong to a slot.
class ShareLayout {
 public:
  // 64 GiB of pages of 4 KiB: a bound for whoever reads a file that claims to be longer.
  static constexpr std::uint64_t kMostSlots = 1ULL << 24;

  explicit ShareLayout(std::uint64_t page_size)
      : page_size_(page_size), group_slots_(page_size / sizeof(ShareEntry)) {}
  [[nodiscard]] std::uint64_t page_size() const { return page_size_; }
  [[nodiscard]] std::uint64_t group_slots() const { return group_slots_; }
  [[nodiscard]] std::uint64_t group_of(std::uint64_t slot) const { return slot / group_slots_; }
  [[nodiscard]] std::uint64_t index_offset(std::uint64_t group) const {
    return (1 + group * (1 + group_slots_)) * page_size_;
  }
  [[nodiscard]] std::uint64_t entry_offset(std::uint64_t slot) const {
    return index_offset(group_of(slot)) + slot % group_slots_ * sizeof(ShareEntry);
  }
  [[nodiscard]] std::uint64_t page_offset(std::uint64_t slot) const {
    return index_offset(group_of(slot)) + (1 + slot % group_slots_) * page_size_;
  }
  // Groups that a file of so many bytes may have, the last one perhaps in part.
  [[nodiscard]] std::uint64_t groups_in(std::uint64_t file_bytes) const {
    const std::uint64_t pages = file_bytes / page_size_;
    const std::uint64_t groups = pages <= 1 ? 0 : (pages - 1 + group_slots_) / (1 + group_slots_);
    const std::uint64_t most = kMostSlots / group_slots_;
    return groups < most ? groups : most;
  }

 private:
  std::uint64_t page_size_;
  std::uint64_t group_slots_;
};

}  // namespace memferry::share
