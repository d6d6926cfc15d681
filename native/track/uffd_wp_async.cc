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

}  // namespace

UffdWpAsyncTracker::UffdWpAsyncTracker(std::shared_ptr<Region> region)
    : region_(std::move(region)), pagemap_(region_->owner()) {}

Userfaultfd& UffdWpAsyncTracker::uffd() { return region_->owner() ? *region_->uffd() : *uffd_; }

// PAGEMAP_SCAN passes over unmapped addresses without a word. MS_ASYNC does nothing at all on Linux but walk
// the mappings, and says ENOMEM when there is a gap: about a microsecond. (Another process's are read.)
void UffdWpAsyncTracker::check_still_mapped(OwnerAddress start, std::uint64_t bytes) const {
  if (region_->owner()) return;
  if (bytes != 0 && ::msync(Address{start.value}.pointer(), bytes, MS_ASYNC) != 0) {
    throw SystemError("uffd-wp-async: part of the region is no longer mapped", errno);
  }
}

void UffdWpAsyncTracker::arm() {
  const RegionUse use(region_, "arm");
  disarm();
  const std::uint64_t pages = region_->pages();
  if (region_->owner()) {
    const Userfaultfd* theirs = region_->uffd();
    if (theirs == nullptr) {
      throw SystemError(
          "uffd-wp-async: the memory was attached without a userfaultfd of its owner; use hash-diff",
          EOPNOTSUPP);
    }
    if ((theirs->enabled() & abi::kUffdFeatureWpAsync) == 0) {
      throw SystemError("uffd-wp-async: the owner's userfaultfd was made without WP_ASYNC; use hash-diff",
                        EOPNOTSUPP);
    }
    region_->check_attached("uffd-wp-async");
    // One range has one kind of registration: what is missing there would read as zeros.
    if (!region_->begin_events()) throw SystemError("uffd-wp-async: the memory is being paged", EBUSY);
    region_->end_events();
  } else {
    for (const Extent& extent : region_->extents()) {
      if (!is_private_anonymous(extent.start, extent.bytes)) {
        throw SystemError(
            "uffd-wp-async: the memory is not private and anonymous, and may be written through another "
            "mapping; "
            "use hash-diff",
            EOPNOTSUPP);
      }
    }
    uffd_ = Userfaultfd::open(kFeatures);
  }
  armed_ = true;
  try {
    register_memory();
    populated_ = std::make_unique<AtomicBitmap>(region_->capacity_pages());
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
    armed_pages_ = pages;
  } catch (...) {
    disarm();
    throw;
  }
}

// Where there was no page table yet, a kernel may look and protect in two steps: what was written between them is
// present now, and would never be reported. And what is in a file need not be in anybody's page table.
void UffdWpAsyncTracker::look_for_content(std::uint64_t pages) {
  Pagemap::Query present;
  present.category_mask = abi::kPageIsPresent;
  present.return_mask = abi::kPageIsPresent | abi::kPageIsPfnZero;
  for (PageRun left{PageNumber{0}, pages}; left.count > 0;) {
    const PageRun part = region_->contiguous_run(left);
    const OwnerAddress start = region_->owner_address(part.first);
    pagemap_.scan(start, part.count * region_->page_size(), present, [&](const abi::PageRegion& found) {
      if ((found.categories & abi::kPageIsPfnZero) != 0) return;
      populated_->set_run(
          PageRun{PageNumber{part.first.value + (found.start - start.value) / region_->page_size()},
                  (found.end - found.start) / region_->page_size()});
    });
    left = {part.end(), left.count - part.count};
  }
  if (!region_->owner() || region_->remote()) return;
  const PageRun all{PageNumber{0}, pages};
  content_ = std::make_unique<AtomicBitmap>(region_->capacity_pages());
  if (region_->file_content(all, [&](PageRun run) { content_->set_run(run); })) {
    for (std::uint64_t word = 0; word < content_->words(); ++word)
      populated_->or_word(word, content_->word(word));
  } else {
    content_.reset();
    populated_->set_run(all);
  }
}

// After the protection: what is there now and goes later is found next time.
std::uint64_t UffdWpAsyncTracker::collect_holes(AtomicBitmap& dirty) {
  std::uint64_t found = 0;
  PageNumber at{0};
  const auto hole = [&](PageNumber end) {
    while (at < end) {
      const auto gone = content_->take_run(at, end, end.value - at.value);
      if (!gone) break;
      found += gone->count - dirty.count(*gone);
      dirty.set_run(*gone);
      at = gone->end();
    }
    at = std::max(at, end);
  };
  (void)region_->file_content({PageNumber{0}, armed_pages_}, [&](PageRun run) {
    hole(run.first);
    content_->set_run(run);
    at = run.end();
  });
  hole(PageNumber{armed_pages_});
  return found;
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
  if (!is_private_anonymous(start, bytes)) {
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
        const std::uint64_t page = base + (found.start - start.value) / page_size;
        visit(PageRun{PageNumber{page}, (found.end - found.start) / page_size}, found.categories);
      });
    } catch (const SystemError& error) {
      if (error.error() != EPERM) throw;
      throw SystemError("uffd-wp-async: part of the region was moved or mapped anew and is not tracked",
                        EPERM);
    }
    check_still_mapped(start, bytes);
    first += part.count;
  }
  region_->check_attached("uffd-wp-async");
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
  if (content_) written += collect_holes(dirty);
  if (pages > armed_pages_) {
    // Protected first, reported after: a write in between is in what the reader finds or is reported next
    // time.
    register_up_to(pages);
    protect(armed_pages_, pages, abi::kPageIsWritten, [](PageRun, std::uint64_t) {});
    dirty.set_run({PageNumber{armed_pages_}, pages - armed_pages_});
    written += pages - armed_pages_;
    armed_pages_ = pages;
  }
  return written;
}

// Closing lifts every protection and registration that is still there; what has been unmapped since needs
// nothing, and may belong to somebody else by now, so it is not named. The userfaultfd of attached memory stays open:
// there the kernel passes over what is not registered with it.
void UffdWpAsyncTracker::disarm() {
  uffd_.reset();
  // Where a pager has it by now, the registration is the pager's.
  if (armed_ && region_->owner() && region_->begin_events()) {
    for (const Extent& extent : region_->extents()) {
      try {
        (void)region_->uffd()->unregister(extent.start, extent.bytes);
      } catch (const SystemError&) {
        // It belongs to another userfaultfd by now, or is of a kind that has none.
      }
    }
    region_->end_events();
  }
  armed_ = false;
  populated_.reset();
  content_.reset();
  registered_pages_ = 0;
  armed_pages_ = 0;
}

}  // namespace memferry
