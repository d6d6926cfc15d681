#include "page/region_reader.h"

namespace memferry {

std::span<const std::byte> RegionReader::copy(const Region& region, PageRun run) {
  const PageRun part = region.contiguous_run(run);
  if (used_ == copies_.size()) copies_.emplace_back();
  std::vector<std::byte>& into = copies_[used_++];
  const auto bytes = static_cast<std::size_t>(part.count * region.page_size());
  if (into.size() < bytes) into.resize(bytes);
  if (region.remote()) {
    region.owner()->read(region.owner_address(part.first), std::span(into).first(bytes));
  } else {
    region.read_file(part, std::span(into).first(bytes));
  }
  return std::span(into).first(bytes);
}

std::uint64_t RegionReader::memory_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& each : copies_) bytes += each.capacity();
  return bytes;
}

}  // namespace memferry
