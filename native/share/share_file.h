// Reading and opening the file of a page share, for its writer and its readers. Threads: any.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "page/content_hash.h"
#include "share/share_format.h"

namespace memferry::share {

// False where the file is too short, or anything else goes wrong.
bool read_at(int fd, std::uint64_t offset, std::span<std::byte> into);
// Length of a regular file that still has a name; nullopt otherwise.
std::optional<std::uint64_t> length_of(int fd);
// Whether it begins with the header of a share: of whatever domain (kAny), or of this one and page size.
enum class Found : std::uint8_t { kNothing, kOther, kOurs };
Found header_of(int fd, const ContentHasher& hasher, std::uint64_t page_size);
// The index block of a group: as many entries as could be read, all or none.
std::span<const ShareEntry> read_index(int fd, const ShareLayout& layout, std::uint64_t group,
                                       std::vector<ShareEntry>& into);

}  // namespace memferry::share
