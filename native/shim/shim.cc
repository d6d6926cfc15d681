// libmemferry-shim.so, preloaded into QEMU. It gives memferry, in another process, what only QEMU itself can make: a
// userfaultfd over QEMU's memory, the addresses of its shared mappings and the files behind them. It does nothing
// else: no function of QEMU's is replaced, no signal handled, no page touched.
//
//   MEMFERRY_SHIM_SOCKET=PATH    where it listens (mode 0600). Without it this object does nothing. Taken out of the
//                                environment, so that what QEMU starts does not bind it again.
//   MEMFERRY_SHIM_PROGRAM=NAME   how the program's file name begins for which it is meant; "qemu" without it. So a
//                                wrapper, or a shell that starts QEMU, leaves the socket to QEMU.
//
// Every userfaultfd that was handed over is kept here for ever: when memferry dies, who touches a missing page waits
// for the next memferry, which is given the same one. Were the last descriptor closed, it would read zeros.
//
// The protocol is in docs/protocol.md ("The shim in QEMU"). One thread, all signals blocked; one connection at a time,
// each for at most kConnectionMs, and none that says nothing. A process that QEMU forks has no such thread, and its copy of the socket is closed.
// No part of libstdc++ is linked: this is a guest in somebody else's process.
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "os/kernel_abi.h"
#include "os/socket_file.h"
#include "os/unique_fd.h"

namespace {

using memferry::UniqueFd;

constexpr int kVersion = 1;
constexpr int kConnectionMs = 10000;
constexpr int kSilenceMs = 3000;   // less than a memferry that comes meanwhile waits for its answer
constexpr int kMostRequests = 64;  // of one connection
constexpr std::size_t kRequestBytes = 128;
constexpr std::size_t kAnswerBytes = 32768;
constexpr std::size_t kMostMappings = 64;
constexpr std::size_t kMostFiles = 16;  // descriptors in one answer
constexpr std::size_t kMostUserfaultfds = 8;

int g_listener = -1;     // written before the thread starts; closed in a forked child
uid_t g_started_as = 0;  // QEMU may give its rights up later

struct Kept {
  std::uint64_t features;
  std::uint64_t offered;
  int fd;
};
Kept g_kept[kMostUserfaultfds];  // of the serving thread alone
std::size_t g_kept_count = 0;

[[noreturn]] void refuse_to_start(const char* what, const char* path) {
  std::fprintf(stderr, "memferry-shim: %s %s: %s\n", what, path, std::strerror(errno));
  ::_exit(1);
}

std::int64_t now_ms() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1000 + now.tv_nsec / 1000000;
}

// An answer as it grows. What does not fit makes it an error, never a shorter answer.
struct Answer {
  char text[kAnswerBytes];
  std::size_t length = 0;
  bool overflow = false;
  int fds[kMostFiles];
  std::size_t fd_count = 0;
  bool closes_fds = false;  // when it was sent

  void begin() {
    if (closes_fds) {
      for (std::size_t i = 0; i < fd_count; ++i) ::close(fds[i]);
    }
    length = 0;
    fd_count = 0;
    closes_fds = false;
    overflow = false;
  }

  [[gnu::format(printf, 2, 3)]] void add(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int written = std::vsnprintf(text + length, sizeof text - length, format, arguments);
    va_end(arguments);
    if (written < 0 || static_cast<std::size_t>(written) >= sizeof text - length) {
      overflow = true;
    } else {
      length += static_cast<std::size_t>(written);
    }
  }

  void fail(const char* what, int error) {
    begin();
    add("{\"version\":%d,\"error\":\"%s\",\"errno\":%d}\n", kVersion, what, error);
  }
};

bool wait_for(int fd, short events, std::int64_t deadline) {
  for (;;) {
    const std::int64_t left = deadline - now_ms();
    if (left <= 0) return false;
    pollfd waited{fd, events, 0};
    const int ready = ::poll(&waited, 1, static_cast<int>(left));
    if (ready > 0) return true;
    if (ready == 0 || errno != EINTR) return false;
  }
}

bool send_answer(int to, const Answer& answer, std::int64_t deadline) {
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMostFiles)] = {};
  std::size_t sent = 0;
  while (sent < answer.length) {
    if (!wait_for(to, POLLOUT, deadline)) return false;
    iovec piece{const_cast<char*>(answer.text) + sent, answer.length - sent};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    if (sent == 0 && answer.fd_count > 0) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(sizeof(int) * answer.fd_count);
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int) * answer.fd_count);
      std::memcpy(CMSG_DATA(header), answer.fds, sizeof(int) * answer.fd_count);
    }
    const ssize_t count = ::sendmsg(to, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      return false;
    }
    sent += static_cast<std::size_t>(count);
  }
  return true;
}

// ---- memory

struct FileId {
  dev_t device;
  ino_t inode;
};

