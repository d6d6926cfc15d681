// /proc/PID/pagemap, of this process or another: which pages are populated, which were written since they were
// write-protected, both by the PAGEMAP_SCAN ioctl (Linux 6.7); the former also by reading the file.
//
// Threads: one at a time; the buffer is reused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "os/address.h"
#include "os/kernel_abi.h"
#include "os/process.h"
#include "os/unique_fd.h"

namespace memferry {

struct AddressRange {
  OwnerAddress start;
  OwnerAddress end;
  friend bool operator==(const AddressRange&, const AddressRange&) = default;
};

class Pagemap {
 public:
  // Runs that one call can report, 24 bytes each: every other page of 512 MiB.
  static constexpr std::size_t kUsualRuns = 64UL * 1024;
  // Throws SystemError (open).
  explicit Pagemap(std::size_t runs_at_once = kUsualRuns);
  // Of `owner`; of this process when there is none. What is asked throws OwnerGone when it is not there any more: a
  // scan of an address space that nobody uses finds nothing, and says so without a word.
  explicit Pagemap(std::shared_ptr<const Process> owner, std::size_t runs_at_once = kUsualRuns);

  // True when PAGEMAP_SCAN is there.
  [[nodiscard]] bool can_scan() const;

  struct Query {
    std::uint64_t flags = 0;
    std::uint64_t category_mask = 0;
    std::uint64_t category_inverted = 0;
    std::uint64_t category_anyof_mask = 0;
    std::uint64_t return_mask = 0;
  };
  // Calls visit(const abi::PageRegion&) for every run of matching pages of [start, start + bytes). A page may
  // come twice: when its last pages match more than 511 runs, the kernel (6.18) gives a walk_end before what
  // it has reported already. Going on from there is right all the same: with kScanWpMatching a page that
  // comes again was written again. Throws SystemError (PAGEMAP_SCAN): EPERM when kScanCheckWpAsync finds
  // memory that is not registered. Memory that is not mapped is skipped silently, as the kernel does it.
  template <typename Visit>
  void scan(OwnerAddress start, std::uint64_t bytes, const Query& query, Visit visit) {
    std::uint64_t at = start.value;
    const std::uint64_t end = start.value + bytes;
    while (at < end) {
      const Batch batch = scan_once(at, end, query);
      for (std::size_t i = 0; i < batch.count; ++i) visit(buffer_[i]);
      at = batch.walk_end;
    }
    if (owner_) owner_->require("PAGEMAP_SCAN");
  }

  // The runs of pages whose content may differ from zeros: present (but for the shared page of zeros, where
  // the kernel can tell) or swapped out. Throws SystemError.
  // For private anonymous memory: elsewhere a page that is not in the page tables may have content, see
  // is_private_anonymous(). Pages that userfaultfd has write-protected while they were empty look swapped
  // out, so that after a tracker was armed this reports too much; DirtyTracker::populated_when_armed() does
  // not.
  void populated(OwnerAddress start, std::uint64_t bytes, const std::function<void(AddressRange)>& visit);
  // The same without PAGEMAP_SCAN, for kernels before 6.7.
  void populated_by_reading(OwnerAddress start, std::uint64_t bytes,
                            const std::function<void(AddressRange)>& visit);

  // The runs of pages that can be read without waiting for anybody: present, and not the shared page of zeros where the
  // kernel can tell. What is swapped out, missing or poisoned is none. Throws SystemError.
  void present(OwnerAddress start, std::uint64_t bytes, const std::function<void(AddressRange)>& visit);

  [[nodiscard]] std::uint64_t buffer_bytes() const { return buffer_.capacity() * sizeof(abi::PageRegion); }

 private:
  struct Batch {
    std::size_t count = 0;
    std::uint64_t walk_end = 0;
  };
  Batch scan_once(std::uint64_t start, std::uint64_t end, const Query& query);
  void read_entries(OwnerAddress start, std::uint64_t bytes, std::uint64_t any_of,
                    const std::function<void(AddressRange)>& visit);

  std::shared_ptr<const Process> owner_;  // nullptr: this process
  UniqueFd fd_;
  const std::size_t runs_at_once_;
  std::vector<abi::PageRegion> buffer_;
};

}  // namespace memferry
