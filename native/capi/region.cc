#include <string>

#include "capi/handles.h"
#include "control/failure.h"
#include "os/mapping.h"

namespace memferry::capi {

namespace {

constexpr std::size_t kMostRegions = 64;

}  // namespace

std::vector<std::shared_ptr<Region>> regions_of(memferry_region* const* regions, std::size_t count) {
  if (!regions || count == 0 || count > kMostRegions)
    throw std::invalid_argument("regions: 1 to " + std::to_string(kMostRegions));
  std::vector<std::shared_ptr<Region>> result;
  for (std::size_t i = 0; i < count; ++i) result.push_back(required(regions[i], "regions").region);
  return result;
}

std::vector<memferry_run> runs_of(const std::vector<RegionRun>& runs) {
  std::vector<memferry_run> result;
  result.reserve(runs.size());
  for (const RegionRun& run : runs) result.push_back({run.region, 0, run.run.first.value, run.run.count});
  return result;
}

void write_digest(std::uint8_t* to, const Hash128& digest) {
  std::uint8_t* const out = &required(to, "digest");
  for (unsigned i = 0; i < 8; ++i) {
    out[i] = static_cast<std::uint8_t>(digest.high >> (56 - 8 * i));
    out[8 + i] = static_cast<std::uint8_t>(digest.low >> (56 - 8 * i));
  }
}

std::chrono::milliseconds milliseconds_or(std::uint32_t given, std::uint32_t otherwise) {
  return std::chrono::milliseconds(given == 0 ? otherwise : given);
}

}  // namespace memferry::capi

using memferry::PageNumber;
using memferry::Region;
using memferry::capi::guarded;
using memferry::capi::required;
using memferry::control::Failure;

namespace {

void must_be_whole_pages(std::uint64_t value, const char* what) {
  if (value % memferry::system_page_size() != 0)
    throw Failure("REGION_UNALIGNED", std::string(what) + ": no whole pages");
}

}  // namespace

extern "C" {

uint64_t memferry_page_size(void) { return memferry::system_page_size(); }

int memferry_region_allocate(uint64_t bytes, memferry_region** region, memferry_error* error) {
  return guarded(error, [&] {
    required(region, "region") = nullptr;
    must_be_whole_pages(bytes, "bytes");
    auto made = std::make_unique<memferry_region>();
    made->region = Region::allocate(bytes);
    *region = made.release();
  });
}

int memferry_region_adopt(const memferry_extent* extents, size_t count, uint64_t capacity_bytes,
                          memferry_region** region, memferry_error* error) {
  return guarded(error, [&] {
    required(region, "region") = nullptr;
    if (!extents || count == 0) throw std::invalid_argument("extents: none");
    std::vector<memferry::Extent> all;
    for (size_t i = 0; i < count; ++i) {
      const memferry::Address start = memferry::Address::of(static_cast<std::byte*>(extents[i].start));
      must_be_whole_pages(start.value, "the start of an extent");
      must_be_whole_pages(extents[i].bytes, "the length of an extent");
      all.push_back({start, extents[i].bytes});
    }
    must_be_whole_pages(capacity_bytes, "capacity_bytes");
    auto made = std::make_unique<memferry_region>();
    const std::uint64_t last = all.back().bytes;
    made->region = Region::adopt(all, capacity_bytes == 0 ? last : capacity_bytes);
    *region = made.release();
  });
}

uint64_t memferry_region_bytes(const memferry_region* region) { return region ? region->region->bytes() : 0; }

uint64_t memferry_region_capacity(const memferry_region* region) {
  return region ? region->region->capacity_pages() * region->region->page_size() : 0;
}

void* memferry_region_page(const memferry_region* region, uint64_t page) {
  if (!region || page >= region->region->pages()) return nullptr;
  try {
    return region->region->address(PageNumber{page}).pointer();
  } catch (...) {
    return nullptr;
  }
}

int memferry_region_grow(memferry_region* region, uint64_t bytes, memferry_error* error) {
  return guarded(error, [&] {
    Region& grown = *required(region, "region").region;
    if (bytes % grown.page_size() != 0) throw Failure("REGION_UNALIGNED", "bytes: no whole pages");
    grown.grow(bytes / grown.page_size());
  });
}

int memferry_region_close(memferry_region* region, memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::refuse_in(memferry::capi::Callback::kEngine, "memferry_region_close()");
    if (!region) return;
    region->region->retire();
    delete region;
  });
}

}  // extern "C"
