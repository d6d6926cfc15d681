// Whether memory is registered with a userfaultfd that somebody else made, and for what: learnt from the errors of
// copies that cannot succeed, so that nothing is changed.
//
// Threads: any.
#pragma once

#include <cstdint>

#include "os/userfaultfd.h"

namespace memferry {

struct Registration {
  bool missing = false;        // pages can be installed
  bool write_protect = false;  // and be protected as they are
};
// Of the page of `page_size` bytes at `at`. Throws SystemError (EINVAL: pages there are of another size; ESRCH: its
// owner is gone).
[[nodiscard]] Registration registration_at(const Userfaultfd& uffd, OwnerAddress at, std::uint64_t page_size);

}  // namespace memferry
