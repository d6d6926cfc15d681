// What one pager of a guest leaves to the next one: which pages were once settled, whether any has begun, and the events
// that were read of the userfaultfd and are about to be noted.
//
// Why events are read into the ledger, and not into memory of the pager's own (test: ADeathBetweenAReadAndItsNote):
//
//   owner                      pager                      successor
//   discard: event, waits
//                              reads the event
//   goes on                    SIGKILL
//                                                         no bit: would bring the old page; finds the event, and notes it
//
// A process is not killed within read(), and what it reads is there before the signal counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "os/mapping.h"
#include "os/userfaultfd.h"
#include "page/range.h"

namespace memferry {

// In memory, or in a file that outlives the process.
class PageLedger {
 public:
  explicit PageLedger(std::uint64_t pages);
  // `fd` is made as long as it must be. Throws SystemError.
  PageLedger(std::uint64_t pages, int fd);
  [[nodiscard]] bool test(PageNumber page) const;
  std::uint64_t set(PageRun run);  // gives how many were not
  [[nodiscard]] bool begun() const;
  void begin();
  static constexpr std::size_t kEvents = 32;
  // Where events are read to; event 0 is none. They stay there until they are noted.
  [[nodiscard]] std::span<uffd_msg, kEvents> events() const;
  void forget_events(std::size_t count);
  [[nodiscard]] static std::uint64_t bytes_for(std::uint64_t pages);

 private:
  [[nodiscard]] std::uint64_t& word(std::uint64_t index) const;
  const std::uint64_t words_;
  Mapping bits_;  // and the events, and one word more
};

}  // namespace memferry
