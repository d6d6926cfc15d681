#include "track/uffd_wp_async.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "os/process_maps.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

constexpr std::uint64_t kProtectWritten = abi::kScanWpMatching | abi::kScanCheckWpAsync;

std::optional<std::string> refusal_of(const Region& region, const std::vector<MemoryPart>& parts,
                                      Writers writers) {
  if (region.owner() && region.uffd() == nullptr)
    return "the memory was attached without a userfaultfd of its owner; use hash-diff";
  if (region.owner() && (region.uffd()->enabled() & abi::kUffdFeatureWpAsync) == 0)
    return "the owner's userfaultfd was made without WP_ASYNC; use hash-diff";
  return refusal_to_protect(parts, writers);
}

// What is attached is written by its owner, by these addresses: whoever attaches it has said so.
Writers writers_of(const Region& region, const TrackerOptions& options) {
  return region.owner() || region.sole_mapping() ? Writers::kTrackedMapping : options.writers;
}

}  // namespace

std::optional<std::string> UffdWpAsyncTracker::refusal(const Region& region, const TrackerOptions& options) {
  return refusal_of(region, memory_parts(region), writers_of(region, options));
}

UffdWpAsyncTracker::UffdWpAsyncTracker(std::shared_ptr<Region> region, const TrackerOptions& options)
    : region_(std::move(region)), writers_(writers_of(*region_, options)), pagemap_(region_->owner()) {}

Userfaultfd& UffdWpAsyncTracker::uffd() {
  Userfaultfd* const found = region_->owner() ? region_->uffd() : &*uffd_;
  if (found == nullptr) throw std::logic_error("uffd-wp-async: attached memory without a userfaultfd");
  return *found;
}

void UffdWpAsyncTracker::arm() {
  const RegionUse use(region_, "arm");
  disarm();
  const std::uint64_t pages = region_->pages();
  std::vector<MemoryPart> parts = memory_parts(*region_);
  if (const auto refused = refusal_of(*region_, parts, writers_))
    throw SystemError("uffd-wp-async: " + *refused, EOPNOTSUPP);
  const bool plain = std::all_of(parts.begin(), parts.end(), [](const MemoryPart& part) {
    return part.kind == MemoryPart::Kind::kPrivateAnonymous;
  });
  // Held until it is registered, so that no pager comes in between.
  std::unique_ptr<Region, void (*)(Region*)> events(
      nullptr, [](Region* region) { region->end_events(Region::Missing::kUnknown); });
  if (region_->owner()) {
    region_->check_attached("uffd-wp-async");
    // One range has one kind of registration: what is missing there would read as zeros.
    if (!region_->begin_events()) throw SystemError("uffd-wp-async: the memory is being paged", EBUSY);
    events.reset(region_.get());
    // A registration that is there already keeps asking for missing pages, with nobody to bring them.
    if (region_->check_not_missing("uffd-wp-async")) {
      for (const Extent& extent : region_->extents())
        (void)region_->uffd()->unregister(extent.start, extent.bytes);
    }
  } else {
    uffd_ = Userfaultfd::open(kFeatures | (plain ? 0 : abi::kUffdFeatureWpHugetlbfsShmem));
  }
  armed_ = true;
  try {
    register_memory();
    // Found above, so that nobody looks for it while the guest stands.
    if (events) events.release()->end_events(Region::Missing::kNone);
    populated_ = std::make_unique<AtomicBitmap>(region_->capacity_pages());
    for (const MemoryPart& part : parts) touch_shared_huge_pages(use, part);
    // Everything newly registered reads as written. What was in a page comes with it, from the same moment at
    // which the page is protected: looking earlier would miss a first write in between.
    const std::uint64_t returned =
        abi::kPageIsWritten | abi::kPageIsPresent | abi::kPageIsSwapped | abi::kPageIsPfnZero;
    protect(0, pages, returned, [&](PageRun run, std::uint64_t categories) {
      const bool zeros = (categories & (abi::kPageIsPresent | abi::kPageIsSwapped)) == 0 ||
                         (categories & abi::kPageIsPfnZero) != 0;
      if (!zeros) populated_->set_run(run);
    });
    look_for_content(pages);
    if (!plain) {
      // Only here can a page that is not in the page tables have content.
      discards_.emplace(use, *region_, std::move(parts), pagemap_);
      PageNumber at{0};
      while (const auto run = discards_->content().next_set(at, PageNumber{pages}, pages)) {
        populated_->set_run(*run);
        at = run->end();
      }
    }
    armed_pages_ = pages;
  } catch (...) {
    events.reset();
    disarm();
    throw;
  }
}

