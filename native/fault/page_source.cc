#include "fault/page_source.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <stdexcept>

#include "os/process.h"
#include "os/sys_error.h"

namespace memferry {

FilePageSource::FilePageSource(int fd, std::uint64_t offset, std::uint64_t page_size)
    : file_(duplicate(fd)), offset_(offset), page_size_(page_size) {
  struct stat status {};
  if (::fstat(file_.get(), &status) != 0) throw_errno("fstat(snapshot)");
  if (!S_ISREG(status.st_mode)) throw std::invalid_argument("the snapshot is no regular file");
}

std::uint64_t FilePageSource::pages() const {
  struct stat status {};
  if (::fstat(file_.get(), &status) != 0) throw_errno("fstat(snapshot)");
  const auto size = static_cast<std::uint64_t>(status.st_size);
  return size < offset_ ? 0 : (size - offset_) / page_size_;
}

void FilePageSource::read(PageRun run, std::span<std::byte> into) {
  for (std::size_t done = 0; done < into.size();) {
    const ssize_t got = ::pread(file_.get(), into.data() + done, into.size() - done,
                                static_cast<off_t>(offset_ + run.first.value * page_size_ + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw_errno("pread(snapshot)");
    if (got == 0)
      throw SystemError("the snapshot ends before page " + std::to_string(run.first.value), ENODATA);
    done += static_cast<std::size_t>(got);
  }
}

}  // namespace memferry
