// Whether something was cut out of a file of tmpfs, or written to it by a system call, as inotify tells it. Stores
// through mappings are not told, so that a running guest does not look like one that discards: the file's times, the
// other sign of a cut, change with the first store to a page as well (measured on 6.18).
//
// Threads: one at a time.
#pragma once

#include <optional>

#include "os/unique_fd.h"

namespace memferry {

class CutWatch {
 public:
  // Nothing where the kernel does not tell (memfds and shared anonymous memory on newer kernels; the file may not be
  // watched; no more watches are to be had).
  static std::optional<CutWatch> of(int file);

  // Since the last call, or since of(). What goes on during the call may be told by the next one. True where it is not
  // known.
  [[nodiscard]] bool changed();

 private:
  explicit CutWatch(UniqueFd events) : events_(std::move(events)) {}
  UniqueFd events_;  // none any more: the kernel has taken the watch away
};

}  // namespace memferry
