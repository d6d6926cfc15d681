// Whether this kernel gives a read of untouched memory the one page of zeros that all share. Some give it a page of
// its own, which then counts as populated, and rightly.
#pragma once

#include <sys/mman.h>

#include "os/kernel_abi.h"
#include "os/mapping.h"
#include "os/pagemap.h"

namespace memferry {

inline bool reads_share_the_page_of_zeros() {
  Pagemap pagemap;
  if (!pagemap.can_scan()) return false;
  const Mapping memory = Mapping::anonymous(8 * system_page_size());
  if (::madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE) != 0) return false;
  (void)*static_cast<volatile std::byte*>(memory.data());
  Pagemap::Query query;
  query.category_mask = query.return_mask = abi::kPageIsPfnZero;
  bool shared = false;
  pagemap.scan(memory.start(), memory.size(), query, [&](const abi::PageRegion&) { shared = true; });
  return shared;
}

}  // namespace memferry
