// Puts the pages of a file into a share: an image of a guest that others will be like. Threads: any.
#pragma once

#include <cstdint>
#include <string>

#include "share/page_share.h"

namespace memferry {

struct ShareFill {
  std::uint64_t pages = 0;  // looked at; what is left of a page at the end of the file is not
  std::uint64_t zero = 0;   // of zeros, which cost nothing on the way
  std::uint64_t inserted = 0;
  std::uint64_t there = 0;
  std::uint64_t no_room = 0;
};

// `bytes` 0: to the end. All get the same score. Throws SystemError.
ShareFill fill_from_file(PageShare& share, const std::string& path, std::uint64_t offset, std::uint64_t bytes,
                         double score);

}  // namespace memferry
