// Where a guest's memory lies at its owner's, and where each page's content is here: mappings of one page size, their
// pages numbered as one sequence in the order of the mappings.
//
// Threads: any; it never changes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "os/address.h"
#include "page/range.h"

namespace memferry {

struct RestoreSpan {
  OwnerAddress at;
  std::uint64_t bytes = 0;
  const std::byte* from = nullptr;  // of `bytes` bytes in this process
};

class GuestLayout {
 public:
  // Throws std::invalid_argument: no mapping; one that is empty, not aligned, overlaps another, or goes beyond the
  // address space; a page size that is no power of two of at least the system's.
  GuestLayout(std::vector<RestoreSpan> spans, std::uint64_t page_size);

  [[nodiscard]] std::uint64_t page_size() const { return page_size_; }
  [[nodiscard]] std::uint64_t pages() const { return pages_; }
  [[nodiscard]] const std::vector<RestoreSpan>& spans() const { return spans_; }
  [[nodiscard]] std::optional<PageNumber> page_at(OwnerAddress address) const;
  // The part of `run`, from its first page on, that lies in one mapping. The page must exist.
  struct Piece {
    PageRun run;
    OwnerAddress at;
    const std::byte* from = nullptr;
  };
  [[nodiscard]] Piece piece(PageRun run) const;
  // Visits the pages that lie in [start, end) whole, mapping by mapping; what is outside of all is left out.
  template <typename Visit>
  void for_each_run(OwnerAddress start, OwnerAddress end, Visit visit) const {
    for (std::size_t i = 0; i < spans_.size(); ++i) {
      const std::uint64_t from = std::max(start.value, spans_[i].at.value);
      const std::uint64_t to = std::min(end.value, spans_[i].at.value + spans_[i].bytes);
      if (from >= to) continue;
      const std::uint64_t first = (from - spans_[i].at.value + page_size_ - 1) / page_size_;
      const std::uint64_t last = (to - spans_[i].at.value) / page_size_;
      if (first < last) visit(PageRun{PageNumber{first_page_[i] + first}, last - first});
    }
  }

 private:
  std::vector<RestoreSpan> spans_;
  std::vector<std::uint64_t> first_page_;  // of each span
  std::vector<std::size_t> by_address_;    // indices of spans_
  std::uint64_t page_size_;
  std::uint64_t pages_ = 0;
};

}  // namespace memferry