bool is_memory(int fd, const FileId& file) {
  struct stat status {};
  return ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_dev == file.device &&
         status.st_ino == file.inode && (::fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR;
}

// A duplicate of a descriptor that this process has on that file; QEMU keeps those of its memory backends. Looked at
// once more, because the number may be somebody else's by now. -1: there is none.
int duplicate_on(const FileId& file) {
  DIR* directory = ::opendir("/proc/self/fd");
  if (directory == nullptr) return -1;
  int found = -1;
  while (found < 0) {
    const dirent* entry = ::readdir(directory);
    if (entry == nullptr) break;
    char* end = nullptr;
    const long fd = std::strtol(entry->d_name, &end, 10);
    if (end == entry->d_name || *end != '\0' || !is_memory(static_cast<int>(fd), file)) continue;
    const int copy = ::fcntl(static_cast<int>(fd), F_DUPFD_CLOEXEC, 3);
    if (copy >= 0 && is_memory(copy, file)) {
      found = copy;
    } else if (copy >= 0) {
      ::close(copy);
    }
  }
  ::closedir(directory);
  return found;
}

// The shared mappings of files that can be written, with those files: [{ address, lengthBytes, offset, file }], `file`
// being the place of its descriptor among those that come with the answer.
void list_memory(Answer& answer) {
  std::FILE* maps = std::fopen("/proc/self/maps", "re");
  if (maps == nullptr) return answer.fail("open /proc/self/maps", errno);
  answer.closes_fds = true;
  FileId files[kMostFiles];
  std::size_t mappings = 0;
  answer.add("{\"version\":%d,\"mappings\":[", kVersion);
  char line[4352];  // a path and the rest
  while (std::fgets(line, sizeof line, maps) != nullptr) {
    std::uint64_t start = 0;
    std::uint64_t end = 0;
    std::uint64_t offset = 0;
    std::uint64_t inode = 0;
    unsigned major_number = 0;
    unsigned minor_number = 0;
    char permissions[5] = {};
    if (std::sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64, &start, &end, permissions,
                    &offset, &major_number, &minor_number, &inode) != 7)
      continue;
    if (permissions[1] != 'w' || permissions[3] != 's' || inode == 0) continue;
    const FileId file{::makedev(major_number, minor_number), static_cast<ino_t>(inode)};
    std::size_t at = 0;
    while (at < answer.fd_count && (files[at].device != file.device || files[at].inode != file.inode)) ++at;
    if (at == answer.fd_count) {
      const int fd = duplicate_on(file);
      if (fd < 0) continue;  // not one of QEMU's own files, or a device
      if (at == kMostFiles) {
        ::close(fd);
        std::fclose(maps);
        return answer.fail("too many files of memory", E2BIG);
      }
      files[at] = file;
      answer.fds[answer.fd_count++] = fd;
    }
    if (mappings == kMostMappings) {
      std::fclose(maps);
      return answer.fail("too many mappings", E2BIG);
    }
    // Addresses as text: they need not fit into a number of JavaScript's.
    answer.add("%s{\"address\":\"%" PRIx64 "\",\"lengthBytes\":%" PRIu64 ",\"offset\":%" PRIu64
               ",\"file\":%zu,\"device\":\"%x:%x\",\"inode\":\"%" PRIu64 "\"}",
               mappings > 0 ? "," : "", start, end - start, offset, at, major_number, minor_number, inode);
    ++mappings;
  }
  std::fclose(maps);
  answer.add("]}\n");
}

// ---- userfaultfd

// Full scope: faults in QEMU's system calls (vhost, readv into the guest) are served too.
int open_userfaultfd() {
  const int device = ::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
  if (device >= 0) {
    const int fd = ::ioctl(device, _IO(0xAA, 0x00), O_CLOEXEC | O_NONBLOCK);
    ::close(device);
    if (fd >= 0) return fd;
  }
  return static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
}

void give_userfaultfd(Answer& answer, std::uint64_t features) {
  std::size_t at = 0;
  while (at < g_kept_count && g_kept[at].features != features) ++at;
  const bool anew = at == g_kept_count;
  if (anew) {
    if (g_kept_count == kMostUserfaultfds) return answer.fail("too many userfaultfds", EMFILE);
    UniqueFd fd(open_userfaultfd());
    if (!fd) return answer.fail("userfaultfd", errno);
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = features;
    if (::ioctl(fd.get(), UFFDIO_API, &api) != 0) return answer.fail("UFFDIO_API", errno);
    g_kept[g_kept_count++] = {features, api.features, fd.release()};
  }
  answer.add("{\"version\":%d,\"features\":\"%" PRIx64 "\",\"offered\":\"%" PRIx64 "\",\"new\":%s}\n",
             kVersion, features, g_kept[at].offered, anew ? "true" : "false");
  answer.fds[answer.fd_count++] = g_kept[at].fd;
}

// ---- requests

