// Bringing memory of this process in from wherever it is (a file on a disk, swap), without ever following a pointer to
// it: what cannot be had is an error, where an access would be SIGBUS.
//
// Threads: any; blocks for as long as the disk takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace memferry {

// The bytes from the start on, in whole system pages, that could be read: all of them, or up to the first page that
// cannot be (past the end of a file that has shrunk, a disk that fails).
[[nodiscard]] std::uint64_t touch(std::span<const std::byte> memory);
// The same of those that need no waiting. Where the kernel does not tell (a file of somebody else's), all of them.
[[nodiscard]] std::uint64_t resident(std::span<const std::byte> memory);

}  // namespace memferry
