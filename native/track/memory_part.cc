#include "track/memory_part.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "os/mapping.h"
#include "os/process_maps.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

// Private anonymous huge pages come from a file of the kernel's own; its name says so where the file is out of reach.
constexpr std::string_view kAnonymousHugePages = "/anon_hugepage";

MemoryPart classify(const MappedArea& area, const Process* owner) {
  MemoryPart part;
  part.shared = area.shared;
  part.page_bytes = system_page_size();
  if (!area.file) {
    part.kind = area.shared ? MemoryPart::Kind::kOther : MemoryPart::Kind::kPrivateAnonymous;
    return part;
  }
  part.file = BackingFile::of(area, owner);
  if (!part.file) {
    if (area.name.starts_with(kAnonymousHugePages) && !area.shared) {
      constexpr std::uint64_t kUsualHugePage = 2UL << 20;
      part.kind = MemoryPart::Kind::kHugetlb;
      part.page_bytes = kUsualHugePage;
    }
    return part;
  }
  if (part.file->kind() == BackingFile::Kind::kHugetlbfs) {
    part.kind = MemoryPart::Kind::kHugetlb;
    part.page_bytes = part.file->page_bytes();
  } else if (part.file->kind() == BackingFile::Kind::kTmpfs && area.shared) {
    part.kind = MemoryPart::Kind::kTmpfs;
  }
  return part;
}

}  // namespace

std::vector<MemoryPart> memory_parts(const Region& region) {
  std::vector<MemoryPart> parts;
  std::uint64_t first = 0;
  for (const Extent& extent : region.extents()) {
    std::uint64_t reached = extent.start.value;
    const std::uint64_t end = reached + extent.bytes;
    for_each_mapped_area([&](const MappedArea& area) {
      if (reached >= end) return false;
      if (area.end.value <= reached) return true;
      if (area.start.value > reached) return false;
      MemoryPart part = classify(area, region.owner().get());
      const std::uint64_t stop = std::min(end, area.end.value);
      part.first = PageNumber{first + (reached - extent.start.value) / region.page_size()};
      part.extent = {OwnerAddress{reached}, stop - reached};
      part.offset = area.offset + (reached - area.start.value);
      reached = stop;
      parts.push_back(std::move(part));
      return true;
    }, region.owner().get());
    if (reached < end) throw SystemError("part of the region is not mapped", ENOMEM);
    first += extent.bytes / region.page_size();
  }
  return parts;
}

std::optional<std::string> refusal_to_protect(const std::vector<MemoryPart>& parts, Writers writers) {
  for (const MemoryPart& part : parts) {
    if (part.kind == MemoryPart::Kind::kPrivateAnonymous) continue;
    if (part.kind == MemoryPart::Kind::kOther) {
      return part.shared ? "the memory is shared with a file that is not in tmpfs, or that cannot be looked at "
                           "(CAP_CHECKPOINT_RESTORE); use hash-diff"
                         : "the memory is a private mapping of a file; use hash-diff";
    }
    if (part.shared && writers != Writers::kTrackedMapping) {
      return "the memory is shared and may be written through another mapping; use hash-diff, or say that all writes "
             "go through this one";
    }
    if (part.extent.start.value % part.page_bytes != 0 || part.extent.bytes % part.page_bytes != 0) {
      return "the memory is made of huge pages, and the region does not begin and end at one";
    }
  }
  return std::nullopt;
}

// Reclaim drops a shared page's entry and the bit with it; on huge pages the kernel keeps no bit.
std::optional<std::string> refusal_of_soft_dirty(const std::vector<MemoryPart>& parts) {
  for (const MemoryPart& part : parts) {
    if (part.kind != MemoryPart::Kind::kPrivateAnonymous)
      return "the memory is not private and anonymous, where the kernel may forget what was written; use hash-diff";
  }
  return std::nullopt;
}

// The page tables are passed over without a word where nothing is mapped. MS_ASYNC does nothing at all on Linux but walk
// the mappings, and says ENOMEM when there is a gap.
void check_still_mapped(const char* tracker, Address start, std::uint64_t bytes) {
  if (bytes != 0 && ::msync(start.pointer(), bytes, MS_ASYNC) != 0) {
    throw SystemError(std::string(tracker) + ": part of the region is no longer mapped", errno);
  }
}

}  // namespace memferry
