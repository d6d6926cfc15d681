// How far memory around an address is mapped, by /proc/self/maps: what V8 does not tell about the
// reservation of a WebAssembly memory, or about one that another thread has grown.
#pragma once

#include <cstdint>

#include "os/address.h"

namespace memferry::bind {

struct MappedSpan {
  std::uint64_t writable_bytes = 0;  // readable and writable anonymous memory, from the address on
  std::uint64_t reserved_bytes = 0;  // the same plus what directly follows it with no access at all
};

// Throws SystemError.
[[nodiscard]] MappedSpan mapped_span(OwnerAddress start);

}  // namespace memferry::bind
