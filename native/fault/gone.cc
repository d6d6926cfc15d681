#include "fault/gone.h"

#include <cerrno>
#include <string>

#include "os/process_maps.h"
#include "os/sys_error.h"

namespace memferry {

void confirm_unmapped(const Process& owner, OwnerAddress at, std::uint64_t page_size, const char* operation) {
  owner.require(operation);
  if (mapped_extent(at, page_size, &owner) == 0) return;
  throw SystemError(std::string(operation) + ": the memory at " + std::to_string(at.value) + " of process " +
                        std::to_string(owner.pid()) + " is mapped, but not by its userfaultfd any more",
                    ENOENT);
}

}  // namespace memferry
