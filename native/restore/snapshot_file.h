// A snapshot of a guest's memory: a file, mapped to be read by the kernel's copies alone. Nothing here follows a pointer
// into it, so that a file that shrinks or a disk that fails is an error, not a signal.
//
// Threads: any; it never changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "os/mapping.h"
#include "os/unique_fd.h"

namespace memferry {

class SnapshotFile {
 public:
  // Throws SystemError (open, mmap), std::invalid_argument (no regular file, or an empty one).
  static std::shared_ptr<const SnapshotFile> open(const std::string& path);
  [[nodiscard]] std::uint64_t bytes() const { return mapping_.size(); }
  // Bytes [offset, offset + length); throws std::out_of_range beyond the file.
  [[nodiscard]] const std::byte* at(std::uint64_t offset, std::uint64_t length) const;
  // Reads what lies at `from`, which at() gave, if that needs no waiting for a disk. For single pages this is cheaper than
  // to let the kernel's copy find them in a mapping.
  [[nodiscard]] bool read_now(const std::byte* from, std::span<std::byte> into) const;

  // How many of the `length` bytes at `from` are still in the file.
  [[nodiscard]] std::uint64_t still_has(const std::byte* from, std::uint64_t length) const;

 private:
  SnapshotFile(UniqueFd fd, Mapping mapping) : fd_(std::move(fd)), mapping_(std::move(mapping)) {}
  UniqueFd fd_;
  Mapping mapping_;
};

}  // namespace memferry
