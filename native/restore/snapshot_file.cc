#include "restore/snapshot_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <algorithm>
#include <stdexcept>

#include "os/sys_error.h"

namespace memferry {

std::shared_ptr<const SnapshotFile> SnapshotFile::open(const std::string& path) {
  // A FIFO would wait for its writer.
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) throw_errno(("open(" + path + ")").c_str());
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) throw_errno("fstat");
  if (!S_ISREG(info.st_mode)) throw std::invalid_argument(path + " is no regular file");
  if (info.st_size == 0) throw std::invalid_argument(path + " is empty");
  Mapping mapping = Mapping::shared(fd.get(), static_cast<std::uint64_t>(info.st_size), 0, PROT_READ);
  return std::shared_ptr<const SnapshotFile>(new SnapshotFile(std::move(fd), std::move(mapping)));
}

const std::byte* SnapshotFile::at(std::uint64_t offset, std::uint64_t length) const {
  if (offset > bytes() || length > bytes() - offset)
    throw std::out_of_range("bytes " + std::to_string(offset) + " to " + std::to_string(offset + length) +
                            " of a snapshot of " + std::to_string(bytes()));
  return mapping_.data() + offset;
}

bool SnapshotFile::read_now(const std::byte* from, std::span<std::byte> into) const {
  const iovec part{into.data(), into.size()};
  const auto offset = static_cast<off_t>(from - mapping_.data());
  // Short: some of it is not in the page cache, or the file has shrunk.
  return ::preadv2(fd_.get(), &part, 1, offset, RWF_NOWAIT) == static_cast<ssize_t>(into.size());
}

std::uint64_t SnapshotFile::still_has(const std::byte* from, std::uint64_t length) const {
  struct stat info {};
  if (::fstat(fd_.get(), &info) != 0) throw_errno("fstat(snapshot)");
  const auto offset = static_cast<std::uint64_t>(from - mapping_.data());
  const auto size = static_cast<std::uint64_t>(info.st_size);
  return size <= offset ? 0 : std::min(length, size - offset);
}

}  // namespace memferry
