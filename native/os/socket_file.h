// A unix socket's file: what a dead listener left is replaced, one that lives is never taken from it, also when several
// come at once. Header only and without exceptions, because the shim in QEMU uses it too.
//
// Two that see the same dead socket must not both replace it:
//
//   A: connect() refused            B: connect() refused
//   A: unlink, bind, listen
//                                   B: unlink (of A's), bind, listen     A is found by nobody any more
//
// and one that is bound but does not listen yet must not pass for dead. So all of it happens under a lock on the
// directory (FdChannelTest.OfManyAtOnceOneHasThePath).
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "os/unique_fd.h"

namespace memferry {

namespace socket_file {

// Anybody who may read the directory may hold the lock: it is not waited for without a bound, and what is done without
// it is done with more care.
inline constexpr int kLockTurns = 200;
inline constexpr useconds_t kTurnUs = 10000;
inline constexpr useconds_t kListensWithinUs = 200000;

inline UniqueFd lock_directory_of(const sockaddr_un& address) {
  char folder[sizeof address.sun_path];
  std::memcpy(folder, address.sun_path, sizeof folder);
  char* slash = std::strrchr(folder, '/');
  if (slash == nullptr) {
    folder[0] = '.';
    folder[1] = '\0';
  } else {
    slash[slash == folder ? 1 : 0] = '\0';
  }
  UniqueFd directory(::open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  for (int turn = 0; directory && turn < kLockTurns; ++turn) {
    if (::flock(directory.get(), LOCK_EX | LOCK_NB) == 0) return directory;
    if (errno != EWOULDBLOCK && errno != EINTR) break;
    ::usleep(kTurnUs);
  }
  return {};
}

// A socket's file that nobody listens behind.
inline bool is_dead(const sockaddr_un& address) {
  struct stat info {};
  if (::lstat(address.sun_path, &info) != 0 || !S_ISSOCK(info.st_mode)) return false;
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  return probe && ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 &&
         errno == ECONNREFUSED;
}

}  // namespace socket_file

// Binds `fd` to the path, which ends in a NUL, and listens there. 0, or errno: EADDRINUSE when somebody listens there
// or the file is no socket.
inline int listen_at(int fd, const sockaddr_un& address, int backlog) {
  const UniqueFd lock = socket_file::lock_directory_of(address);
  const auto bind_it = [&] {
    return ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ? 0 : errno;
  };
  int error = bind_it();
  if (error == EADDRINUSE && socket_file::is_dead(address)) {
    if (!lock) ::usleep(socket_file::kListensWithinUs);
    if (lock || socket_file::is_dead(address)) {
      if (::unlink(address.sun_path) != 0 && errno != ENOENT) return errno;
      error = bind_it();
    }
  }
  if (error != 0) return error;
  if (::listen(fd, backlog) == 0) return 0;
  error = errno;
  (void)::unlink(address.sun_path);
  return error;
}

}  // namespace memferry
