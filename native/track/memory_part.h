// What kind of memory a region consists of, part by part: that decides which trackers may watch it, and how.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "os/backing_file.h"
#include "page/region.h"
#include "track/dirty_tracker.h"

namespace memferry {

struct MemoryPart {
  enum class Kind {
    kPrivateAnonymous,
    kTmpfs,    // shared: a memfd, a file in tmpfs, shared anonymous memory
    kHugetlb,  // huge pages that were reserved, private or shared
    kOther     // files, private mappings of files, shared memory whose file cannot be reached
  };
  PageNumber first;  // of the region
  Extent extent;
  Kind kind = Kind::kOther;
  bool shared = false;
  std::uint64_t page_bytes = 0;     // what the kernel maps and protects at a time, at least
  std::optional<BackingFile> file;  // kTmpfs always, kHugetlb when it can be reached
  std::uint64_t offset = 0;         // of the extent in it
};

// As it is mapped now, all of it, in the region's order. Throws SystemError (ENOMEM when part of it is not mapped).
[[nodiscard]] std::vector<MemoryPart> memory_parts(const Region& region);

// Why write protection, or soft-dirty, may not be trusted with this memory; nothing when it may.
[[nodiscard]] std::optional<std::string> refusal_to_protect(const std::vector<MemoryPart>& parts, Writers writers);
[[nodiscard]] std::optional<std::string> refusal_of_soft_dirty(const std::vector<MemoryPart>& parts);

// Throws SystemError (ENOMEM) when there is a gap: about a microsecond.
void check_still_mapped(const char* tracker, Address start, std::uint64_t bytes);

}  // namespace memferry
