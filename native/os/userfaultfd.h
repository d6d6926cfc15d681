// A userfaultfd with one owner. Expected outcomes of installing pages come back as values; what can only be
// a bug or a missing permission throws SystemError.
//
// The addresses are those of the process that it was made in: this one, or with adopt() another.
//
// CLOSING LETS GO: pages that are missing then read as zeros. Poison them first, or keep the descriptor.
//
// Threads: every method may be called from any thread. The kernel serialises; draining events and
// installing pages must not wait for one another, or madvise() in a guest deadlocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "os/address.h"
#include "os/kernel_abi.h"
#include "os/unique_fd.h"

namespace memferry {

// Whose faults the descriptor serves. User-mode-only ones fail the accesses of system calls with EFAULT.
enum class FaultScope { kKernelAndUser, kUserOnly };
[[nodiscard]] const char* fault_scope_name(FaultScope scope);

enum class RegisterMode : std::uint64_t {
  kMissing = UFFDIO_REGISTER_MODE_MISSING,
  kWriteProtect = UFFDIO_REGISTER_MODE_WP,
  kMissingAndWriteProtect = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP,
  // Of a file's pages: also those that the file has, and the mapping not yet.
  kMissingAndMinor = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
};

enum class PageOutcome {
  kOk,      // everything was done
  kExists,  // after bytes_done a page is there already: wake its waiters, or skip it
  kAgain,   // after bytes_done the layout is changing or events wait unread: drain them, then go on
  kGone,    // after bytes_done there is no such mapping or registration any more
  kBusy,    // move() only: a page to be moved is pinned or shared; copy it instead
  kNoMemory,
};
struct PageResult {
  PageOutcome outcome = PageOutcome::kOk;
  std::uint64_t bytes_done = 0;  // from the range's start on
  int error = 0;                 // the errno behind the outcome, 0 for kOk
};

class Userfaultfd {
 public:
  // Tries in turn: /dev/userfaultfd, the system call, the system call with UFFD_USER_MODE_ONLY, each with
  // all of `features` or nothing. `allow_user_only` false leaves the last one out. Non-blocking,
  // close-on-exec. Throws SystemError: EPERM when nothing is permitted, EINVAL when the kernel lacks one of
  // the features.
  static Userfaultfd open(std::uint64_t features, bool allow_user_only = true);

  // One that another process has made for its own memory, or this one has; `fd` is duplicated, and made non-blocking for
  // all who have it. Where its maker has not named its features yet (UFFDIO_API), that is done here with `features`;
  // else they stay as they are, and enabled() says what they are. Throws SystemError: EBADF when it is no userfaultfd,
  // EINVAL when the kernel lacks one of the features.
  static Userfaultfd adopt(int fd, std::uint64_t features);

  // What this kernel offers to this process (0 when no userfaultfd can be had at all).
  struct Offer {
    std::uint64_t features = 0;
    bool kernel_faults = false;  // kKernelAndUser can be had
    bool user_faults = false;
    int error = 0;  // why kernel_faults is false
  };
  [[nodiscard]] static Offer probe();

  [[nodiscard]] int fd() const { return fd_.get(); }
  [[nodiscard]] bool valid() const { return fd_.valid(); }
  [[nodiscard]] FaultScope scope() const { return scope_; }
  [[nodiscard]] std::uint64_t features() const { return features_; }  // those of the kernel, all
  // Those that were asked for when it was made.
  [[nodiscard]] std::uint64_t enabled() const { return enabled_; }
  // Of another process, most likely: its events may be of any kind.
  [[nodiscard]] bool adopted() const { return adopted_; }
  void close() { fd_.reset(); }

  // Gives the bit set of range ioctls that the kernel allows there (1 << _UFFDIO_COPY ...).
  // Throws SystemError: EBUSY when another userfaultfd has part of the range.
  std::uint64_t register_range(OwnerAddress start, std::uint64_t bytes, RegisterMode mode);
  std::uint64_t register_missing(OwnerAddress start, std::uint64_t bytes) {
    return register_range(start, bytes, RegisterMode::kMissing);
  }
  std::uint64_t register_wp(OwnerAddress start, std::uint64_t bytes) {
    return register_range(start, bytes, RegisterMode::kWriteProtect);
  }
  std::uint64_t register_missing_and_wp(OwnerAddress start, std::uint64_t bytes) {
    return register_range(start, bytes, RegisterMode::kMissingAndWriteProtect);
  }
  // False when the range was unmapped (there is nothing to let go of). Wakes its waiters.
  bool unregister(OwnerAddress start, std::uint64_t bytes);

  // Installs pages that are missing; never overwrites. A short count is continued until everything is done
  // or something else happens.
  PageResult copy(OwnerAddress to, const std::byte* from, std::uint64_t bytes, bool wake,
                  bool write_protect = false);
  PageResult zeropage(OwnerAddress start, std::uint64_t bytes, bool wake);
  // Maps what the file has at this place. kAgain with EFAULT: it has nothing there. Needs kMissingAndMinor.
  PageResult map_present(OwnerAddress start, std::uint64_t bytes, bool wake);
  // The pages become ours for good: `from` is left empty. Needs UFFD_FEATURE_MOVE.
  PageResult move(OwnerAddress to, OwnerAddress from, std::uint64_t bytes, bool wake);
  // Touching these pages raises SIGBUS from now on. Needs UFFD_FEATURE_POISON.
  PageResult poison(OwnerAddress start, std::uint64_t bytes, bool wake);
  // Sets or lifts write protection.
  PageResult write_protect(OwnerAddress start, std::uint64_t bytes, bool protect, bool wake = true);
  // Whoever waits on the range looks again. Throws SystemError.
  void wake(OwnerAddress start, std::uint64_t bytes);

  // Events that are there, without waiting: 0 when there are none. Throws SystemError.
  std::size_t read_events(std::span<uffd_msg> into);

 private:
  Userfaultfd(UniqueFd fd, FaultScope scope, std::uint64_t features, std::uint64_t enabled,
              bool adopted = false)
      : fd_(std::move(fd)), scope_(scope), features_(features), enabled_(enabled), adopted_(adopted) {}

  UniqueFd fd_;
  FaultScope scope_ = FaultScope::kKernelAndUser;
  std::uint64_t features_ = 0;
  std::uint64_t enabled_ = 0;
  bool adopted_ = false;
};

}  // namespace memferry
