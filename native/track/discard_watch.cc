#include "track/discard_watch.h"

#include <algorithm>
#include <utility>

#include "page/racy_read.h"
#include "page/zero.h"

namespace memferry {

DiscardWatch::DiscardWatch(const RegionUse& use, const Region& region, std::vector<MemoryPart> parts,
                           Pagemap& pagemap)
    : region_(region), content_(region.capacity_pages()) {
  watch(std::move(parts));
  for (Watched& watched : watched_) {
    // What is cut out during the look is found by the next one.
    (void)unchanged(watched);
    with_memory(pagemap, watched.part, [&](PageRun run) {
      if (use.revoked()) throw RegionGone("arm");
      // Few pages, and to be exact about those of zeros costs nothing.
      const bool huge = watched.part.kind == MemoryPart::Kind::kHugetlb;
      for (PageNumber page = run.first; page < run.end(); ++page.value) {
        if (!huge || !page_is_zero(page)) content_.set(page);
      }
    });
  }
}

void DiscardWatch::watch(std::vector<MemoryPart> parts) {
  watched_.clear();
  for (MemoryPart& part : parts) {
    if (part.kind == MemoryPart::Kind::kTmpfs || part.kind == MemoryPart::Kind::kHugetlb)
      watched_.push_back({std::move(part), std::nullopt, {}, false});
  }
  for (Watched& each : watched_) {
    if (each.part.kind == MemoryPart::Kind::kTmpfs) each.cuts = CutWatch::of(each.part.file->fd());
  }
}

// Nothing was cut out since the last time that this was asked, after which one looks if it was.
bool DiscardWatch::unchanged(Watched& watched) {
  const bool looked = std::exchange(watched.looked, true);
  if (watched.part.kind != MemoryPart::Kind::kTmpfs) return false;
  if (watched.cuts) return !watched.cuts->changed() && looked;
  const BackingFile::Stamp before = std::exchange(watched.stamp, watched.part.file->stamp());
  return looked && watched.stamp.same_as(before);
}

void DiscardWatch::follow_growth() {
  if (!watched_.empty()) watch(memory_parts(region_));
}

PageRun DiscardWatch::pages_of(const MemoryPart& part) const {
  return {part.first, part.extent.bytes / region_.page_size()};
}

bool DiscardWatch::page_is_zero(PageNumber page) {
  constexpr std::size_t kFirstLook = 64;  // nearly every page that has content shows it here
  reader_.reset();
  const auto bytes = reader_.read(region_, {page, 1});
  if (!is_zero(RacyView(bytes.first(kFirstLook)).bytes())) return false;
  return is_zero(RacyView(bytes).bytes());
}

template <typename Visit>
void DiscardWatch::with_memory(Pagemap& pagemap, const MemoryPart& part, Visit visit) {
  const std::uint64_t page_size = region_.page_size();
  const PageRun all = pages_of(part);
  PageNumber reported = all.first;
  const auto report = [&](std::uint64_t start, std::uint64_t end) {  // bytes of the part
    const PageNumber first = std::max(reported, PageNumber{all.first.value + start / page_size});
    const PageNumber stop =
        std::min(all.end(), PageNumber{all.first.value + (end + page_size - 1) / page_size});
    if (first < stop) visit(PageRun{first, stop.value - first.value});
    reported = std::max(reported, stop);
  };
  if (part.kind == MemoryPart::Kind::kTmpfs) {
    part.file->data(part.offset, part.extent.bytes, [&](std::uint64_t start, std::uint64_t end) {
      report(start - part.offset, end - part.offset);
    });
  } else if (!part.shared) {
    pagemap.populated_by_reading(part.extent.start, part.extent.bytes, [&](AddressRange range) {
      report(range.start.value - part.extent.start.value, range.end.value - part.extent.start.value);
    });
  } else {
    report(0, part.extent.bytes);  // a page that is not mapped may have content all the same
  }
}

std::uint64_t DiscardWatch::look(const RegionUse& use, Pagemap& pagemap, const Watched& watched,
                                 AtomicBitmap& dirty) {
  std::uint64_t found = 0;
  // Zeros, protected, and reported now: what they become is seen.
  const auto vanished = [&](PageNumber page) {
    content_.clear(page);
    if (!dirty.set(page)) ++found;
  };
  const auto without_memory = [&](PageNumber from, PageNumber to) {
    while (const auto run = content_.next_set(from, to, to.value - from.value)) {
      for (PageNumber page = run->first; page < run->end(); ++page.value) vanished(page);
      from = run->end();
    }
  };
  const PageRun all = pages_of(watched.part);
  PageNumber at = all.first;
  with_memory(pagemap, watched.part, [&](PageRun run) {
    without_memory(at, run.first);
    at = run.end();
    PageNumber from = run.first;
    while (const auto content = content_.next_set(from, run.end(), PageStarts::kAtOnce)) {
      if (use.revoked()) throw RegionGone("collect");
      starts_.visit_zero(region_, *content, [&](PageNumber page) {
        if (page_is_zero(page)) vanished(page);
      });
      from = content->end();
    }
  });
  without_memory(at, all.end());
  return found;
}

std::uint64_t DiscardWatch::collect(const RegionUse& use, Pagemap& pagemap, AtomicBitmap& dirty) {
  std::uint64_t found = 0;
  for (Watched& watched : watched_) {
    const PageRun all = pages_of(watched.part);
    PageNumber from = all.first;
    while (const auto run = dirty.next_set(from, all.end(), all.count)) {
      content_.set_run(*run);
      from = run->end();
    }
    if (unchanged(watched)) continue;
    found += look(use, pagemap, watched, dirty);
  }
  return found;
}

}  // namespace memferry
