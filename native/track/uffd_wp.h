// Dirty tracking by userfaultfd's write protection (Linux 5.14): the first write to a protected page stops its thread
// until a thread of ours has lifted the protection of that page.
//
// What was written is not recorded there: collect() reads in /proc/self/pagemap which pages are unprotected (bit 57, of
// Linux 5.14), reports them, and protects those again, and no others. So whatever takes a page's protection away counts
// as a write: a discard, a mapping made anew. A write that races with the reading lifts the protection, which the next
// collect() finds.
//
// Kernels before 6.4 cannot protect a page that is not there. There every page is read once first, which maps the shared
// page of zeros, and that one can be protected.
//
// A thread that waits for ours never waits for good: our thread needs neither JavaScript nor a lock, and when it cannot
// go on it lets go of the whole memory and collect() throws.
//
// Threads: as every tracker; mf-wp serves the faults.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <span>

#include "os/pagemap.h"
#include "os/userfaultfd.h"
#include "os/worker_thread.h"
#include "track/dirty_tracker.h"
#include "track/discard_watch.h"

namespace memferry {

class UffdWpTracker final : public DirtyTracker {
 public:
  static constexpr std::uint64_t kFeatures = UFFD_FEATURE_PAGEFAULT_FLAG_WP;

  // kNever: as before Linux 6.4, for tests.
  enum class ProtectEmpty { kWherePossible, kNever };
  explicit UffdWpTracker(std::shared_ptr<Region> region, const TrackerOptions& options = {},
                         ProtectEmpty protect_empty = ProtectEmpty::kWherePossible);
  ~UffdWpTracker() override { disarm(); }

  [[nodiscard]] static std::optional<std::string> refusal(const Region& region, const TrackerOptions& options);

  [[nodiscard]] std::string_view name() const override { return "uffd-wp"; }
  void arm() override;
  std::uint64_t collect(AtomicBitmap& dirty) override;
  void disarm() override;

  // Faults served since arm().
  [[nodiscard]] std::uint64_t faults() const { return faults_.load(std::memory_order_relaxed); }

 private:
  void serve(WorkerThread& thread);
  void lift(Address address);
  void give_up(int error);
  void let_go();
  void register_pages(std::uint64_t from, std::uint64_t to);
  void register_grown(std::uint64_t pages);
  void protect_all(Extent extent);
  void protect(OwnerAddress start, std::uint64_t bytes, std::span<const std::uint64_t> entries);

  const std::shared_ptr<Region> region_;
  const Writers writers_;
  const ProtectEmpty protect_empty_;
  Pagemap pagemap_;
  std::optional<Userfaultfd> uffd_;  // armed while it is there
  bool read_first_ = false;          // empty pages cannot be protected
  std::optional<DiscardWatch> discards_;
  std::uint64_t armed_pages_ = 0;
  std::atomic<std::uint64_t> huge_page_bytes_{0};  // a protection is lifted by so much, 0: by system pages
  std::atomic<int> failed_{0};                     // why the server gave up
  std::atomic<std::uint64_t> faults_{0};
  WorkerThread server_;  // last: it uses the others
};

}  // namespace memferry
