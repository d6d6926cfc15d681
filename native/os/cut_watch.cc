#include "os/cut_watch.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <string>

namespace memferry {

namespace {

constexpr unsigned kCloseOnExec = 1;  // MFD_CLOEXEC

UniqueFd watch(int file) {
  UniqueFd events(::inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
  const std::string name = "/proc/self/fd/" + std::to_string(file);
  // By whatever name it is open here: it may have none in a directory any more.
  if (events && ::inotify_add_watch(events.get(), name.c_str(), IN_MODIFY) < 0) events.reset();
  return events;
}

constexpr int kMostReads = 64;  // of one drain: somebody may write all the time

// True when there was something to read, or when it cannot be told.
bool drain(UniqueFd& events) {
  alignas(inotify_event) std::array<char, 4096> buffer{};
  bool any = false;
  for (int reads = 0; events && reads < kMostReads; ++reads) {
    const ssize_t got = ::read(events.get(), buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return any;
    if (got <= 0) break;
    any = true;
    for (std::size_t at = 0; at + sizeof(inotify_event) <= static_cast<std::size_t>(got);) {
      inotify_event event{};
      std::memcpy(&event, &buffer[at], sizeof event);
      // A file that has lost its last name by another entry than the one that is open here, for one.
      if ((event.mask & (IN_IGNORED | IN_UNMOUNT)) != 0) events.reset();
      at += sizeof event + event.len;
    }
  }
  return true;
}

// The kernel's own mount of tmpfs, which has memfds and shared anonymous memory: files there are made without
// notifications since Linux 6.14 or so.
struct OwnMount {
  dev_t device = 0;
  bool tells = false;
};

std::optional<OwnMount> look_at_own_mount() {
  const UniqueFd file(static_cast<int>(::syscall(SYS_memfd_create, "memferry", kCloseOnExec)));
  struct stat status {};
  constexpr off_t kBytes = 4096;
  if (!file || ::ftruncate(file.get(), kBytes) != 0 || ::fstat(file.get(), &status) != 0) return std::nullopt;
  UniqueFd events = watch(file.get());
  const bool punched =
      events && ::fallocate(file.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kBytes) == 0;
  return OwnMount{status.st_dev, punched && drain(events)};
}

bool told(int file) {
  static const std::optional<OwnMount> own = look_at_own_mount();
  struct stat status {};
  if (!own || ::fstat(file, &status) != 0) return false;
  return own->tells || status.st_dev != own->device;
}

}  // namespace

std::optional<CutWatch> CutWatch::of(int file) {
  if (!told(file)) return std::nullopt;
  UniqueFd events = watch(file);
  if (!events) return std::nullopt;
  return CutWatch(std::move(events));
}

bool CutWatch::changed() { return drain(events_); }

}  // namespace memferry
