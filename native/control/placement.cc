#include "control/placement.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "control/failure.h"

namespace memferry::control {

namespace {

constexpr std::uint64_t kIndexBytesPerPage = 16;
// Of a server's free memory, at most this part is planned for.
constexpr double kHeadroom = 0.9;

// Copies of pages that all of them together can hold, no server two of one page. As many bytes as that JavaScript counts
// exactly, so in the same numbers.
bool holds(const PlacementNeed& need, const std::vector<std::uint64_t>& free_bytes) {
  if (free_bytes.size() < need.replicas) return false;
  const auto bytes = static_cast<double>(need.bytes);
  // Whole at every server, whatever its place in the list: Image::create takes it.
  const auto index = static_cast<double>(need.index_pages * kIndexBytesPerPage);
  double copies = 0;
  for (const std::uint64_t free : free_bytes) {
    const double room = std::floor(static_cast<double>(free) * kHeadroom) - index;
    if (room < 0) return false;
    copies += need.replicas == 2 ? std::min(room, bytes) : room;
  }
  return copies >= bytes * need.replicas;
}

}  // namespace

std::uint64_t index_pages(std::uint64_t capacity_pages, std::uint64_t page_size) {
  const std::uint64_t in_slot = page_size / kIndexBytesPerPage;
  return (capacity_pages + in_slot - 1) / in_slot * in_slot;
}

void must_hold(const PlacementNeed& need, const std::vector<std::uint64_t>& free_bytes) {
  if (holds(need, free_bytes)) return;
  std::uint64_t free = 0;
  for (const std::uint64_t each : free_bytes) free += each;
  const std::string copies = need.replicas == 2 ? "twice, at two servers each, " : "";
  throw Failure("VMD_CAPACITY", "the guest's " + std::to_string(need.bytes) + " bytes " + copies +
                                    "and its index of " +
                                    std::to_string(need.index_pages * kIndexBytesPerPage) +
                                    " bytes at each server do not fit into " +
                                    std::to_string(free_bytes.size()) + " VMD servers with " +
                                    std::to_string(free) + " bytes free, of which 90 % may be planned for");
}

}  // namespace memferry::control
