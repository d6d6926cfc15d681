// A snapshot of a guest's memory: a file, mapped to be read by the kernel's copies alone. Nothing here follows a pointer
// into it, so that a file that shrinks or a disk that fails is an error, not a signal.
//
// Threads: any; it never changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "os/mapping.h"

namespace memferry {

class SnapshotFile {
 public:
  // Throws SystemError (open, mmap), std::invalid_argument (no regular file, or an empty one).
  static std::shared_ptr<const SnapshotFile> open(const std::string& path);
  [[nodiscard]] std::uint64_t bytes() const { return mapping_.size(); }
  // Bytes [offset, offset + length); throws std::out_of_range beyond the file.
  [[nodiscard]] const std::byte* at(std::uint64_t offset, std::uint64_t length) const;

 private:
  explicit SnapshotFile(Mapping mapping) : mapping_(std::move(mapping)) {}
  Mapping mapping_;
};

}  // namespace memferry
