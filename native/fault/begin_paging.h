// The first step of paging another process's memory: from here on who touches what is not there waits for it.
#pragma once

#include "page/region.h"

namespace memferry {

// Registers all of it by its userfaultfd for missing pages. Whoever does so first sees to it that nothing is there:
// SystemError (EEXIST) with the pages, and nothing is registered. Where somebody has done it before, nothing more is done.
// (Memory that was reserved in its file but never written is dropped: it would read as zeros.) Of huge pages: EOPNOTSUPP.
void begin_paging(Region& region);

}  // namespace memferry
