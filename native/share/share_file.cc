#include "share/share_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>

namespace memferry::share {

ContentDigest check_of(const ContentHasher& hasher) {
  static constexpr std::string_view kLabel = "memferry page share";
  return hasher(std::as_bytes(std::span(kLabel)));
}

bool read_at(int fd, std::uint64_t offset, std::span<std::byte> into) {
  while (!into.empty()) {
    const ssize_t got = ::pread(fd, into.data(), into.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    offset += static_cast<std::uint64_t>(got);
    into = into.subspan(static_cast<std::size_t>(got));
  }
  return true;
}

std::optional<std::uint64_t> length_of(int fd) {
  struct stat status {};
  if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode) || status.st_nlink == 0) return std::nullopt;
  return static_cast<std::uint64_t>(status.st_size);
}

Found header_of(int fd, const ContentHasher& hasher, std::uint64_t page_size) {
  ShareHeader header{};
  if (!read_at(fd, 0, std::as_writable_bytes(std::span(&header, 1)))) return Found::kNothing;
  if (header.magic != kMagic) return Found::kNothing;
  const bool ours = header.version == kVersion && header.page_size == page_size &&
                    equal_digests(header.check, check_of(hasher));
  return ours ? Found::kOurs : Found::kOther;
}

std::span<const ShareEntry> read_index(int fd, const ShareLayout& layout, std::uint64_t group,
                                       std::vector<ShareEntry>& into) {
  into.resize(layout.group_slots());
  if (!read_at(fd, layout.index_offset(group), std::as_writable_bytes(std::span(into)))) return {};
  return into;
}

}  // namespace memferry::share
