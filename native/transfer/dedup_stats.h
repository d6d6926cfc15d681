// What deduplication did for one migration, and what it cost.
#pragma once

#include <cstdint>

namespace memferry {

struct DedupStats {
  std::uint64_t pages =
      0;  // as references: acknowledged ones, in the direct modes sent and not refused so far
  std::uint64_t refused = 0;         // references to what was not there any more
  std::uint64_t examined = 0;        // pages hashed
  std::uint64_t probes = 0;          // contents asked for
  std::uint64_t overhead_bytes = 0;  // on the wire: references, questions, names
  std::uint64_t hash_ns = 0;         // of CPU
  // On the wire, while there was something to send: what the connections take. 0: not known yet.
  double link_bytes_per_second = 0;
  std::uint64_t told = 0;  // pages that servers were told the names of
};

}  // namespace memferry
