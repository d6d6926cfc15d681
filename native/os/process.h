// Another process, by pidfd, and its address space as it was when we took hold of it. A pid is never trusted: what is
// opened by it counts only if the pidfd's process is still there afterwards. An exec replaces the address space, so it
// ends this object like death does.
//
// Threads: any.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "os/address.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"

namespace memferry {

// The process that owns the memory has ended, or runs another program.
class OwnerGone : public SystemError {
 public:
  using SystemError::SystemError;
};

class Process {
 public:
  // Duplicates `pidfd`. Throws SystemError: EBADF when it is no pidfd; EACCES, EPERM when its memory may not be looked
  // at (CAP_SYS_PTRACE); OwnerGone when it has ended.
  static std::shared_ptr<Process> open(int pidfd);

  [[nodiscard]] pid_t pid() const { return pid_; }
  // Readable when the process has ended, for poll(). An exec does not show there.
  [[nodiscard]] int pidfd() const { return pidfd_.get(); }

  enum class Life { kAlive, kEnded, kReplaced };
  [[nodiscard]] Life life() const;
  [[nodiscard]] bool alive() const { return life() == Life::kAlive; }
  // Throws OwnerGone, unless what was done before it was done to the memory of the process that is meant, which may have
  // begun to end since.
  void require(const std::string& operation) const;
  // For the operation that found no process: OwnerGone if it is so.
  [[nodiscard]] OwnerGone gone(const std::string& operation) const;

  // A file of /proc/PID, of a thread of it that has its memory still. Throws SystemError, OwnerGone.
  [[nodiscard]] UniqueFd open_file(const char* name, int flags) const;
  // /proc/PID/pagemap of this address space and no other.
  [[nodiscard]] int pagemap() const { return pagemap_.get(); }

  // Copies from its memory. Waits for its pager where a page is missing there. Throws SystemError: EFAULT when a part
  // cannot be read (not mapped, poisoned); OwnerGone.
  void read(OwnerAddress from, std::span<std::byte> into) const;
  // The first bytes of it that can be read, at most all.
  [[nodiscard]] std::size_t read_some(OwnerAddress from, std::span<std::byte> into) const;
  // Of several places (IOV_MAX at most), one after the other, in one call: how many bytes, up to the first that cannot be
  // read; none where the kernel forbids this way. Throws OwnerGone.
  [[nodiscard]] std::size_t read_each(std::span<const iovec> from, std::span<std::byte> into) const;
  // SIGKILL.
  void end() const;

 private:
  Process(UniqueFd pidfd, pid_t pid) : pidfd_(std::move(pidfd)), pid_(pid) {}
  [[nodiscard]] bool ended() const;
  // Nothing else is at its address: the memory has users, be it only whoever reads it.
  [[nodiscard]] bool has_memory() const;
  // Where /proc shows a thread of it that has not let go of the memory; nothing when there is none.
  [[nodiscard]] std::optional<std::string> task_with_memory() const;

  UniqueFd pidfd_;
  pid_t pid_;
  UniqueFd memory_;  // both belong to the address space, whatever the process does later
  UniqueFd pagemap_;
};

// What a descriptor of this process is, as /proc names it: "anon_inode:[userfaultfd]". Throws SystemError (EBADF).
[[nodiscard]] std::string descriptor_name(int fd);
// The value of `key` in its /proc/self/fdinfo, without surrounding blanks; empty when there is none.
[[nodiscard]] std::string descriptor_info(int fd, const std::string& key);
// Throws SystemError.
[[nodiscard]] UniqueFd duplicate(int fd);

}  // namespace memferry