// Where there was no page table yet, a kernel may look and protect in two steps: what was written between them is
// present now, and would never be reported.
void UffdWpAsyncTracker::look_for_content(std::uint64_t pages) {
  Pagemap::Query present;
  present.category_mask = abi::kPageIsPresent;
  present.return_mask = abi::kPageIsPresent | abi::kPageIsPfnZero;
  for (PageRun left{PageNumber{0}, pages}; left.count > 0;) {
    const PageRun part = region_->contiguous_run(left);
    const OwnerAddress start = region_->owner_address(part.first);
    pagemap_.scan(start, part.count * region_->page_size(), present, [&](const abi::PageRegion& found) {
      if ((found.categories & abi::kPageIsPfnZero) != 0) return;
      populated_->set_run(pages_of(part.first.value, start, found));
    });
    left = {part.end(), left.count - part.count};
  }
}

// A page of the region may be larger than those that were found, or smaller.
PageRun UffdWpAsyncTracker::pages_of(std::uint64_t first, OwnerAddress start,
                                     const abi::PageRegion& found) const {
  const std::uint64_t page_size = region_->page_size();
  const std::uint64_t from = (found.start - start.value) / page_size;
  const std::uint64_t to = (found.end - start.value + page_size - 1) / page_size;
  return {PageNumber{first + from}, to - from};
}

// As far as the memory may ever grow, where that is reserved already: V8 grows a WebAssembly memory by
// mprotect alone, which keeps the registration.
void UffdWpAsyncTracker::register_memory() {
  const std::vector<Extent> now = region_->extents();
  registered_pages_ = 0;
  for (std::size_t i = 0; i + 1 < now.size(); ++i) uffd().register_wp(now[i].start, now[i].bytes);
  const Extent reach = region_->capacity_extents().back();
  const Extent last = now.back();
  if (!region_->owner() && reach.bytes > last.bytes && is_private_anonymous(reach.start, reach.bytes)) {
    try {
      uffd().register_wp(reach.start, reach.bytes);
      registered_pages_ = region_->capacity_pages();
      return;
    } catch (const SystemError&) {
      // The tail is of a kind that cannot be registered: then each growth is, when collect() sees it.
    }
  }
  if (last.bytes != 0) uffd().register_wp(last.start, last.bytes);
  registered_pages_ = region_->capacity_pages() - (reach.bytes - last.bytes) / region_->page_size();
}

void UffdWpAsyncTracker::register_up_to(std::uint64_t pages) {
  if (pages <= registered_pages_) return;
  // Only the last extent grows.
  const OwnerAddress start = region_->owner_address(PageNumber{registered_pages_});
  const std::uint64_t bytes = (pages - registered_pages_) * region_->page_size();
  const auto refusal = discards_ ? refusal_to_protect(memory_parts(*region_), writers_) : std::nullopt;
  if (refusal) throw SystemError("uffd-wp-async: " + *refusal, EOPNOTSUPP);
  if (!discards_ && !is_private_anonymous(start, bytes)) {
    throw SystemError("uffd-wp-async: the region has grown into memory that is not private and anonymous",
                      EOPNOTSUPP);
  }
  uffd().register_wp(start, bytes);
  registered_pages_ = pages;
}

