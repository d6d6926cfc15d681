#include "fault/huge_place.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "os/kernel_abi.h"
#include "os/mapping.h"
#include "os/pagemap.h"
#include "os/sys_error.h"
#include "track/memory_part.h"

namespace memferry {
namespace {

constexpr std::size_t kMappedAtOnce = 512;  // runs that one look at a page table gives

void drop(std::byte* at, std::uint64_t bytes, int advice) {
  if (::madvise(at, static_cast<std::size_t>(bytes), advice) != 0)
    throw_errno("madvise() of huge pages (MADV_DONTNEED: Linux 5.18)");
}

class Alias final : public HugePlace {
 public:
  Alias(const ArrivalMap& map, std::uint64_t unit_bytes) : HugePlace(map, unit_bytes) {}

  void open() override {
    parts_.clear();
    for (const MemoryPart& part : memory_parts(map_.region())) {
      const UniqueFd file = part.file->open_for_writing();
      parts_.push_back({part.first, part.extent.bytes / map_.page_size(),
                        Mapping::shared(file.get(), part.extent.bytes, part.offset)});
    }
  }
  std::byte* at(PageNumber page) const override {
    for (const Part& part : parts_) {
      if (page < part.first || page.value >= part.first.value + part.pages) continue;
      return part.alias.data() + (page.value - part.first.value) * map_.page_size();
    }
    throw std::out_of_range("page outside the region's huge pages");
  }
  std::optional<PageNumber> take_back(PageRun run) const override {
    map_.for_each_part(
        run, [](std::span<std::byte> part, PageNumber) { drop(part.data(), part.size(), MADV_DONTNEED); });
    return std::nullopt;
  }

 private:
  struct Part {
    PageNumber first;
    std::uint64_t pages = 0;
    Mapping alias;
  };
  std::vector<Part> parts_;
};

class View final : public HugePlace {
 public:
  View(const ArrivalMap& map, std::uint64_t unit_bytes) : HugePlace(map, unit_bytes) {}

  void open() override {}
  // What was punched out of the file has lost its reservation, and the view was made without: whoever takes the last huge
  // page after the commit would take it from the guest.
  void reserve() override {
    reserved_.clear();
    for (const MemoryPart& part : memory_parts(map_.region())) {
      const UniqueFd file = part.file->open_for_writing();
      reserved_.push_back(Mapping::shared(file.get(), part.extent.bytes, part.offset));
    }
  }
  std::byte* at(PageNumber page) const override { return map_.region().contiguous({page, 1}).data(); }
  // Nobody can take it out of another process's page table but by taking it out of the file. Few: nobody runs there yet,
  // and what is not whole is never mapped.
  std::optional<PageNumber> take_back(PageRun run) const override {
    std::vector<std::byte> kept;
    for (const PageNumber first : mapped(run)) {
      kept.resize(static_cast<std::size_t>(unit_bytes_));
      std::byte* const here = at(first);
      if (!populate(first)) return first;
      std::memcpy(kept.data(), here, kept.size());
      drop(here, unit_bytes_, MADV_REMOVE);
      if (!populate(first)) return first;
      std::memcpy(here, kept.data(), kept.size());
    }
    return std::nullopt;
  }

 private:
  std::vector<Mapping> reserved_;  // never touched
};

class Staging final : public HugePlace {
 public:
  Staging(const ArrivalMap& map, std::uint64_t unit_bytes)
      : HugePlace(map, unit_bytes), held_(map.region().capacity_pages() * map.page_size() / unit_bytes) {}

  RegisterMode mode() const override { return RegisterMode::kMissing; }
  void open() override { memory_ = Mapping::anonymous(map_.region().capacity_pages() * map_.page_size()); }
  std::byte* at(PageNumber page) const override { return memory_.data() + page.value * map_.page_size(); }
  bool populate(PageNumber first) const override {
    held_.set(index(first));
    return true;
  }
  PageResult give(Userfaultfd& uffd, PageNumber first) const override {
    const PageResult result = uffd.copy(map_.region().owner_address(first), at(first), unit_bytes_, true);
    const bool exists = result.outcome == PageOutcome::kExists;
    // Given before, or by whoever broke the rules.
    if (exists && map_.present.count({first, unit_bytes_ / map_.page_size()}) == 0)
      throw SystemError("a huge page is populated, though it never arrived", EEXIST);
    if (result.outcome == PageOutcome::kOk || exists) {
      drop(at(first), unit_bytes_, MADV_DONTNEED);
      held_.clear(index(first));
    }
    return result;
  }
  std::optional<PageNumber> take_back(PageRun run) const override {
    for (const PageNumber first : mapped(run)) {
      std::byte* const there = map_.region().address(first).pointer();
      (void)populate(first);
      std::memcpy(at(first), there, static_cast<std::size_t>(unit_bytes_));
      drop(there, unit_bytes_, MADV_DONTNEED);
    }
    return std::nullopt;
  }
  std::uint64_t extra_bytes() const override { return held_.count() * unit_bytes_; }

 private:
  PageNumber index(PageNumber first) const {
    return PageNumber{first.value * map_.page_size() / unit_bytes_};
  }
  Mapping memory_;
  mutable AtomicBitmap held_;  // one bit a huge page
};

}  // namespace

std::unique_ptr<HugePlace> HugePlace::of(const ArrivalMap& map, std::uint64_t unit_bytes, bool shared) {
  if (map.region().owner()) return std::make_unique<View>(map, unit_bytes);
  if (shared) return std::make_unique<Alias>(map, unit_bytes);
  return std::make_unique<Staging>(map, unit_bytes);
}

bool HugePlace::populate(PageNumber first) const {
  int status = -1;
  do {
    status = ::madvise(at(first), static_cast<std::size_t>(unit_bytes_), abi::kMadvPopulateWrite);
  } while (status != 0 && (errno == EAGAIN || errno == EINTR));
  return status == 0;
}

PageResult HugePlace::give(Userfaultfd& uffd, PageNumber first) const {
  return uffd.map_present(map_.region().owner_address(first), unit_bytes_, true);
}

std::vector<PageNumber> HugePlace::mapped(PageRun run) const {
  std::vector<PageNumber> found;
  if (run.count == 0) return found;
  const std::uint64_t page_size = map_.page_size();
  Pagemap pagemap(map_.region().owner(), kMappedAtOnce);
  map_.for_each_run(run, [&](PageRun part) {
    const OwnerAddress start = map_.region().owner_address(part.first);
    pagemap.present(start, part.count * page_size, [&](AddressRange range) {
      for (std::uint64_t at = range.start.value; at < range.end.value; at += unit_bytes_)
        found.push_back({part.first.value + (at - start.value) / page_size});
    });
  });
  return found;
}

}  // namespace memferry
