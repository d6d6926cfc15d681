#include "fault/location_map.h"

namespace memferry {
namespace {

constexpr std::uint16_t kNobody = 0xffff;

}  // namespace

LocationMap::LocationMap(std::uint64_t capacity_pages)
    : holders_(
          Mapping::anonymous(capacity_pages * sizeof(std::uint16_t), PROT_READ | PROT_WRITE, MAP_NORESERVE)),
      hashes_(Mapping::anonymous(capacity_pages * sizeof(std::uint64_t), PROT_READ | PROT_WRITE,
                                 MAP_NORESERVE)) {}

std::uint16_t& LocationMap::holder_word(PageNumber page) const {
  return reinterpret_cast<std::uint16_t*>(holders_.data())[page.value];
}

std::uint64_t& LocationMap::hash_word(PageNumber page) const {
  return reinterpret_cast<std::uint64_t*>(hashes_.data())[page.value];
}

void LocationMap::put(PageNumber page, wire::Holders holders, std::uint64_t hash) {
  const auto packed = static_cast<std::uint16_t>(static_cast<std::uint16_t>(holders.tag()) ^ kNobody);
  std::atomic_ref(hash_word(page)).store(hash, std::memory_order_relaxed);
  std::atomic_ref(holder_word(page)).store(packed, std::memory_order_release);
}

wire::Holders LocationMap::holders(PageNumber page) const {
  const std::uint16_t packed = std::atomic_ref(holder_word(page)).load(std::memory_order_acquire);
  return wire::Holders::of(static_cast<std::uint16_t>(packed ^ kNobody));
}

std::uint64_t LocationMap::hash(PageNumber page) const {
  return std::atomic_ref(hash_word(page)).load(std::memory_order_relaxed);
}

void LocationMap::drop_holder(PageNumber page, std::uint8_t ordinal) {
  wire::Holders now = holders(page);
  if (!now.has(ordinal)) return;
  const std::uint8_t other = now.first == ordinal ? now.second : now.first;
  put(page, {other, wire::Holders::kNobody}, hash(page));
}

}  // namespace memferry
