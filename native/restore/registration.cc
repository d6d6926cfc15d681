#include "restore/registration.h"

#include <sys/ioctl.h>

#include <cerrno>
#include <chrono>
#include <thread>

#include "os/mapping.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

constexpr int kTries = 2000;
constexpr std::chrono::microseconds kBetweenTries{500};

// The errno of a copy from memory that cannot be read. EFAULT: it got as far as reading.
int doomed_copy(const Userfaultfd& uffd, OwnerAddress at, const Mapping& unreadable, std::uint64_t mode) {
  for (int tries = 0;; ++tries) {
    uffdio_copy request{};
    request.dst = at.value;
    request.src = unreadable.start().value;
    request.len = unreadable.size();
    request.mode = mode | UFFDIO_COPY_MODE_DONTWAKE;
    if (::ioctl(uffd.fd(), UFFDIO_COPY, &request) == 0) throw SystemError("UFFDIO_COPY from nothing", EINVAL);
    const int error = request.copy < 0 ? static_cast<int>(-request.copy) : errno;
    if (error != EAGAIN || tries >= kTries) return error;
    std::this_thread::sleep_for(kBetweenTries);
  }
}

}  // namespace

Registration registration_at(const Userfaultfd& uffd, OwnerAddress at, std::uint64_t page_size) {
  const Mapping unreadable = Mapping::anonymous(page_size, PROT_NONE);
  switch (const int error = doomed_copy(uffd, at, unreadable, 0)) {
    case EFAULT:
      break;
    case ENOENT:
    case EEXIST:
      return {};
    case EINVAL:
      throw SystemError("the pages there are not of " + std::to_string(page_size) + " bytes", error);
    default:
      throw SystemError("UFFDIO_COPY", error);
  }
  return {true, doomed_copy(uffd, at, unreadable, UFFDIO_COPY_MODE_WP) == EFAULT};
}

}  // namespace memferry
