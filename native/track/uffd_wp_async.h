// Dirty tracking by userfaultfd's asynchronous write protection and PAGEMAP_SCAN (Linux 6.7): the kernel
// lifts the protection of a page when it is first written, and one ioctl finds those pages and protects them
// again, atomically for each page.
//
// What it does not see: io_uring's READ_FIXED into pinned buffers, and writes to shared memory through
// another mapping; so it refuses memory of this process that is not private and anonymous. Of attached memory, which may
// be shared with this process, whoever attaches it says that its owner alone writes it, by these addresses.
//
// Attached memory is tracked by the userfaultfd that came with it, which must have been made with WP_ASYNC.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "os/pagemap.h"
#include "os/userfaultfd.h"
#include "page/contents.h"
#include "track/dirty_tracker.h"

namespace memferry {

class UffdWpAsyncTracker final : public DirtyTracker {
 public:
  static constexpr std::uint64_t kFeatures = abi::kUffdFeatureWpAsync | abi::kUffdFeatureWpUnpopulated;

  explicit UffdWpAsyncTracker(std::shared_ptr<Region> region);
  ~UffdWpAsyncTracker() override { UffdWpAsyncTracker::disarm(); }
  UffdWpAsyncTracker(const UffdWpAsyncTracker&) = delete;
  UffdWpAsyncTracker& operator=(const UffdWpAsyncTracker&) = delete;

  [[nodiscard]] std::string_view name() const override { return "uffd-wp-async"; }
  void arm() override;
  std::uint64_t collect(AtomicBitmap& dirty) override;
  void disarm() override;
  [[nodiscard]] const AtomicBitmap* populated_when_armed() const override { return populated_.get(); }

 private:
  void register_memory();
  void register_up_to(std::uint64_t pages);
  void look_for_content(std::uint64_t pages);
  std::uint64_t collect_holes(AtomicBitmap& dirty);
  void check_still_mapped(OwnerAddress start, std::uint64_t bytes) const;
  [[nodiscard]] Userfaultfd& uffd();
  // Protects pages [first, end) and calls visit(PageRun, categories) for those that had been written.
  template <typename Visit>
  void protect(std::uint64_t first, std::uint64_t end, std::uint64_t return_mask, Visit visit);

  const std::shared_ptr<Region> region_;
  Pagemap pagemap_;
  std::optional<Userfaultfd> uffd_;  // of this process's own memory, armed while it is there
  bool armed_ = false;
  std::uint64_t registered_pages_ = 0;
  std::uint64_t armed_pages_ = 0;
  std::unique_ptr<AtomicBitmap> populated_;
  // Of a shared file: which of its pages were there at the last look. Holes that were made since (a balloon) count as
  // written; write protection tells nothing of them.
  std::unique_ptr<AtomicBitmap> content_;
};

}  // namespace memferry
