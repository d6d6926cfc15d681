// A regular file by its path, for whoever reads or writes images.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <string>

#include "os/sys_error.h"
#include "os/unique_fd.h"

namespace memferry {

// Not to be blocked by a fifo, nor led elsewhere by a link; what is no regular file is refused. Throws SystemError.
[[nodiscard]] inline UniqueFd open_regular(const std::string& path, int flags) {
  UniqueFd file(::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | O_NOFOLLOW));
  if (file.get() < 0) throw_errno("open");
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) throw_errno("fstat");
  if (!S_ISREG(status.st_mode)) throw SystemError("open: not a regular file", EINVAL);
  return file;
}

}  // namespace memferry
