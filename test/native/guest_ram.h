// Regions as the RAM of a VM whose guest does the writing, for the suite over all trackers. What lies outside of its
// slots (memory that came later), the test writes itself; the other tracker sees that.
#pragma once

#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kvm_vm.h"
#include "track/kvm_log.h"

namespace memferry {

#if defined(__x86_64__)
class GuestRam {
 public:
  std::unique_ptr<DirtyTracker> make(const std::shared_ptr<Region>& region) {
    auto others = make_tracker(others_kind(), region);
    Vm& vm = vms_[region.get()];
    if (!vm.vm) {
      vm.vm = std::make_unique<WritingVm>();
      vm.pages = region->pages();
      std::uint32_t slot = 0;
      for (std::uint64_t page = 0; page < vm.pages; ++slot) {
        const PageRun run = region->contiguous_run({PageNumber{page}, vm.pages - page});
        vm.vm->map(slot, kGuest + page * region->page_size(), region->address(run.first),
                   run.count * region->page_size());
        vm.slots.push_back({slot, run});
        page += run.count;
      }
    }
    return std::make_unique<KvmLogTracker>(region, KvmLog{vm.vm->fd(), vm.slots, nullptr}, std::move(others));
  }

  // False when the page is in no VM.
  bool write(const std::shared_ptr<Region>& region, std::uint64_t page, std::uint32_t value) {
    const auto found = vms_.find(region.get());
    if (found == vms_.end() || page >= found->second.pages) return false;
    found->second.vm->write(kGuest + page * region->page_size() + 8, value);
    return true;
  }

 private:
  static constexpr std::uint64_t kGuest = 0x100000;
  struct Vm {
    std::unique_ptr<WritingVm> vm;
    std::uint64_t pages = 0;
    std::vector<KvmSlot> slots;
  };
  static TrackerKind others_kind() {
    for (const TrackerKind kind : tracker_kinds()) {
      if (probe_tracker(kind).available) return kind;
    }
    throw std::runtime_error("no tracker works here");
  }
  std::map<const Region*, Vm> vms_;
};
#else
class GuestRam {
 public:
  static std::unique_ptr<DirtyTracker> make(const std::shared_ptr<Region>&) {
    throw std::runtime_error("the guest is a program for x86");
  }
  static bool write(const std::shared_ptr<Region>&, std::uint64_t, std::uint32_t) { return false; }
};
#endif

}  // namespace memferry