template <typename Visit>
void UffdWpAsyncTracker::protect(std::uint64_t first, std::uint64_t end, std::uint64_t return_mask,
                                 Visit visit) {
  const std::uint64_t page_size = region_->page_size();
  // With this mask and no other the kernel takes its short way, and a swapped-out page counts too.
  Pagemap::Query query;
  query.flags = kProtectWritten;
  query.category_mask = abi::kPageIsWritten;
  query.return_mask = return_mask;
  while (first < end) {
    const PageRun part = region_->contiguous_run({PageNumber{first}, end - first});
    const OwnerAddress start = region_->owner_address(part.first);
    const std::uint64_t bytes = part.count * page_size;
    const std::uint64_t base = first;
    try {
      pagemap_.scan(start, bytes, query, [&](const abi::PageRegion& found) {
        visit(pages_of(base, start, found), found.categories);
      });
    } catch (const SystemError& error) {
      if (error.error() != EPERM) throw;
      throw SystemError("uffd-wp-async: part of the region was moved or mapped anew and is not tracked",
                        EPERM);
    }
    if (!region_->owner()) check_still_mapped("uffd-wp-async", Address{start.value}, bytes);
    first += part.count;
  }
  region_->check_attached("uffd-wp-async");
}

// The scan protects none that is not mapped here, and what DiscardWatch then reads would count as written. Their memory
// is reserved anyway.
void UffdWpAsyncTracker::touch_shared_huge_pages(const RegionUse& use, const MemoryPart& part) const {
  if (part.kind != MemoryPart::Kind::kHugetlb || !part.shared || region_->owner()) return;
  for (std::uint64_t at = 0; at < part.extent.bytes; at += part.page_bytes) {
    if (use.revoked()) throw RegionGone("arm");
    // No look: with MAP_NORESERVE the pool may be empty, and that would be SIGBUS.
    void* const page = Address{part.extent.start.value + at}.pointer();
    if (::madvise(page, part.page_bytes, abi::kMadvPopulateRead) != 0)
      throw_errno("madvise(MADV_POPULATE_READ)");
  }
}

std::uint64_t UffdWpAsyncTracker::collect(AtomicBitmap& dirty) {
  if (!armed_) throw std::logic_error("uffd-wp-async: collect() without arm()");
  const RegionUse use(region_, "collect");
  const std::uint64_t pages = region_->pages();
  if (dirty.capacity() < pages) throw std::invalid_argument("collect: the bitmap is smaller than the region");
  populated_.reset();  // what is reported now is not reported again
  std::uint64_t written = 0;
  protect(0, armed_pages_, abi::kPageIsWritten, [&](PageRun run, std::uint64_t) {
    dirty.set_run(run);
    written += run.count;
  });
  if (region_->owner()) {
    // Read, so that the owner's discards go on; what it discarded counts. (DiscardWatch finds those that it does not
    // tell of.)
    const std::uint64_t before = dirty.count();
    (void)region_->drain_events();
    region_->take_removed(dirty);
    written += dirty.count() - before;
  }
  if (pages > armed_pages_) {
    // Protected first, reported after: a write in between is in what the reader finds or is reported next
    // time.
    register_up_to(pages);
    protect(armed_pages_, pages, abi::kPageIsWritten, [](PageRun, std::uint64_t) {});
    dirty.set_run({PageNumber{armed_pages_}, pages - armed_pages_});
    written += pages - armed_pages_;
    armed_pages_ = pages;
    if (discards_) discards_->follow_growth();
  }
  if (discards_) written += discards_->collect(use, pagemap_, dirty);
  return written;
}

// Closing lifts every protection and registration that is still there; what has been unmapped since needs
// nothing, and may belong to somebody else by now, so it is not named. The userfaultfd of attached memory stays open:
// there the kernel passes over what is not registered with it.
void UffdWpAsyncTracker::disarm() {
  uffd_.reset();
  discards_.reset();
  // Where a pager has it by now, the registration is the pager's.
  if (armed_ && region_->owner() && region_->begin_events()) {
    for (const Extent& extent : region_->extents()) {
      try {
        (void)region_->uffd()->unregister(extent.start, extent.bytes);
      } catch (const SystemError&) {
        // It belongs to another userfaultfd by now, or is of a kind that has none.
      }
    }
    region_->end_events(Region::Missing::kUnknown);
  }
  armed_ = false;
  populated_.reset();
  registered_pages_ = 0;
  armed_pages_ = 0;
}

}  // namespace memferry
