// Pages that somebody says he has written, for a tracker that cannot see him: a VMM that writes its guest's memory
// itself marks what it wrote. Mark AFTER the write: marked before, a page could be collected and copied in between.
// And mark before the guest counts as paused.
//
// Threads: any, all at once.
#pragma once

#include <cstdint>
#include <span>

#include "os/mapping.h"
#include "page/bitmap.h"

namespace memferry {

class WriteMarks {
 public:
  // Zeros, in a mapping: what is never marked costs nothing. Throws SystemError (mmap), std::invalid_argument.
  explicit WriteMarks(std::uint64_t capacity_pages);

  [[nodiscard]] std::uint64_t capacity() const { return capacity_; }
  // Throws std::out_of_range.
  void mark(PageRun run);
  // Takes all marks and ORs them into `into`, of at least this capacity.
  void take(AtomicBitmap& into);
  void clear();

  // For whoever marks without this class, from another library or language: page p is bit p % 64 of word p / 64,
  // set by an atomic OR (release) after the write.
  [[nodiscard]] std::span<std::uint64_t> words() const;

 private:
  const std::uint64_t capacity_;
  Mapping memory_;
};

}  // namespace memferry
