#include "os/userfaultfd.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <string>
#include <utility>

#include "os/process.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

constexpr int kUserModeOnly = 1;  // UFFD_USER_MODE_ONLY, 5.11
// In what the kernel tells of a descriptor's features: UFFDIO_API has been called.
constexpr std::uint64_t kInitialised = 1ULL << 31U;

UniqueFd open_device() {
  UniqueFd device(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
  if (!device) return {};
  return UniqueFd(::ioctl(device.get(), _IO(0xAA, 0x00), O_CLOEXEC | O_NONBLOCK));
}

UniqueFd open_syscall(int flags) {
  return UniqueFd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags)));
}

// UFFDIO_API: all of `features` or an errno. The kernel answers with everything that it has.
int handshake(int fd, std::uint64_t features, std::uint64_t& offered) {
  uffdio_api api{};
  api.api = UFFD_API;
  api.features = features;
  if (::ioctl(fd, UFFDIO_API, &api) != 0) return errno;
  offered = api.features;
  return 0;
}

// What an installing ioctl came to: `answer` is its last field, which holds a count or a negative errno.
// Before Linux 6.15 or so it stays untouched (we put 0 there) when the layout is changing.
PageResult judge(int status, int error, std::int64_t answer, const char* operation) {
  if (status == 0) return {PageOutcome::kOk, 0, 0};
  if (answer < 0) error = static_cast<int>(-answer);
  switch (error) {
    case EEXIST:
      return {PageOutcome::kExists, 0, error};
    case EAGAIN:
      return {PageOutcome::kAgain, 0, error};
    case EBUSY:
      return {PageOutcome::kBusy, 0, error};
    case ENOMEM:
      return {PageOutcome::kNoMemory, 0, error};
    case ENOENT:
    case ENOSPC:
    case ESRCH:
      return {PageOutcome::kGone, 0, error};
    default:
      throw SystemError(operation, error);
  }
}

// Runs an installing ioctl over `bytes` until all is done or it says why not. `once` takes the offset and
// the remaining length, and gives {status, errno, answer}. Every turn makes progress, so it ends.
struct Answer {
  int status;
  int error;
  std::int64_t count;
};
template <typename Once>
PageResult install(std::uint64_t bytes, const char* operation, Once once) {
  std::uint64_t done = 0;
  while (done < bytes) {
    const Answer answer = once(done, bytes - done);
    if (answer.status != 0 && answer.count > 0) {
      done += static_cast<std::uint64_t>(answer.count);
      continue;  // short: what stopped it shows in the next turn
    }
    PageResult result = judge(answer.status, answer.error, answer.count, operation);
    if (result.outcome != PageOutcome::kOk) {
      result.bytes_done = done;
      return result;
    }
    done = bytes;
  }
  return {PageOutcome::kOk, bytes, 0};
}

}  // namespace

const char* fault_scope_name(FaultScope scope) {
  return scope == FaultScope::kKernelAndUser ? "kernel-and-user" : "user-only";
}

Userfaultfd Userfaultfd::open(std::uint64_t features, bool allow_user_only) {
  int error = EPERM;
  const auto attempt = [&](UniqueFd fd, FaultScope scope, Userfaultfd& opened) {
    if (!fd) {
      // The device is missing on kernels before 6.1: what the system call says counts more.
      error = errno;
      return false;
    }
    std::uint64_t offered = 0;
    error = handshake(fd.get(), features, offered);
    if (error != 0) return false;
    opened = Userfaultfd(std::move(fd), scope, offered, features);
    return true;
  };
  Userfaultfd opened{UniqueFd(), FaultScope::kKernelAndUser, 0, 0};
  if (attempt(open_device(), FaultScope::kKernelAndUser, opened)) return opened;
  if (error == EINVAL) throw SystemError("userfaultfd: features that this kernel lacks", error);
  if (attempt(open_syscall(0), FaultScope::kKernelAndUser, opened)) return opened;
  if (allow_user_only && attempt(open_syscall(kUserModeOnly), FaultScope::kUserOnly, opened)) return opened;
  if (error == EINVAL) throw SystemError("userfaultfd: features that this kernel lacks", error);
  throw SystemError("userfaultfd", error);
}

