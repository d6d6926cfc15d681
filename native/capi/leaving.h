// What every way for a guest to leave has in common: the claims on its regions, and how pages are packed.
//
// Threads: any.
#pragma once

#include <memory>
#include <vector>

#include "page/region.h"
#include "wire/codec_choice.h"

namespace memferry::capi {

// One migration of a region at a time, as long as this is there. Throws Failure (REGION_BUSY).
class Claims {
 public:
  explicit Claims(const std::vector<std::shared_ptr<Region>>& regions);
  ~Claims() { release(); }
  Claims(const Claims&) = delete;
  Claims& operator=(const Claims&) = delete;

 private:
  void release();
  std::vector<std::shared_ptr<Region>> claimed_;
};

// "off", "auto", "lz4", "zstd"; nullptr is "off". Throws std::invalid_argument.
[[nodiscard]] wire::Compress compress_of(const char* name);

}  // namespace memferry::capi
