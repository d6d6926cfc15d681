#include "track/uffd_wp.h"

#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <stdexcept>

#include "os/mapping.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

constexpr int kNice = -20;  // a guest's thread stands still meanwhile
constexpr std::size_t kFaultsAtOnce = 64;
constexpr int kMostTries = 1000;  // while the layout is changing

bool is_protected(std::uint64_t entry) { return (entry & abi::kPagemapUffdWp) != 0; }
bool is_empty(std::uint64_t entry) { return (entry & (abi::kPagemapPresent | abi::kPagemapSwapped)) == 0; }

std::optional<std::string> refusal_of(const Region& region, const std::vector<MemoryPart>& parts,
                                      Writers writers) {
  if (region.owner())
    return "the memory is another process's, whose threads would wait for this one; use uffd-wp-async, "
           "soft-dirty or "
           "hash-diff";
  for (const MemoryPart& part : parts) {
    if (part.page_bytes != parts.front().page_bytes)
      return "the region has huge pages and others at once; use hash-diff";
  }
  return refusal_to_protect(parts, writers);
}

Writers writers_of(const Region& region, const TrackerOptions& options) {
  return region.sole_mapping() ? Writers::kTrackedMapping : options.writers;
}

}  // namespace

std::optional<std::string> UffdWpTracker::refusal(const Region& region, const TrackerOptions& options) {
  return refusal_of(region, memory_parts(region), writers_of(region, options));
}

UffdWpTracker::UffdWpTracker(std::shared_ptr<Region> region, const TrackerOptions& options,
                             ProtectEmpty protect_empty)
    : region_(std::move(region)), writers_(writers_of(*region_, options)), protect_empty_(protect_empty) {}

void UffdWpTracker::arm() {
  const RegionUse use(region_, "arm");
  disarm();
  std::vector<MemoryPart> parts = memory_parts(*region_);
  if (const auto refused = refusal_of(*region_, parts, writers_))
    throw SystemError("uffd-wp: " + *refused, EOPNOTSUPP);
  const bool plain = std::all_of(parts.begin(), parts.end(), [](const MemoryPart& part) {
    return part.kind == MemoryPart::Kind::kPrivateAnonymous;
  });
  const std::uint64_t page_bytes = parts.front().page_bytes;
  huge_page_bytes_ = page_bytes == system_page_size() ? 0 : page_bytes;
  const bool protects_empty = protect_empty_ == ProtectEmpty::kWherePossible &&
                              (Userfaultfd::probe().features & abi::kUffdFeatureWpUnpopulated) != 0;
  read_first_ = plain && !protects_empty;
  // Faults of system calls too: with the user-mode-only one they would fail with EFAULT.
  uffd_ = Userfaultfd::open(kFeatures | (protects_empty ? abi::kUffdFeatureWpUnpopulated : 0) |
                                (plain ? 0 : abi::kUffdFeatureWpHugetlbfsShmem),
                            false);
  failed_ = 0;
  faults_ = 0;
  try {
    // Before anything is protected: from then on somebody may wait for it.
    server_.start("mf-wp", [this](WorkerThread& thread) { serve(thread); });
    const std::uint64_t pages = region_->pages();
    register_pages(0, pages);
    for (const MemoryPart& part : parts) protect_all(part.extent);
    if (!plain) discards_.emplace(use, *region_, std::move(parts), pagemap_);
    armed_pages_ = pages;
  } catch (...) {
    disarm();
    throw;
  }
}

void UffdWpTracker::register_pages(std::uint64_t from, std::uint64_t to) {
  while (from < to) {
    const auto part = region_->contiguous({PageNumber{from}, to - from});
    uffd_->register_wp(Address::of(part.data()), part.size());
    from += part.size() / region_->page_size();
  }
}

void UffdWpTracker::protect_all(Extent extent) {
  if (!read_first_) return protect(extent.start, extent.bytes, {});
  pagemap_.entries(extent.start, extent.bytes,
                   [&](OwnerAddress start, std::span<const std::uint64_t> entries) {
                     protect(start, entries.size() * system_page_size(), entries);
                   });
}

// `entries`: what the pagemap said of these pages, where empty ones must be read first. What happens to them in between
// has been reported by then, or happens before arm() returns.
void UffdWpTracker::protect(OwnerAddress start, std::uint64_t bytes, std::span<const std::uint64_t> entries) {
  const std::uint64_t page_size = system_page_size();
  for (std::size_t i = 0; read_first_ && i < entries.size();) {
    if (!is_empty(entries[i])) {
      ++i;
      continue;
    }
    std::size_t end = i + 1;
    while (end < entries.size() && is_empty(entries[end])) ++end;
    if (::madvise(Address{start.value + i * page_size}.pointer(), (end - i) * page_size,
                  abi::kMadvPopulateRead) != 0)
      throw_errno("uffd-wp: madvise(MADV_POPULATE_READ)");
    i = end;
  }
  for (int tries = 0; tries < kMostTries; ++tries) {
    const PageResult result = uffd_->write_protect(start, bytes, true);
    if (result.outcome == PageOutcome::kOk) return;
    if (result.outcome == PageOutcome::kAgain) continue;
    if (result.outcome == PageOutcome::kGone) {
      throw SystemError("uffd-wp: part of the region was moved or mapped anew and is not tracked", EPERM);
    }
    throw SystemError("UFFDIO_WRITEPROTECT", result.error);
  }
  throw SystemError("UFFDIO_WRITEPROTECT", EAGAIN);
}

