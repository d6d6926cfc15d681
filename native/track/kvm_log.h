// Dirty tracking of a KVM guest's RAM by KVM's own log (KVM_GET_DIRTY_LOG). It costs no page fault where the CPU logs
// by itself, needs no userfaultfd, and works over shared memory too.
//
// The log knows what vCPUs write and what KVM writes for them, and nothing else. A VMM writes guest RAM as well
// (loading it, devices), and so may the kernel for it (read() straight into RAM). None of that may be lost, so there is
// no tracker of the log alone: it comes with one of
// - another tracker over the same memory, which sees these writes. Safe whatever the VMM does; costs what both cost;
// - marks, when the VMM promises to mark what it writes, and what it has others write. Pages that no slot covers are
//   the VMM's to mark as well.
// Nobody can see what devices write that have been given the memory (VFIO, vhost): their own logs have to be marked.
//
// The slots are the VMM's: it sets KVM_MEM_LOG_DIRTY_PAGES before arm() and leaves it set, and reads no log itself while
// this tracker is armed, since reading takes. A slot without a log, of another length, or of a VM of another process
// is an error, never "nothing was written". Which address a slot has KVM does not tell, so that is the VMM's word.
//
// Where KVM can (Linux 5.2), reading and protecting again are two steps, the latter in parts, so that vCPUs do not wait
// for a pass over all memory: arm() turns KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 on for the VM, and it stays on.
//
// Threads: as every tracker; marks from any.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "os/mapping.h"
#include "os/unique_fd.h"
#include "track/dirty_tracker.h"
#include "track/write_marks.h"

namespace memferry {

struct KvmSlot {
  std::uint32_t slot = 0;  // as in KVM_SET_USER_MEMORY_REGION: the address space in its upper 16 bits
  PageRun pages;           // of the region, contiguous in memory: what the slot maps, all of it
};

struct KvmLog {
  int vm_fd = -1;  // of a VM of this process; duplicated
  std::vector<KvmSlot> slots;
  std::shared_ptr<WriteMarks> marks;  // of the region's capacity; null: the VMM promises nothing
  bool manual_protect = true;         // where KVM can; false: the VM has it off, and it stays off
};

class KvmLogTracker final : public DirtyTracker {
 public:
  // `others`: over the same region; null only with marks. Throws std::invalid_argument (slots outside the region, in
  // several pieces or twice; neither marks nor another tracker), SystemError (no descriptor of a VM).
  KvmLogTracker(std::shared_ptr<Region> region, KvmLog log, std::unique_ptr<DirtyTracker> others);

  [[nodiscard]] std::string_view name() const override { return "kvm-log"; }
  // Throws SystemError: ENOENT when a slot has no log, EINVAL when it is not as long as was said, EIO when the VM
  // is another process's or dead, ENXIO when it has a dirty ring instead.
  void arm() override;
  std::uint64_t collect(AtomicBitmap& dirty) override;
  void disarm() override;
  [[nodiscard]] const AtomicBitmap* populated_when_armed() const override {
    return others_ ? others_->populated_when_armed() : nullptr;
  }
  [[nodiscard]] bool wants_sent() const override { return others_ && others_->wants_sent(); }
  void sent(PageNumber page, std::uint64_t xxh3) override {
    if (others_) others_->sent(page, xxh3);
  }

 private:
  void enable_manual_protect();
  void check_length(const KvmSlot& slot) const;
  void read_log(const KvmSlot& slot, std::span<std::uint64_t> words) const;
  void protect_again(const KvmSlot& slot, std::span<std::uint64_t> words) const;
  void take_log(const KvmSlot& slot);
  void find(const KvmSlot& slot, std::span<const std::uint64_t> words);
  [[nodiscard]] std::uint64_t small_pages(const KvmSlot& slot) const;
  [[nodiscard]] std::span<std::uint64_t> words_of(const KvmSlot& slot) const;

  const std::shared_ptr<Region> region_;
  const KvmLog log_;
  const UniqueFd vm_;
  const std::unique_ptr<DirtyTracker> others_;
  // Words as long as the longest slot's, up to an inaccessible page: KVM writes as many as the slot has.
  Mapping words_;
  // What was taken from the log and not reported yet: a collect() that fails half-way loses nothing.
  AtomicBitmap found_;
  bool can_clear_ = false;  // KVM_CLEAR_DIRTY_LOG is there
  bool manual_protect_ = false;
  bool armed_ = false;
  std::uint64_t armed_pages_ = 0;
};

// Whether this process may use KVM at all. What a VM's log needs beyond that shows when it is armed.
[[nodiscard]] TrackerProbe probe_kvm_log();

}  // namespace memferry
