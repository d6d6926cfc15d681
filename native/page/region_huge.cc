// Regions of reserved huge pages.
#include <linux/memfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>
#include <utility>

#include "os/mapping.h"
#include "os/sys_error.h"
#include "page/region.h"

namespace memferry {

std::shared_ptr<Region> Region::allocate_huge(std::uint64_t bytes) {
  if (bytes == 0 || bytes % kHugePageBytes != 0)
    throw std::invalid_argument("a region of huge pages has a length of whole ones");
  UniqueFd file(::memfd_create("memferry", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB));
  if (!file) throw_errno("memfd_create(MFD_HUGE_2MB)");
  if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) throw_errno("ftruncate");
  Mapping mapping;
  try {
    mapping = Mapping::shared(file.get(), bytes);  // reserves them
  } catch (const SystemError& error) {
    if (error.error() != ENOMEM) throw;
    throw SystemError("there are not " + std::to_string(bytes / kHugePageBytes) +
                          " free huge pages of 2 MiB (sysctl vm.nr_hugepages reserves them)",
                      ENOMEM);
  }
  std::shared_ptr<Region> region(
      new Region({Extent{mapping.start(), bytes}}, bytes, true, system_page_size()));
  (void)mapping.release();
  region->memory_ = std::move(file);
  return region;
}

}  // namespace memferry
