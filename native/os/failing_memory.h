// Addresses that fail to be read and written, for kernels that cannot poison pages (before Linux 6.6): a mapping of a
// file that has no bytes, and never gets any, is put over them. Whoever touches one gets SIGBUS, a system call EFAULT,
// as from a poisoned page. Unlike a mere PROT_NONE it stays so when the owner changes the protection of the whole area
// later, as V8 does when a WebAssembly memory grows: the pages would then read as zeros.
//
// Threads: any.
#pragma once

#include <cstdint>

#include "os/address.h"
#include "os/unique_fd.h"

namespace memferry {

class FailingMemory {
 public:
  // Throws SystemError. The file is made here, so that nothing has to be had when pages are lost.
  FailingMemory();

  // Replaces what is mapped there, content and userfaultfd registration included; whoever waits for a page of it has to
  // be woken. False when the process may have no more mappings: then nothing has changed. Pages side by side share one
  // mapping, however many calls it took.
  [[nodiscard]] bool put_over(Address start, std::uint64_t bytes) const;

 private:
  UniqueFd empty_;
};

}  // namespace memferry
