// What of attached memory is not there, though it does not look so.
#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <string>
#include <thread>

#include "os/pagemap.h"
#include "os/process_maps.h"
#include "page/region.h"

namespace memferry {
namespace {

constexpr int kRunsNamed = 4;
// A huge page that the kernel is just moving looks lost, for less than a millisecond.
constexpr int kLooks = 20;
constexpr std::chrono::milliseconds kBetweenLooks{5};
constexpr std::uint64_t kMarkerType =
    31;  // of a swap entry that is none: a mark in the page table (include/linux/swap.h)
constexpr std::uint64_t kTypeMask = 31;
constexpr std::uint64_t kFrameMask = (1ULL << 55U) - 1;

// Whether the entry stands for content, a page of zeros that was read included. Write protection may leave a mark where
// there is no page, which looks swapped out; what it really is says the entry's type, to root alone.
bool is_there(std::uint64_t entry) {
  if ((entry & abi::kPagemapPresent) != 0) return true;
  if ((entry & abi::kPagemapSwapped) == 0) return false;
  if ((entry & abi::kPagemapUffdWp) == 0) return true;
  return (entry & kFrameMask) != 0 && (entry & kTypeMask) != kMarkerType;
}

std::string name_pages(const AtomicBitmap& pages) {
  std::string text;
  PageNumber from{0};
  for (int i = 0; i < kRunsNamed; ++i) {
    const auto run = pages.next_set(from, PageNumber{pages.capacity()}, pages.capacity());
    if (!run) return text;
    text += (text.empty() ? "" : ", ") + std::to_string(run->first.value);
    if (run->count > 1) text += "-" + std::to_string(run->end().value - 1);
    from = run->end();
  }
  if (pages.next_set(from, PageNumber{pages.capacity()}, 1)) text += ", ...";
  return text;
}

}  // namespace

void Region::visit_there(PageRun within, const std::function<void(PageRun)>& visit) const {
  if (file_content(within, visit)) return;
  Pagemap pagemap(owner_);
  while (within.count > 0) {
    const PageRun part = contiguous_run(within);
    const OwnerAddress start = owner_address(part.first);
    pagemap.entries(start, part.count * page_size_,
                    [&](OwnerAddress at, std::span<const std::uint64_t> entries) {
                      const std::uint64_t first = part.first.value + (at.value - start.value) / page_size_;
                      for (std::size_t i = 0; i < entries.size(); ++i) {
                        std::size_t end = i;
                        while (end < entries.size() && is_there(entries[end])) ++end;
                        if (end > i) visit({PageNumber{first + i}, end - i});
                        i = end;
                      }
                    });
    within = {part.end(), within.count - part.count};
  }
}

std::vector<PageRun> Region::pages_there() const {
  std::vector<PageRun> there;
  visit_there({PageNumber{0}, pages()}, [&](PageRun run) {
    if (!there.empty() && there.back().end() == run.first) {
      there.back().count += run.count;
    } else {
      there.push_back(run);
    }
  });
  return there;
}

void Region::drop_reserved() {
  if (!memory_) return;
  for (std::size_t i = 0; i < extents_.size(); ++i) {
    if (::fallocate(memory_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    static_cast<off_t>(offsets_[i]), static_cast<off_t>(extents_[i].bytes)) != 0)
      throw_errno("fallocate(memory)");
  }
}

bool Region::check_not_missing(const char* operation) const {
  if (!owner_) return false;
  std::vector<PageRun> asked_for;
  for_each_paged_area(
      [&](OwnerAddress start, OwnerAddress end) {
        for_each_run_between(start, end, [&](PageRun run) { asked_for.push_back(run); });
      },
      owner_.get());
  if (asked_for.empty()) return false;
  AtomicBitmap missing(pages());
  for (const PageRun run : asked_for) {
    missing.set_run(run);
    visit_there(run, [&](PageRun there) { missing.clear_run(there); });
  }
  if (missing.count() == 0) return true;
  throw SystemError(std::string(operation) + ": the memory of process " + std::to_string(owner_->pid()) +
                        " is being paged, and what is missing there would be taken for zeros: pages " +
                        name_pages(missing) + " (" + std::to_string(missing.count()) + " of " +
                        std::to_string(pages()) + ")",
                    EBUSY);
}

bool Region::awaits_pages() const {
  try {
    (void)check_not_missing("attach");
    return false;
  } catch (const SystemError& error) {
    if (error.error() == EBUSY) return true;
    throw;
  }
}

// A page that was made to fail is a mark in the owner's page table, which looks swapped out. Nothing else does where the file
// has a hole, but for the marks of write protection.
// A huge page that fails may be there in part: the mark alone says that it is lost.
void Region::check_not_lost(const char* operation) const {
  if (!memory_ || !(has_holes_ || huge_page_bytes_ != 0)) return;
  AtomicBitmap lost(pages());
  for (int look = 1;; ++look) {
    find_marks(lost);
    if (huge_page_bytes_ == 0)
      (void)file_content({PageNumber{0}, pages()}, [&](PageRun there) { lost.clear_run(there); });
    if (lost.count() == 0) return;
    if (huge_page_bytes_ == 0 || look == kLooks) break;
    lost.clear_run({PageNumber{0}, pages()});
    std::this_thread::sleep_for(kBetweenLooks);
  }
  throw SystemError(std::string(operation) + ": pages of the memory of process " +
                        std::to_string(owner_->pid()) +
                        " are lost, and fail to be read there: " + name_pages(lost) + " (" +
                        std::to_string(lost.count()) + " of " + std::to_string(pages()) + ")",
                    EIO);
}

// Pages that the owner's page table has a mark for and no page.
void Region::find_marks(AtomicBitmap& found_marks) const {
  Pagemap pagemap(owner_);
  const bool scans = pagemap.can_scan();
  for (PageRun left{PageNumber{0}, pages()}; left.count > 0;) {
    const PageRun part = contiguous_run(left);
    const OwnerAddress start = owner_address(part.first);
    const std::uint64_t bytes = part.count * page_size_;
    if (scans) {
      Pagemap::Query marked;
      marked.category_mask = abi::kPageIsSwapped | abi::kPageIsWritten;
      marked.return_mask = abi::kPageIsSwapped;
      pagemap.scan(start, bytes, marked, [&](const abi::PageRegion& found) {
        found_marks.set_run({PageNumber{part.first.value + (found.start - start.value) / page_size_},
                             (found.end - found.start) / page_size_});
      });
    } else {
      constexpr std::uint64_t kBits = abi::kPagemapPresent | abi::kPagemapSwapped | abi::kPagemapUffdWp;
      pagemap.entries(start, bytes, [&](OwnerAddress at, std::span<const std::uint64_t> entries) {
        for (std::size_t i = 0; i < entries.size(); ++i) {
          if ((entries[i] & kBits) == abi::kPagemapSwapped)
            found_marks.set(PageNumber{part.first.value + (at.value - start.value) / page_size_ + i});
        }
      });
    }
    left = {part.end(), left.count - part.count};
  }
}

}  // namespace memferry
