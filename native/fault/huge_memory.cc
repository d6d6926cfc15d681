#include "fault/huge_memory.h"

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "fault/discard.h"
#include "os/kernel_abi.h"
#include "os/sys_error.h"
#include "os/userfaultfd.h"
#include "track/memory_part.h"

namespace memferry {
namespace {

constexpr std::uint64_t kFeatures = UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS;

[[noreturn]] void refuse(const std::string& why) {
  throw SystemError("page: the region's memory is made of reserved huge pages, " + why +
                        "; use a mode without paging (stop-and-copy, or pre-copy that does not fall back to "
                        "post-copy)",
                    EOPNOTSUPP);
}

// Whether any of it is of huge pages, whatever file is behind them.
bool any_huge(const Region& region) {
  std::ifstream smaps("/proc/self/smaps");
  if (!smaps) throw SystemError("open(/proc/self/smaps)", errno);
  bool inside = false;
  for (std::string line; std::getline(smaps, line);) {
    std::uint64_t low = 0;
    std::uint64_t high = 0;
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " ", &low, &high) == 2) {
      const std::vector<Extent> extents = region.extents();
      inside = std::any_of(extents.begin(), extents.end(), [&](const Extent& extent) {
        return low < extent.start.value + extent.bytes && extent.start.value < high;
      });
    } else if (inside && line.starts_with("VmFlags:") && (line + " ").find(" ht ") != std::string::npos) {
      return true;
    }
  }
  if (smaps.bad()) throw SystemError("read(/proc/self/smaps)", ENOMEM);
  return false;
}

struct Kind {
  std::uint64_t bytes = 0;  // of a huge page; 0: it has none
  bool shared = true;
};

void check_paged(const Kind& kind) {
  if (kind.bytes > HugeMemory::kLargestBytes)
    refuse("of " + std::to_string(kind.bytes >> 20U) + " MiB: those that are paged into have 2 MiB at most");
  if ((Userfaultfd::probe().features & kFeatures) != kFeatures)
    refuse("which this kernel does not page (Linux 5.18 does)");
}

// Throws what HugeMemory::of() throws. What is attached has been looked at then, and is the same still
// (Region::check_attached).
Kind kind_of(const Region& region) {
  Kind kind;
  if (region.owner()) {
    kind.bytes = region.huge_page_bytes();
    if (kind.bytes != 0) check_paged(kind);
    return kind;
  }
  const std::vector<MemoryPart> parts = memory_parts(region);
  for (const MemoryPart& part : parts) {
    if (part.kind == MemoryPart::Kind::kHugetlb) {
      kind = {part.page_bytes, part.shared};
    } else if (part.kind == MemoryPart::Kind::kOther && !part.file && any_huge(region)) {
      refuse("and the file behind them cannot be reached (CAP_CHECKPOINT_RESTORE, or a descriptor of it)");
    }
  }
  if (kind.bytes == 0) return kind;
  for (const MemoryPart& part : parts) {
    if (part.kind != MemoryPart::Kind::kHugetlb || part.page_bytes != kind.bytes ||
        part.shared != kind.shared)
      refuse("and of other pages beside them");
  }
  if (!kind.shared) (void)backing_of(region);  // of a file, or of a size that cannot be told: refused there
  for (const auto& extents : {region.extents(), region.capacity_extents()}) {
    for (const Extent& extent : extents) {
      if (extent.start.value % kind.bytes != 0 || extent.bytes % kind.bytes != 0)
        refuse("and does not begin and end at one");
    }
  }
  check_paged(kind);
  return kind;
}

}  // namespace

std::unique_ptr<HugeMemory> HugeMemory::of(ArrivalMap& map) {
  const Kind kind = kind_of(map.region());
  if (kind.bytes == 0 || kind.bytes == map.page_size()) return nullptr;
  return std::unique_ptr<HugeMemory>(new HugeMemory(map, kind.bytes, kind.shared));
}