std::uint64_t UffdWpTracker::collect(AtomicBitmap& dirty) {
  if (!uffd_) throw std::logic_error("uffd-wp: collect() without arm()");
  const RegionUse use(region_, "collect");
  const std::uint64_t pages = region_->pages();
  if (dirty.capacity() < pages) throw std::invalid_argument("collect: the bitmap is smaller than the region");
  if (const int error = failed_)
    throw SystemError("uffd-wp: the memory could not be watched any longer", error);
  if (pages > armed_pages_) register_grown(pages);
  const std::uint64_t page_size = region_->page_size();
  const std::uint64_t step = system_page_size();
  std::uint64_t written = 0;
  for (std::uint64_t first = 0; first < pages;) {
    const auto part = region_->contiguous({PageNumber{first}, pages - first});
    const Address base = Address::of(part.data());
    check_still_mapped("uffd-wp", base, part.size());
    std::uint64_t reported = first;  // pages before it are
    pagemap_.entries(base, part.size(), [&](OwnerAddress start, std::span<const std::uint64_t> entries) {
      if (use.revoked()) throw RegionGone("collect");
      for (std::size_t i = 0; i < entries.size();) {
        if (is_protected(entries[i])) {
          ++i;
          continue;
        }
        std::size_t end = i + 1;
        while (end < entries.size() && !is_protected(entries[end])) ++end;
        const std::uint64_t from = start.value - base.value + i * step;
        const std::uint64_t to = start.value - base.value + end * step;
        const std::uint64_t from_page = std::max(reported, first + from / page_size);
        reported = first + (to + page_size - 1) / page_size;
        if (from_page < reported) {
          dirty.set_run({PageNumber{from_page}, reported - from_page});
          written += reported - from_page;
        }
        // No neighbour with them: one that was read as protected and is written meanwhile would be protected again
        // without having been reported. (Test: APreCopyWhileThreadsWriteEndsWithAnEqualCopy.)
        protect(base.plus(from), to - from, entries.subspan(i, end - i));
        i = end;
      }
    });
    first += part.size() / page_size;
  }
  if (discards_) written += discards_->collect(use, pagemap_, dirty);
  return written;
}

// What has been gained is unprotected, and so counts as written.
void UffdWpTracker::register_grown(std::uint64_t pages) {
  std::vector<MemoryPart> parts = memory_parts(*region_);
  if (const auto refusal = refusal_to_protect(parts, writers_))
    throw SystemError("uffd-wp: " + *refusal, EOPNOTSUPP);
  const bool other = std::any_of(parts.begin(), parts.end(), [&](const MemoryPart& part) {
    const bool plain = part.kind == MemoryPart::Kind::kPrivateAnonymous;
    const std::uint64_t huge = huge_page_bytes_;
    return (plain != !discards_) || part.page_bytes != (huge == 0 ? system_page_size() : huge);
  });
  if (other) throw SystemError("uffd-wp: the region has grown into memory of another kind", EOPNOTSUPP);
  register_pages(armed_pages_, pages);
  armed_pages_ = pages;
  if (discards_) discards_->follow_growth();
}

void UffdWpTracker::serve(WorkerThread& thread) {
  (void)set_this_thread_nice(kNice);
  std::array<uffd_msg, kFaultsAtOnce> messages{};
  std::array<pollfd, 2> waiting{{{uffd_->fd(), POLLIN, 0}, {thread.wake_fd(), POLLIN, 0}}};
  try {
    for (;;) {
      // Served to the last even while stopping: disarm() lifts everything only afterwards.
      std::size_t count = 0;
      while ((count = uffd_->read_events(messages)) > 0) {
        for (std::size_t i = 0; i < count; ++i) {
          if (messages[i].event == UFFD_EVENT_PAGEFAULT) lift(Address{messages[i].arg.pagefault.address});
        }
      }
      if (thread.stopping()) return;
      if (::poll(waiting.data(), waiting.size(), -1) < 0 && errno != EINTR) throw_errno("poll");
      if ((waiting[0].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0)
        throw SystemError("poll(userfaultfd)", EIO);
    }
  } catch (const SystemError& error) {
    give_up(error.error());
  } catch (const std::exception&) {
    give_up(EIO);
  }
}

void UffdWpTracker::lift(Address address) {
  const std::uint64_t huge = huge_page_bytes_;
  const std::uint64_t bytes = huge == 0 ? system_page_size() : huge;
  const Address page{address.value / bytes * bytes};
  for (int tries = 0; tries < kMostTries; ++tries) {
    const PageResult result = uffd_->write_protect(page, bytes, false);
    if (result.outcome == PageOutcome::kOk) {
      faults_.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    if (result.outcome != PageOutcome::kAgain) break;
  }
  // No such memory any more: who waits looks again, and finds what is there now.
  uffd_->wake(page, bytes);
}

void UffdWpTracker::give_up(int error) {
  failed_ = error == 0 ? EIO : error;
  let_go();
}

// Lifts every protection and wakes who waits. Not by closing alone: a child of fork() may hold the same userfaultfd.
void UffdWpTracker::let_go() {
  if (region_->retired()) return;  // the memory may belong to somebody else by now
  for (const Extent& extent : region_->extents()) {
    try {
      if (extent.bytes != 0) uffd_->unregister(extent.start, extent.bytes);
    } catch (const SystemError&) {
      // Part of it has been mapped anew. Closing lets go of the rest.
    }
  }
}

void UffdWpTracker::disarm() {
  server_.stop();
  if (uffd_) let_go();
  uffd_.reset();
  discards_.reset();
  armed_pages_ = 0;
}

}  // namespace memferry
