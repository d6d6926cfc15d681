// What the destination knows about each page of one region: a few bits a page, shared by the threads that
// receive, the pager and the owner.
//
// Threads: any; each bit changes atomically. What the bits mean together:
//
//   received             the page's newest content is here, or a thread that has it is about to install it.
//                        While paging, whoever sets this bit owns the page's installation: nobody overwrites.
//   present              memory is behind the page (by our hand, or it was there before we began)
//   zero                 known to be zeros. A zero page that is not present needs no memory: it reads as zeros
//                        once the memory is ordinary again, and until then the pager serves it by itself.
//   suspect              (filling) arrived, but its checksum did not fit; it must come again
//   arriving             (filling) a channel is writing there right now; a second one is a protocol error
//   unnamed              suspect, and the source has not been told yet
//   lost                 (paging) will never come; `received` too, so that nobody installs it any more
//   poisoned             a lost page that fails to be read
//   failing              whatever it is, it was made to fail
//
//   paging: received, neither present nor zero = being installed right now by the thread that claimed it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

#include "page/bitmap.h"
#include "page/hash.h"
#include "page/region.h"

namespace memferry {

class ArrivalMap {
 public:
  // `memory_is_empty`: nothing is populated there, so that what is absent reads as zeros.
  ArrivalMap(std::shared_ptr<Region> region, bool memory_is_empty, bool keep_hashes);

  [[nodiscard]] Region& region() const { return *region_; }
  [[nodiscard]] std::uint64_t page_size() const { return region_->page_size(); }
  // The pages that the migration moves. Not Region::pages(): a guest that runs here already may have grown
  // its memory, and those pages are its own.
  [[nodiscard]] std::uint64_t pages() const { return pages_.load(std::memory_order_acquire); }
  void grow(std::uint64_t pages, bool memory_is_empty);

  AtomicBitmap received;
  AtomicBitmap present;
  AtomicBitmap zero;
  AtomicBitmap suspect;
  AtomicBitmap arriving;
  AtomicBitmap unnamed;
  AtomicBitmap lost;
  AtomicBitmap poisoned;
  AtomicBitmap failing;

  [[nodiscard]] std::uint64_t missing() const {
    const std::uint64_t all = pages();
    return all - std::min(all, received.count());
  }
  [[nodiscard]] std::uint64_t extra_bytes() const;

  void keep_hashes(PageRun run, std::span<const std::uint64_t> hashes);
  void keep_zero_hashes(PageRun run);
  [[nodiscard]] Hash128 digest() const;  // throws std::logic_error when hashes are not kept

  // Calls visit(part) for each part of `run` that is contiguous in memory, whoever owns it.
  template <typename Visit>
  void for_each_run(PageRun run, Visit visit) const {
    while (run.count > 0) {
      const PageRun part = region_->contiguous_run(run);
      visit(part);
      run = {part.end(), run.count - part.count};
    }
  }

  // Calls visit(span, first page) for each part of `run` that is contiguous in memory.
  template <typename Visit>
  void for_each_part(PageRun run, Visit visit) const {
    while (run.count > 0) {
      const std::span<std::byte> part = region_->contiguous(run);
      const std::uint64_t pages = part.size() / page_size();
      visit(part, run.first);
      run = {PageNumber{run.first.value + pages}, run.count - pages};
    }
  }

 private:
  std::shared_ptr<Region> region_;
  std::atomic<std::uint64_t> pages_;
  std::uint64_t zero_hash_ = 0;
  std::unique_ptr<std::uint64_t[]>
      hashes_;  // written by std::atomic_ref: a hostile source may send a page twice
};

}  // namespace memferry
