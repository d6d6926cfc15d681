// A region's pages from a file, to a file, and from another region, without passing through JavaScript. All of it in
// pieces that the caller chooses, so that it can stop in between; files are named anew for each piece.
//
// Thread: any; the regions are in use meanwhile, so a retire() waits.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "page/region.h"

namespace memferry::bind {

// Reads the file from `offset` on into the pages of `run`, as far as the file goes; gives the bytes. The rest stays as
// it is. Throws SystemError, RegionGone, std::out_of_range.
std::uint64_t fill_from_file(const std::shared_ptr<Region>& region, const std::string& path,
                             std::uint64_t offset, PageRun run);
// The same from the pages with the same numbers of another region, as far as that goes. An unreadable page: CodedError.
std::uint64_t fill_from_region(const std::shared_ptr<Region>& region, const std::shared_ptr<Region>& from,
                               PageRun run);
// Writes the pages of `run` to where they belong in a file that exists. Zeros are left out: the file is to have a hole
// there. An unreadable page: CodedError.
void save_to_file(const std::shared_ptr<Region>& region, const std::string& path, PageRun run);

}  // namespace memferry::bind
