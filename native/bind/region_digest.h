// The digest of a whole region: XXH3_128 over the hashes of its pages.
#pragma once

#include <memory>

#include "page/hash.h"
#include "page/region.h"

namespace memferry::bind {

// Of the pages that the region has at the start. Pages are read by system calls, so that one that cannot be
// had (poisoned, or missing with nobody to serve it) is an exception and not a signal.
// Throws CodedError (UNREADABLE), RegionGone, std::bad_alloc.
[[nodiscard]] Hash128 region_digest(const std::shared_ptr<Region>& region);

// Copies pages of our own memory by system call, so that one that cannot be read is an error (CodedError UNREADABLE) and
// no signal. False when this system does not let a process do so.
bool read_piece(std::span<std::byte> from, std::byte* to, PageNumber first);
// The same of pages of a region that are contiguous, whoever owns its memory.
void read_run(const Region& region, PageRun run, std::byte* to);

}  // namespace memferry::bind
