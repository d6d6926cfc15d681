// What is mapped around an address, by /proc/PID/maps, of this process or another. Where Linux answers questions about
// single areas (PROCMAP_QUERY, 6.11) a look at few of them costs microseconds; else all of the text is read.
//
// Threads: any. What it says may be outdated when it is read: other threads map and unmap.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

#include "os/address.h"
#include "os/process.h"

namespace memferry {

struct MappedArea {
  OwnerAddress start;
  OwnerAddress end;
  bool readable = false;
  bool writable = false;
  bool shared = false;
  bool file = false;         // has an inode: a file, a memfd, shared anonymous memory
  std::uint64_t offset = 0;  // in that file
  std::uint64_t inode = 0;
  std::uint64_t device = 0;  // as stat's st_dev
  std::string_view name;     // valid during the visit; of for_each_mapped_area() only
};

// Calls visit for every mapped area in ascending order until it gives false. Of `owner`; of this process without one.
// Throws SystemError; OwnerGone also after the last visit: then what was visited may have been another program's.
void for_each_mapped_area(const std::function<bool(const MappedArea&)>& visit,
                          const Process* owner = nullptr);

// The same from the first area on that ends above `from`, and without names.
void for_each_mapped_area_from(OwnerAddress from, const std::function<bool(const MappedArea&)>& visit,
                               const Process* owner = nullptr);

// The same for the areas of which a userfaultfd is asked for missing pages, whoever has it; an area's bounds alone are
// told. The kernel walks the page tables for it: some milliseconds a GiB. Throws like the one above.
void for_each_paged_area(const std::function<void(OwnerAddress start, OwnerAddress end)>& visit,
                         const Process* owner);

// Bytes from `start` on, without a gap, that are readable and writable; at most `limit_bytes`.
[[nodiscard]] std::uint64_t writable_extent(OwnerAddress start, std::uint64_t limit_bytes);
// The same for what is mapped with whatever protection: a WebAssembly memory's reservation, its tail
// included.
[[nodiscard]] std::uint64_t mapped_extent(OwnerAddress start, std::uint64_t limit_bytes,
                                          const Process* owner = nullptr);
// True when all of [start, start + bytes) is mapped private and anonymous. Only there does a page that is not
// in the page tables hold zeros, and only there does every write of its process go through these addresses.
[[nodiscard]] bool is_private_anonymous(OwnerAddress start, std::uint64_t bytes,
                                        const Process* owner = nullptr);

}  // namespace memferry
