#include "share/share_fill.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <vector>

#include "os/sys_error.h"
#include "page/zero.h"
#include "share/share_file.h"

namespace memferry {

ShareFill fill_from_file(PageShare& share, const std::string& path, std::uint64_t offset, std::uint64_t bytes,
                         double score) {
  // Not to be blocked by a pipe.
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!file) throw_errno("open");
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) throw_errno("fstat");
  if (!S_ISREG(status.st_mode)) throw SystemError("open: not a regular file", EINVAL);
  const auto length = static_cast<std::uint64_t>(status.st_size);
  if (offset > length) throw SystemError("a part beyond the end of the file", EINVAL);
  const std::uint64_t end = bytes == 0 ? length : offset + std::min(bytes, length - offset);
  ShareFill filled;
  std::vector<std::byte> page(share.page_size());
  for (std::uint64_t at = offset; end - at >= page.size(); at += page.size()) {
    if (!share::read_at(file.get(), at, page)) throw SystemError("pread", EIO);
    ++filled.pages;
    if (is_zero(page)) {
      ++filled.zero;
      continue;
    }
    switch (share.insert(share.digest(page), page, score)) {
      case PageShare::Inserted::kInserted:
        ++filled.inserted;
        break;
      case PageShare::Inserted::kThere:
        ++filled.there;
        break;
      case PageShare::Inserted::kNoRoom:
      case PageShare::Inserted::kWrong:
        ++filled.no_room;
        break;
    }
  }
  return filled;
}

}  // namespace memferry
