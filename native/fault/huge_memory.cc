#include "fault/huge_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>

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

// The size of its huge pages, 0 for none.
std::uint64_t huge_page_bytes(const Region& region, const std::vector<MemoryPart>& parts) {
  std::uint64_t bytes = 0;
  for (const MemoryPart& part : parts) {
    if (part.kind == MemoryPart::Kind::kHugetlb) bytes = part.page_bytes;
    if (part.kind == MemoryPart::Kind::kOther && !part.file && any_huge(region))
      refuse("and the file behind them cannot be reached (CAP_CHECKPOINT_RESTORE, or a descriptor of it)");
  }
  if (bytes == 0) return 0;
  for (const MemoryPart& part : parts) {
    if (part.kind != MemoryPart::Kind::kHugetlb || part.page_bytes != bytes)
      refuse("and of other pages beside them");
    if (!part.shared)
      refuse("privately mapped: only shared ones (a memfd, a file in hugetlbfs) can be paged into");
  }
  if (bytes > HugeMemory::kLargestBytes)
    refuse("of " + std::to_string(bytes >> 20U) + " MiB: those that are paged into have 2 MiB at most");
  for (const auto& extents : {region.extents(), region.capacity_extents()}) {
    for (const Extent& extent : extents) {
      if (extent.start.value % bytes != 0 || extent.bytes % bytes != 0)
        refuse("and does not begin and end at one");
    }
  }
  if ((Userfaultfd::probe().features & kFeatures) != kFeatures)
    refuse("which this kernel does not page (Linux 5.18 does)");
  return bytes;
}

}  // namespace

std::unique_ptr<HugeMemory> HugeMemory::of(ArrivalMap& map) {
  // Where another process owns it, attaching refuses huge pages.
  if (map.region().owner()) return nullptr;
  const std::uint64_t bytes = huge_page_bytes(map.region(), memory_parts(map.region()));
  if (bytes == 0 || bytes == map.page_size()) return nullptr;
  return std::unique_ptr<HugeMemory>(new HugeMemory(map, bytes));
}

void HugeMemory::check(const Region& region) {
  if (!region.owner()) (void)huge_page_bytes(region, memory_parts(region));
}

HugeMemory::HugeMemory(ArrivalMap& map, std::uint64_t unit_bytes)
    : map_(map),
      unit_pages_(unit_bytes / map.page_size()),
      landed_(map.region().capacity_pages()),
      stale_(map.region().capacity_pages() / unit_pages_),
      content_(map.region().capacity_pages() / unit_pages_),
      failed_(map.region().capacity_pages() / unit_pages_) {}

void HugeMemory::open() {
  const std::vector<MemoryPart> all = memory_parts(map_.region());
  if (huge_page_bytes(map_.region(), all) != unit_bytes()) refuse("which have changed");
  parts_.clear();
  for (const MemoryPart& part : all) {
    const UniqueFd file = part.file->open_for_writing();
    parts_.push_back({part.first, part.extent.bytes / map_.page_size(),
                      Mapping::shared(file.get(), part.extent.bytes, part.offset)});
  }
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
}

void HugeMemory::unmap(PageRun run) const {
  map_.for_each_part(run, [](std::span<std::byte> part, PageNumber) {
    if (::madvise(part.data(), part.size(), MADV_DONTNEED) != 0)
      throw_errno("madvise(MADV_DONTNEED) of huge pages (Linux 5.18)");
  });
}

std::byte* HugeMemory::alias(PageNumber page) const {
  for (const Part& part : parts_) {
    if (page < part.first || page.value >= part.first.value + part.pages) continue;
    return part.alias.data() + (page.value - part.first.value) * map_.page_size();
  }
  throw std::out_of_range("page outside the region's huge pages");
}

// A write that finds none is killed; this says so. Asked anew each time: the guest may have discarded it since.
bool HugeMemory::populate(PageNumber page) {
  std::byte* const at = alias(unit(page).first);
  int status = -1;
  do {
    status = ::madvise(at, static_cast<std::size_t>(unit_bytes()), abi::kMadvPopulateWrite);
  } while (status != 0 && (errno == EAGAIN || errno == EINTR));
  return status == 0;
}

bool HugeMemory::write(PageRun run, const std::byte* bytes) {
  if (!populate(run.first)) return false;
  content_.set(index(run.first));
  std::memcpy(alias(run.first), bytes, static_cast<std::size_t>(run.count * map_.page_size()));
  return true;
}

bool HugeMemory::write_zeros(PageRun run) {
  if (!stale_.test(index(run.first))) return true;
  if (!populate(run.first)) return false;
  std::memset(alias(run.first), 0, static_cast<std::size_t>(run.count * map_.page_size()));
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