void HugeMemory::check(std::span<const std::shared_ptr<Region>> regions) {
  std::uint64_t staged = 0;
  for (const auto& region : regions) {
    const Kind kind = kind_of(*region);
    if (kind.bytes != 0 && !kind.shared) staged += region->capacity_pages() * region->page_size();
  }
  if (staged > kMostStagedBytes) {
    refuse("privately mapped, and more than " + std::to_string(kMostStagedBytes >> 20U) +
           " MiB: as much memory again could be needed for those that have come in part; map them shared (a "
           "memfd "
           "with MFD_HUGETLB, a file in hugetlbfs)");
  }
}

HugeMemory::HugeMemory(ArrivalMap& map, std::uint64_t unit_bytes, bool shared)
    : map_(map),
      unit_pages_(unit_bytes / map.page_size()),
      shared_(shared),
      place_(HugePlace::of(map, unit_bytes, shared)),
      landed_(map.region().capacity_pages()),
      stale_(map.region().capacity_pages() / unit_pages_),
      content_(map.region().capacity_pages() / unit_pages_),
      failed_(map.region().capacity_pages() / unit_pages_) {}

void HugeMemory::open() {
  const Kind kind = kind_of(map_.region());
  if (kind.bytes != unit_bytes() || kind.shared != shared_) refuse("which have changed");
  place_->open();
  PageRun out{PageNumber{0}, 0};
  for (PageNumber at{0}; at.value < map_.pages(); at.value += unit_pages_) {
    const PageRun each = unit(at);
    if (map_.present.count(each) > 0) content_.set(index(at));
    for (PageNumber from = at;;) {
      const auto here = map_.received.next_set(from, each.end(), each.count);
      if (!here) break;
      landed_.set_run(*here);
      from = here->end();
    }
    if (whole(at)) continue;
    // Not to be read here until all of it has come, neither by the guest nor by who looks for content.
    if (map_.present.clear_run(each) > 0) stale_.set(index(at));
    if (out.end() == at) {
      out.count += each.count;
      continue;
    }
    unmap(out);
    out = each;
  }
  unmap(out);
  place_->reserve();
}

void HugeMemory::unmap(PageRun run) {
  const std::unique_lock alone(writing_);
  const std::optional<PageNumber> gone = place_->take_back(run);
  if (!gone) return;
  // Somebody else has taken its memory meanwhile.
  map_.received.clear_run(unit(*gone));
  landed_.clear_run(unit(*gone));
  throw SystemError("no memory for a huge page", ENOMEM);
}

bool HugeMemory::write(PageRun run, const std::byte* bytes) {
  const std::shared_lock writing(writing_);
  if (!populate(run.first)) return false;
  content_.set(index(run.first));
  std::memcpy(place_->at(run.first), bytes, static_cast<std::size_t>(run.count * map_.page_size()));
  return true;
}

bool HugeMemory::write_zeros(PageRun run) {
  const std::shared_lock writing(writing_);
  if (!stale_.test(index(run.first))) return true;
  if (!populate(run.first)) return false;
  std::memset(place_->at(run.first), 0, static_cast<std::size_t>(run.count * map_.page_size()));
  return true;
}

// Of two that land at once one sees both.
bool HugeMemory::land(PageRun run) {
  const std::lock_guard lock(mapping_);
  landed_.set_run(run);
  return whole(run.first);
}

void HugeMemory::forget(PageRun run) {
  for (PageRun left = run; left.count > 0;) {
    const PageRun all = unit(left.first);
    const PageRun part{left.first, std::min(left.count, all.end().value - left.first.value)};
    left = {part.end(), left.count - part.count};
    const std::lock_guard lock(mapping_);
    landed_.clear_run(part);
    stale_.set(index(part.first));
    map_.present.clear_run(all);
    unmap(all);
  }
}

}  // namespace memferry
