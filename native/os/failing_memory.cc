#include "os/failing_memory.h"

#include <fcntl.h>
#include <sys/mman.h>

#include "os/sys_error.h"

namespace memferry {

FailingMemory::FailingMemory() : empty_(::memfd_create("memferry-failing", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
  if (!empty_) throw_errno("memfd_create");
  // Nobody can give it bytes, by whatever descriptor.
  if (::fcntl(empty_.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) != 0)
    throw_errno("fcntl(F_ADD_SEALS)");
}

bool FailingMemory::put_over(Address start, std::uint64_t bytes) const {
  // Shared: a private one that may be written would count as memory that is promised. Its place in the file is its
  // address, so that neighbours continue each other and become one.
  return ::mmap(start.pointer(), bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE,
                empty_.get(), static_cast<off_t>(start.value)) != MAP_FAILED;
}

}  // namespace memferry
