// Dirty tracking by the kernel's soft-dirty bits (CONFIG_MEM_SOFT_DIRTY, Linux 3.11): no fault is served by anybody, and
// nothing of the memory is registered anywhere. Every look stops the whole process for as long as reading its entries
// and resetting its bits takes (SoftDirtyProcess says why), and after it every first write of the process to a page, of
// whatever memory, costs a fault in the kernel.
//
// Reports too much where the kernel has joined the memory with a new mapping beside it.
#pragma once

#include <memory>

#include "page/region_reader.h"
#include "track/dirty_tracker.h"
#include "track/soft_dirty_process.h"

namespace memferry {

class SoftDirtyTracker final : public DirtyTracker {
 public:
  explicit SoftDirtyTracker(std::shared_ptr<Region> region);
  ~SoftDirtyTracker() override { disarm(); }

  [[nodiscard]] static std::optional<std::string> refusal(const Region& region);

  [[nodiscard]] std::string_view name() const override { return "soft-dirty"; }
  void arm() override;
  std::uint64_t collect(AtomicBitmap& dirty) override;
  void disarm() override;
  [[nodiscard]] const AtomicBitmap* populated_when_armed() const override;

 private:
  void check_memory() const;
  [[nodiscard]] bool page_is_zero(const RegionUse& use, PageNumber page);

  const std::shared_ptr<Region> region_;
  RegionReader reader_;
  std::shared_ptr<SoftDirtyProcess> process_;
  std::unique_ptr<SoftDirtyWatch> watch_;  // armed while it is there
  std::unique_ptr<AtomicBitmap> populated_;
};

}  // namespace memferry
