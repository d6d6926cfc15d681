#include "page/page_starts.h"

#include <span>

#include "page/zero.h"

namespace memferry {

void PageStarts::visit_zero(const Region& region, PageRun run, const std::function<void(PageNumber)>& visit) {
  if (region.huge_page_bytes() != 0) return visit_zero_in_file(region, run, visit);
  const bool copied = region.remote() || region.may_shrink();  // of another process
  at_.clear();
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    if (copied) {
      const auto address = static_cast<std::uintptr_t>(region.owner_address(page).value);
      at_.push_back({reinterpret_cast<void*>(address), kBytes});
    } else {
      visit(page);
    }
  }
  starts_.resize(at_.size() * kBytes);
  for (std::size_t first = 0; first < at_.size();) {
    const std::size_t read = this->read(region, first);
    for (std::size_t i = first; i < first + read; ++i) {
      if (is_zero(std::span(starts_).subspan(i * kBytes, kBytes))) visit({run.first.value + i});
    }
    first += read;
    // Whoever reads it whole finds out why.
    if (first < at_.size()) visit({run.first.value + first++});
  }
}

// A huge page that is not there would be taken for a look at its owner's addresses.
void PageStarts::visit_zero_in_file(const Region& region, PageRun run,
                                    const std::function<void(PageNumber)>& visit) {
  starts_.resize(kBytes);
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    region.read_file({page, 1}, starts_);
    if (is_zero(starts_)) visit(page);
  }
}

std::size_t PageStarts::read(const Region& region, std::size_t first) {
  const std::span<const iovec> from = std::span(at_).subspan(first);
  const std::span<std::byte> into = std::span(starts_).subspan(first * kBytes);
  return region.owner()->read_each(from, into) / kBytes;
}

}  // namespace memferry
