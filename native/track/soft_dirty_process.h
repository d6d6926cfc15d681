// The soft-dirty bits of one process, for all trackers that watch memory of it.
//
// The kernel resets the bits of the whole process at once (/proc/PID/clear_refs). So one tracker's reset would lose what
// the others have not read: every look reads for all of them, and keeps what it finds until they ask.
//
// And a reset loses writes by itself:
//
//   tracker: reads page 7's entry: clean             resets all bits      next look: page 7 is clean
//   guest:                            writes page 7
//
// Reading after the reset does not help, since by then the bit is gone. Nothing that stays in the kernel tells of such a
// write, so there must not be one: the process's threads stand still from the first entry that is read to the reset
// (ThreadFreezer). What still writes then: DMA into pinned buffers, and other processes by process_vm_writev, as with
// every tracker that goes by page tables.
//
// Somebody else may reset the bits too (CRIU, another tracker outside). A page outside the watched memory tells: it is
// written right after each reset, in the same stop (one of our own; in another process the end of its stack, where a byte
// is replaced by itself). When its bit is gone at the next look, everything counts as written.
//
// KSM drops the bit of a page that it merges. While it is at work, every page that is common with another one, merged or
// shared with a child of fork(), counts as written at each look.
//
// Threads: any; a look is made by one at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "os/mapping.h"
#include "os/pagemap.h"
#include "os/process.h"
#include "os/unique_fd.h"
#include "page/bitmap.h"
#include "page/region.h"

namespace memferry {

// What one tracker wants to know. Its process's lock guards it, but for the pages and extents.
struct SoftDirtyWatch {
  explicit SoftDirtyWatch(std::uint64_t capacity_pages)
      : written(capacity_pages), content(capacity_pages), doubtful(capacity_pages) {}
  std::vector<Extent> extents;    // as they are at this look
  std::uint64_t known_pages = 0;  // seen by a look: those beyond count as written
  AtomicBitmap written;           // since the tracker last asked
  AtomicBitmap content;           // may hold something else than zeros, as far as was reported
  AtomicBitmap doubtful;          // had content, and may have become the page of zeros without a write
};

class SoftDirtyProcess {
 public:
  // That of `owner`, or of this process; one for all trackers of it here. Throws SystemError, OwnerGone.
  static std::shared_ptr<SoftDirtyProcess> of(const std::shared_ptr<Process>& owner);

  // From now on `watch` sees writes. It must leave before it goes. `is_zero` looks at a page of it. Throws SystemError.
  void enter(SoftDirtyWatch& watch, std::vector<Extent> extents,
             const std::function<bool(PageNumber)>& is_zero);
  void leave(SoftDirtyWatch& watch);
  // Everything written until now is in every watch's `written`. `extents` are `watch`'s as they are by now. Throws
  // SystemError.
  void look(SoftDirtyWatch& watch, std::vector<Extent> extents,
            const std::function<bool(PageNumber)>& is_zero);

  // Whether the kernel keeps the bits at all.
  [[nodiscard]] static bool kernel_has_it();

 private:
  explicit SoftDirtyProcess(std::shared_ptr<Process> owner);
  [[nodiscard]] bool is_of(const std::shared_ptr<Process>& owner) const;
  void find_canary();
  void touch_canary();
  // Whether KSM may have merged pages since the last call.
  [[nodiscard]] bool ksm_merges();
  void look_locked(SoftDirtyWatch* arming);
  void read_and_reset();
  void read(SoftDirtyWatch& watch, bool all_written);
  void note(SoftDirtyWatch& watch, PageNumber page, std::uint64_t entry, bool all_written);
  static void settle(SoftDirtyWatch& watch, bool arming, const std::function<bool(PageNumber)>& is_zero);

  const std::shared_ptr<Process> owner_;  // nullptr: this process
  const pid_t pid_;
  std::mutex mutex_;  // guards all below
  UniqueFd pagemap_;
  UniqueFd clear_refs_;
  UniqueFd tasks_;  // another process's
  Mapping own_page_;
  OwnerAddress canary_;  // 0: there is none
  Mapping entries_;      // read into while nobody may allocate
  std::vector<SoftDirtyWatch*> watches_;
  SoftDirtyWatch* arming_ = nullptr;
  bool canary_set_ = false;
  bool merging_ = false;
  std::uint64_t ksm_scanned_ = 0;
  std::uint64_t ksm_scans_ = 0;
  int error_ = 0;  // of the look under way
  const char* failed_ = "";
};

}  // namespace memferry
