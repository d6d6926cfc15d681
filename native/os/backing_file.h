// The file behind a mapping: a memfd, a file in tmpfs, shared anonymous memory, huge pages. It tells what a page table
// cannot: where the memory has content that this process has never touched, and whether something was cut out of it.
//
// Threads: any.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "os/process_maps.h"
#include "os/unique_fd.h"

namespace memferry {

class BackingFile {
 public:
  enum class Kind { kTmpfs, kHugetlbfs, kOther };

  // Of an area of `owner`, or of this process. Nothing when its file cannot be reached: /proc/PID/map_files needs
  // CAP_CHECKPOINT_RESTORE (or CAP_SYS_ADMIN), and no descriptor of this process is the same file. Throws SystemError,
  // OwnerGone.
  static std::optional<BackingFile> of(const MappedArea& area, const Process* owner = nullptr);

  [[nodiscard]] Kind kind() const { return kind_; }
  [[nodiscard]] std::uint64_t page_bytes() const { return page_bytes_; }  // of a hugetlbfs: its huge pages
  // Of tmpfs: visits the ranges of [offset, offset + bytes) that are not holes, in order, in offsets; what is swapped
  // out counts. Throws SystemError.
  void data(std::uint64_t offset, std::uint64_t bytes,
            const std::function<void(std::uint64_t start, std::uint64_t end)>& visit) const;

  // For a shared mapping of one's own. Throws SystemError: sealed against it, or not this process's to write.
  [[nodiscard]] UniqueFd open_for_writing() const;

  [[nodiscard]] int fd() const { return fd_.get(); }

  // When something was last cut out of it, or written: by a system call, or by the first store to a page that had to be
  // mapped for it. Punching the same file twice within a tick of the kernel's clock gives the same stamp: one that is
  // not settled yet counts as changed the next time.
  struct Stamp {
    std::int64_t seconds = 0;
    std::int64_t nanoseconds = 0;
    std::uint64_t blocks = 0;
    bool settled = false;
    // Nothing was cut out between the taking of `earlier` and of this one.
    [[nodiscard]] bool same_as(const Stamp& earlier) const {
      return earlier.settled && seconds == earlier.seconds && nanoseconds == earlier.nanoseconds;
    }
  };
  [[nodiscard]] Stamp stamp() const;

 private:
  BackingFile(UniqueFd fd, Kind kind, std::uint64_t page_bytes)
      : fd_(std::move(fd)), kind_(kind), page_bytes_(page_bytes) {}
  UniqueFd fd_;
  Kind kind_;
  std::uint64_t page_bytes_;
};

}  // namespace memferry
