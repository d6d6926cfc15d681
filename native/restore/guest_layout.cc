#include "restore/guest_layout.h"

#include <bit>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "os/mapping.h"

namespace memferry {

GuestLayout::GuestLayout(std::vector<RestoreSpan> spans, std::uint64_t page_size)
    : spans_(std::move(spans)), page_size_(page_size) {
  if (!std::has_single_bit(page_size) || page_size < system_page_size())
    throw std::invalid_argument("page size " + std::to_string(page_size) + ": not one of the system's");
  if (spans_.empty()) throw std::invalid_argument("no mapping");
  by_address_.resize(spans_.size());
  std::iota(by_address_.begin(), by_address_.end(), std::size_t{0});
  std::sort(by_address_.begin(), by_address_.end(),
            [this](std::size_t a, std::size_t b) { return spans_[a].at < spans_[b].at; });
  std::uint64_t end = 0;
  for (const std::size_t i : by_address_) {
    const RestoreSpan& span = spans_[i];
    if (span.bytes == 0) throw std::invalid_argument("a mapping of no bytes");
    if (span.at.value % page_size != 0 || span.bytes % page_size != 0)
      throw std::invalid_argument("a mapping that is not aligned to its pages");
    if (span.bytes > std::numeric_limits<std::uint64_t>::max() - span.at.value)
      throw std::invalid_argument("a mapping beyond the address space");
    if (span.at.value < end) throw std::invalid_argument("mappings that overlap");
    end = span.at.value + span.bytes;
  }
  for (const RestoreSpan& span : spans_) {
    first_page_.push_back(pages_);
    pages_ += span.bytes / page_size;
  }
}

std::optional<PageNumber> GuestLayout::page_at(OwnerAddress address) const {
  const auto after =
      std::upper_bound(by_address_.begin(), by_address_.end(), address,
                       [this](OwnerAddress wanted, std::size_t index) { return wanted < spans_[index].at; });
  if (after == by_address_.begin()) return std::nullopt;
  const std::size_t index = *(after - 1);
  const std::uint64_t offset = address.value - spans_[index].at.value;
  if (offset >= spans_[index].bytes) return std::nullopt;
  return PageNumber{first_page_[index] + offset / page_size_};
}

GuestLayout::Piece GuestLayout::piece(PageRun run) const {
  if (run.first.value >= pages_ || run.count == 0)
    throw std::out_of_range("a page beyond the guest's memory");
  const auto after = std::upper_bound(first_page_.begin(), first_page_.end(), run.first.value);
  const auto index = static_cast<std::size_t>(after - first_page_.begin()) - 1;
  const RestoreSpan& span = spans_[index];
  const std::uint64_t skipped = run.first.value - first_page_[index];
  const std::uint64_t offset = skipped * page_size_;
  return {{run.first, std::min(run.count, span.bytes / page_size_ - skipped)},
          span.at.plus(offset),
          span.from + offset};
}

}  // namespace memferry