// "aa:<enabled features>:<ioctls>", in hexadecimal.
Userfaultfd Userfaultfd::adopt(int fd, std::uint64_t features) {
  if (descriptor_name(fd) != "anon_inode:[userfaultfd]") {
    throw SystemError("descriptor " + std::to_string(fd) + " is no userfaultfd", EBADF);
  }
  UniqueFd own = duplicate(fd);
  const std::string api = descriptor_info(own.get(), "API");
  std::uint64_t enabled = 0;
  const std::size_t colon = api.find(':');
  const char* const end = api.data() + api.size();
  if (colon == std::string::npos ||
      std::from_chars(api.data() + colon + 1, end, enabled, 16).ec != std::errc()) {
    throw SystemError("/proc/self/fdinfo does not tell a userfaultfd's features", ENOTSUP);
  }
  std::uint64_t offered = probe().features;
  if ((enabled & kInitialised) == 0) {
    const int error = handshake(own.get(), features, offered);
    if (error == EINVAL) throw SystemError("userfaultfd: features that this kernel lacks", error);
    if (error != 0) throw SystemError("UFFDIO_API", error);
    enabled = features;
  }
  // poll() on a blocking one says only that it is an error.
  const int flags = ::fcntl(own.get(), F_GETFL);
  if (flags < 0 || ::fcntl(own.get(), F_SETFL, flags | O_NONBLOCK) != 0) throw_errno("fcntl(O_NONBLOCK)");
  return {std::move(own), FaultScope::kKernelAndUser, offered, enabled & ~kInitialised, true};
}

Userfaultfd::Offer Userfaultfd::probe() {
  Offer offer;
  UniqueFd fd = open_device();
  if (!fd) {
    fd = open_syscall(0);
    if (!fd) offer.error = errno;
  }
  if (fd) offer.kernel_faults = offer.user_faults = handshake(fd.get(), 0, offer.features) == 0;
  if (offer.user_faults) return offer;
  fd = open_syscall(kUserModeOnly);
  if (fd) offer.user_faults = handshake(fd.get(), 0, offer.features) == 0;
  return offer;
}

std::uint64_t Userfaultfd::register_range(OwnerAddress start, std::uint64_t bytes, RegisterMode mode) {
  uffdio_register request{};
  request.range = {start.value, bytes};
  request.mode = static_cast<std::uint64_t>(mode);
  if (::ioctl(fd_.get(), UFFDIO_REGISTER, &request) != 0) {
    const int error = errno;
    if (error == EBUSY) throw SystemError("UFFDIO_REGISTER: another userfaultfd has this memory", error);
    throw SystemError("UFFDIO_REGISTER", error);
  }
  return request.ioctls;
}

bool Userfaultfd::unregister(OwnerAddress start, std::uint64_t bytes) {
  uffdio_range range{start.value, bytes};
  if (::ioctl(fd_.get(), UFFDIO_UNREGISTER, &range) == 0) {
    // The kernel wakes them before it lets go of the mapping. Where a fault takes that mapping's own lock (Linux 6.4),
    // one that has begun may be queued in between, and would sleep for as long as the descriptor is open.
    wake(start, bytes);
    return true;
  }
  // EINVAL and ENOMEM: nothing is mapped there. ESRCH: the process is ending.
  if (errno == EINVAL || errno == ENOMEM || errno == ESRCH) return false;
  throw_errno("UFFDIO_UNREGISTER");
}

PageResult Userfaultfd::copy(OwnerAddress to, const std::byte* from, std::uint64_t bytes, bool wake,
                             bool write_protect) {
  const std::uint64_t mode =
      (wake ? 0 : UFFDIO_COPY_MODE_DONTWAKE) | (write_protect ? UFFDIO_COPY_MODE_WP : 0);
  return install(bytes, "UFFDIO_COPY", [&](std::uint64_t done, std::uint64_t rest) -> Answer {
    uffdio_copy request{};
    request.dst = to.value + done;
    request.src = Address::of(from).value + done;
    request.len = rest;
    request.mode = mode;
    const int status = ::ioctl(fd_.get(), UFFDIO_COPY, &request);
    return {status, errno, request.copy};
  });
}