void answer_request(const char* request, Answer& answer) {
  char word[16] = {};
  int version = 0;
  int consumed = 0;
  if (std::sscanf(request, "%d %15s%n", &version, word, &consumed) != 2)
    return answer.fail("not a request", EPROTO);
  if (version != kVersion) return answer.fail("another version", EPROTONOSUPPORT);
  const char* rest = request + consumed;
  if (std::strcmp(word, "hello") == 0 && *rest == '\0') {
    answer.add("{\"version\":%d,\"pid\":%ld,\"uid\":%ld,\"pageSize\":%ld}\n", kVersion,
               static_cast<long>(::getpid()), static_cast<long>(::geteuid()), ::sysconf(_SC_PAGESIZE));
    return;
  }
  if (std::strcmp(word, "memory") == 0 && *rest == '\0') {
    list_memory(answer);
  } else if (std::strcmp(word, "userfaultfd") == 0 && *rest == ' ') {
    char* end = nullptr;
    errno = 0;
    const std::uint64_t features = std::strtoull(rest + 1, &end, 16);
    if (errno != 0 || end == rest + 1 || *end != '\0') return answer.fail("not a set of features", EINVAL);
    give_userfaultfd(answer, features);
  } else {
    answer.fail("no such request", ENOSYS);
  }
  if (answer.overflow) answer.fail("the answer is too long", EOVERFLOW);
}

bool may_ask(int connection) {
  ucred peer{};
  socklen_t length = sizeof peer;
  if (::getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) return false;
  return peer.uid == 0 || peer.uid == g_started_as || peer.uid == ::geteuid();
}

Answer g_answer;  // large, and of the serving thread alone

void serve(int connection) {
  if (!may_ask(connection)) return;
  const std::int64_t deadline = now_ms() + kConnectionMs;
  char request[kRequestBytes];
  std::size_t held = 0;
  for (int requests = 0; requests < kMostRequests; ++requests) {
    char* end = nullptr;
    while ((end = static_cast<char*>(std::memchr(request, '\n', held))) == nullptr) {
      if (held == sizeof request || !wait_for(connection, POLLIN, std::min(deadline, now_ms() + kSilenceMs)))
        return;
      // Descriptors that somebody sends along are closed by the kernel: there is no room for them.
      const ssize_t count = ::recv(connection, request + held, sizeof request - held, MSG_DONTWAIT);
      if (count < 0 && (errno == EINTR || errno == EAGAIN)) continue;
      if (count <= 0) return;
      held += static_cast<std::size_t>(count);
    }
    *end = '\0';
    g_answer.begin();
    // A NUL within the line ends it early, and what is left of it is then no request.
    answer_request(request, g_answer);
    const bool sent = send_answer(connection, g_answer, deadline);
    g_answer.begin();  // and nothing of it stays open
    if (!sent) return;
    const std::size_t used = static_cast<std::size_t>(end + 1 - request);
    held -= used;
    std::memmove(request, end + 1, held);
  }
}

void* serve_for_ever(void*) {
  ::prctl(PR_SET_NAME, "memferry-shim");
  for (;;) {
    const int accepted = ::accept4(g_listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (accepted >= 0) {
      const UniqueFd connection(accepted);
      serve(connection.get());
    } else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
      ::usleep(100000);  // the connection stays in the queue
    } else if (errno == EBADF || errno == EINVAL) {
      return nullptr;
    }
  }
}

// ---- start

bool is_meant_for_this_program() {
  const char* wanted = std::getenv("MEMFERRY_SHIM_PROGRAM");
  if (wanted == nullptr) wanted = "qemu";
  char path[4096];
  const ssize_t length = ::readlink("/proc/self/exe", path, sizeof path - 1);
  if (length <= 0) return false;
  path[length] = '\0';
  const char* slash = std::strrchr(path, '/');
  const char* name = slash == nullptr ? path : slash + 1;
  return std::strncmp(name, wanted, std::strlen(wanted)) == 0;
}

void close_in_child() { ::close(g_listener); }

[[gnu::constructor]] void start() {
  const char* path = std::getenv("MEMFERRY_SHIM_SOCKET");
  if (path == nullptr || *path == '\0' || !is_meant_for_this_program()) return;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::size_t length = std::strlen(path);
  if (length >= sizeof address.sun_path) {
    errno = ENAMETOOLONG;
    refuse_to_start("socket", path);
  }
  std::memcpy(address.sun_path, path, length);  // it ends in zeros
  ::unsetenv("MEMFERRY_SHIM_SOCKET");           // `path` is not to be read any more
  UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!listener) refuse_to_start("socket", address.sun_path);
  // The program has no other thread yet.
  const mode_t before = ::umask(0177);
  const int listening = memferry::listen_at(listener.get(), address, 4);
  ::umask(before);
  if (listening != 0) {
    errno = listening;
    refuse_to_start("listen on", address.sun_path);
  }
  g_listener = listener.release();
  g_started_as = ::geteuid();
  ::pthread_atfork(nullptr, nullptr, close_in_child);

  sigset_t all;
  sigset_t former;
  sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &former);
  pthread_attr_t attributes;
  ::pthread_attr_init(&attributes);
  ::pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_t thread{};
  const int error = ::pthread_create(&thread, &attributes, serve_for_ever, nullptr);
  ::pthread_attr_destroy(&attributes);
  ::pthread_sigmask(SIG_SETMASK, &former, nullptr);
  if (error != 0) {
    errno = error;
    refuse_to_start("thread for", address.sun_path);
  }
}

}  // namespace
