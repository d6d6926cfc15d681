// Huge pages of 2 MiB for a test, and given back after it.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>

#include "os/mapping.h"
#include "os/sys_error.h"
#include "os/userfaultfd.h"
#include "page/region.h"

namespace memferry::test {

class HugePool {
 public:
  explicit HugePool(std::uint64_t pages) : pages_(pages), before_(overcommit()) {
    std::ofstream(kOvercommit) << before_ + pages;
  }
  ~HugePool() {
    if (before_ != overcommit()) std::ofstream(kOvercommit) << before_;
  }
  HugePool(const HugePool&) = delete;
  HugePool& operator=(const HugePool&) = delete;

  // Why they cannot be paged into here; empty: they can.
  [[nodiscard]] std::string obstacle() const {
    const Userfaultfd::Offer offer = Userfaultfd::probe();
    if (!offer.kernel_faults) return std::string("no full userfaultfd here: ") + std::strerror(offer.error);
    if ((offer.features & UFFD_FEATURE_MINOR_HUGETLBFS) == 0)
      return "this kernel does not page huge pages (Linux 5.18)";
    if (system_page_size() != 4096) return "the system's pages are not of 4 KiB";
    try {
      (void)Region::allocate_huge(pages_ * Region::kHugePageBytes);
    } catch (const SystemError&) {
      return "no huge pages to be had here (needs root, and " + std::to_string(2 * pages_) + " MiB)";
    }
    return "";
  }

 private:
  // Not vm.nr_hugepages: other tests set that, and set it back.
  static constexpr const char* kOvercommit = "/proc/sys/vm/nr_overcommit_hugepages";
  static std::uint64_t overcommit() {
    std::uint64_t number = 0;
    std::ifstream(kOvercommit) >> number;
    return number;
  }

  const std::uint64_t pages_;
  const std::uint64_t before_;
};

}  // namespace memferry::test
