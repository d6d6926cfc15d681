#include "capi/leaving.h"

#include <stdexcept>
#include <string_view>

#include "control/failure.h"

namespace memferry::capi {

Claims::Claims(const std::vector<std::shared_ptr<Region>>& regions) {
  // Nothing may fail between a claim and its place in the list.
  claimed_.reserve(regions.size());
  for (const auto& region : regions) {
    if (!region->claim()) {
      release();
      throw control::Failure("REGION_BUSY", "a region is moving already");
    }
    claimed_.push_back(region);
  }
}

void Claims::release() {
  for (const auto& region : claimed_) region->release();
  claimed_.clear();
}

wire::Compress compress_of(const char* name) {
  const std::string_view choice = name ? name : "off";
  if (choice == "off") return wire::Compress::kOff;
  if (choice == "auto") return wire::Compress::kAuto;
  if (choice == "lz4") return wire::Compress::kLz4;
  if (choice == "zstd") return wire::Compress::kZstd;
  throw std::invalid_argument("compress: off, auto, lz4 or zstd");
}

}  // namespace memferry::capi