PageResult Userfaultfd::zeropage(OwnerAddress start, std::uint64_t bytes, bool wake) {
  return install(bytes, "UFFDIO_ZEROPAGE", [&](std::uint64_t done, std::uint64_t rest) -> Answer {
    uffdio_zeropage request{};
    request.range = {start.value + done, rest};
    request.mode = wake ? 0 : UFFDIO_ZEROPAGE_MODE_DONTWAKE;
    const int status = ::ioctl(fd_.get(), UFFDIO_ZEROPAGE, &request);
    return {status, errno, request.zeropage};
  });
}

PageResult Userfaultfd::map_present(OwnerAddress start, std::uint64_t bytes, bool wake) {
  bool nothing = false;
  PageResult result =
      install(bytes, "UFFDIO_CONTINUE", [&](std::uint64_t done, std::uint64_t rest) -> Answer {
        uffdio_continue request{};
        request.range = {start.value + done, rest};
        request.mode = wake ? 0 : UFFDIO_CONTINUE_MODE_DONTWAKE;
        const int status = ::ioctl(fd_.get(), UFFDIO_CONTINUE, &request);
        const int error = status != 0 && request.mapped < 0 ? static_cast<int>(-request.mapped) : errno;
        nothing = status != 0 && request.mapped <= 0 && error == EFAULT;
        if (nothing) return {status, EAGAIN, 0};
        return {status, error, request.mapped};
      });
  if (nothing) result.error = EFAULT;
  return result;
}

PageResult Userfaultfd::move(OwnerAddress to, OwnerAddress from, std::uint64_t bytes, bool wake) {
  return install(bytes, "UFFDIO_MOVE", [&](std::uint64_t done, std::uint64_t rest) -> Answer {
    abi::UffdioMove request{};
    request.dst = to.value + done;
    request.src = from.value + done;
    request.len = rest;
    request.mode = wake ? 0 : abi::kUffdioMoveDontWake;
    const int status = ::ioctl(fd_.get(), abi::kUffdioMove, &request);
    return {status, errno, request.move};
  });
}

PageResult Userfaultfd::poison(OwnerAddress start, std::uint64_t bytes, bool wake) {
  return install(bytes, "UFFDIO_POISON", [&](std::uint64_t done, std::uint64_t rest) -> Answer {
    abi::UffdioPoison request{};
    request.range = {start.value + done, rest};
    request.mode = wake ? 0 : abi::kUffdioPoisonDontWake;
    const int status = ::ioctl(fd_.get(), abi::kUffdioPoison, &request);
    return {status, errno, request.updated};
  });
}

PageResult Userfaultfd::write_protect(OwnerAddress start, std::uint64_t bytes, bool protect, bool wake) {
  uffdio_writeprotect request{};
  request.range = {start.value, bytes};
  // The kernel refuses DONTWAKE together with WP: protecting wakes nobody anyway.
  request.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : (wake ? 0 : UFFDIO_WRITEPROTECT_MODE_DONTWAKE);
  const int status = ::ioctl(fd_.get(), UFFDIO_WRITEPROTECT, &request);
  PageResult result = judge(status, errno, 0, "UFFDIO_WRITEPROTECT");
  if (result.outcome == PageOutcome::kOk) result.bytes_done = bytes;
  return result;
}

void Userfaultfd::wake(OwnerAddress start, std::uint64_t bytes) {
  uffdio_range range{start.value, bytes};
  // ESRCH: who waited is gone.
  if (::ioctl(fd_.get(), UFFDIO_WAKE, &range) != 0 && errno != ESRCH) throw_errno("UFFDIO_WAKE");
}

std::size_t Userfaultfd::read_events(std::span<uffd_msg> into) {
  const ssize_t got = ::read(fd_.get(), into.data(), into.size_bytes());
  if (got >= 0) return static_cast<std::size_t>(got) / sizeof(uffd_msg);
  if (errno == EAGAIN || errno == EINTR) return 0;
  throw_errno("read(userfaultfd)");
}

}  // namespace memferry
