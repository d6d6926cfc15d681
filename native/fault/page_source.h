// Where a guest's pages come from when no migration brings them: a snapshot's file, a parked image.
//
// Threads: read() from several at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "os/unique_fd.h"
#include "page/range.h"

namespace memferry {

class PageSource {
 public:
  virtual ~PageSource() = default;
  // The bytes of `run`, all of them or none: throws std::exception when they cannot be had. May block.
  virtual void read(PageRun run, std::span<std::byte> into) = 0;
};

// A file with the pages in order, from `offset` on. What lies beyond its end cannot be had.
class FilePageSource final : public PageSource {
 public:
  // Duplicates `fd`. Throws SystemError; std::invalid_argument when it is no regular file.
  FilePageSource(int fd, std::uint64_t offset, std::uint64_t page_size);
  void read(PageRun run, std::span<std::byte> into) override;
  [[nodiscard]] std::uint64_t pages() const;

 private:
  UniqueFd file_;
  std::uint64_t offset_;
  std::uint64_t page_size_;
};

}  // namespace memferry
