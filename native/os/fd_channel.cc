#include "os/fd_channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "os/kernel_abi.h"
#include "os/process_start.h"
#include "os/socket_file.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

using Clock = std::chrono::steady_clock;

// Handlers talk to few clients, and each says what it has at once.
constexpr int kBacklog = 64;
// A process out of descriptors can accept nothing; its listener looks again after this, instead of spinning.
constexpr int kExhaustedMs = 50;

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.find('\0') != std::string::npos)
    throw std::invalid_argument("socket path: empty, or with a NUL in it");
  if (path.size() >= sizeof address.sun_path)
    throw std::invalid_argument("socket path: longer than " + std::to_string(sizeof address.sun_path - 1) +
                                " bytes: " + path);
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

UniqueFd stream_socket() {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw_errno("socket(AF_UNIX)");
  return fd;
}

int connect_to(int fd, const sockaddr_un& address) {
  return ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ? 0 : errno;
}

// Linux 6.5 gives the pidfd with the socket. Before that the pid is opened, which may be another process's by then: one
// that was started after the connection was there is none of ours.
UniqueFd peer_pidfd(int fd, const ucred& peer, std::uint64_t connected_ticks) {
  int pidfd = -1;
  socklen_t bytes = sizeof pidfd;
  if (::getsockopt(fd, SOL_SOCKET, abi::kSoPeerPidfd, &pidfd, &bytes) == 0) return UniqueFd(pidfd);
  if (errno != ENOPROTOOPT || peer.pid <= 0) return {};
  UniqueFd opened(static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)));
  if (!opened) return {};
  const auto started = process_start_ticks(peer.pid);
  if (!started || *started > connected_ticks) return {};
  return opened;
}

// Takes over every descriptor of the message, before anything is judged.
std::vector<UniqueFd> take_descriptors(const msghdr& message) {
  std::vector<UniqueFd> taken;
  taken.reserve(kMostDescriptors);
  for (const cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
       part = CMSG_NXTHDR(const_cast<msghdr*>(&message), const_cast<cmsghdr*>(part))) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS || part->cmsg_len < CMSG_LEN(0))
      continue;
    const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      taken.emplace_back(fd);
    }
  }
  return taken;
}

}  // namespace

const char* fd_outcome_name(FdOutcome outcome) {
  switch (outcome) {
    case FdOutcome::kOk:
      return "ok";
    case FdOutcome::kTimedOut:
      return "timed-out";
    case FdOutcome::kCancelled:
      return "cancelled";
    case FdOutcome::kTooManyDescriptors:
      return "too-many-descriptors";
    case FdOutcome::kTruncated:
      return "truncated";
    case FdOutcome::kPeerGone:
      return "peer-gone";
  }
  return "cancelled";
}

pid_t peer_pid(int fd) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) throw_errno("getsockopt(SO_PEERCRED)");
  return peer.pid;
}

FdConnection::FdConnection(UniqueFd connected)
    : fd_(std::move(connected)), cancel_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!cancel_) throw_errno("eventfd");
  const std::uint64_t connected_ticks = boot_ticks_now();
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (::getsockopt(fd_.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0)
    throw_errno("getsockopt(SO_PEERCRED)");
  peer_.pid = peer.pid;
  peer_.uid = peer.uid;
  peer_.gid = peer.gid;
  peer_.pidfd = peer_pidfd(fd_.get(), peer, connected_ticks);
}

FdConnection FdConnection::connect(const std::string& path, std::chrono::milliseconds timeout) {
  const sockaddr_un address = address_of(path);
  UniqueFd fd = stream_socket();
  const auto deadline = Clock::now() + timeout;
  for (;;) {
    const int error = connect_to(fd.get(), address);
    if (error == 0) return FdConnection(std::move(fd));
    // EAGAIN: the listener's queue is full, and there is nothing to poll for.
    if (error != EAGAIN && error != EINTR) throw SystemError("connect(" + path + ")", error);
    if (Clock::now() >= deadline) throw SystemError("connect(" + path + ")", ETIMEDOUT);
    ::poll(nullptr, 0, 10);
  }
}

FdConnection::Ready FdConnection::wait(short events, Clock::time_point deadline) const {
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    std::array<pollfd, 2> waiting{pollfd{fd_.get(), events, 0}, pollfd{cancel_.get(), POLLIN, 0}};
    const int ready =
        ::poll(waiting.data(), waiting.size(), static_cast<int>(std::clamp<std::int64_t>(left, 0, 60'000)));
    if (ready < 0 && errno != EINTR) throw_errno("poll");
    if (ready > 0 && waiting[1].revents != 0) return Ready::kCancelled;
    if (ready > 0 && waiting[0].revents != 0) return Ready::kYes;
    if (Clock::now() >= deadline) return Ready::kTimedOut;
  }
}

FdConnection::Received FdConnection::receive(std::size_t most_bytes, std::size_t most_descriptors,
                                             std::chrono::milliseconds timeout) {
  if (most_bytes == 0) throw std::invalid_argument("receive: no room for a byte");
  const auto deadline = Clock::now() + timeout;
  Received received;
  received.bytes.resize(most_bytes);
  for (;;) {
    switch (wait(POLLIN, deadline)) {
      case Ready::kYes:
        break;
      case Ready::kTimedOut:
        return {FdOutcome::kTimedOut, {}, {}};
      case Ready::kCancelled:
        return {FdOutcome::kCancelled, {}, {}};
    }
    // Room for as many as the kernel ever sends: how many may come is judged here, not by what fits.
    alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kMostDescriptors * sizeof(int))> control{};
    iovec into{received.bytes.data(), received.bytes.size()};
    msghdr message{};
    message.msg_iov = &into;
    message.msg_iovlen = 1;
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    const ssize_t got = ::recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got < 0) {
      if (errno == EAGAIN || errno == EINTR) continue;
      // The peer closed with bytes of ours unread: an end like any other.
      if (errno != ECONNRESET) throw_errno("recvmsg");
      received.bytes.clear();
      return received;
    }
    received.descriptors = take_descriptors(message);
    if ((message.msg_flags & MSG_CTRUNC) != 0) return {FdOutcome::kTruncated, {}, {}};
    if (received.descriptors.size() > most_descriptors) return {FdOutcome::kTooManyDescriptors, {}, {}};
    received.bytes.resize(static_cast<std::size_t>(got));
    return received;
  }
}

FdOutcome FdConnection::send(std::span<const std::byte> bytes, std::span<const int> descriptors,
                             std::chrono::milliseconds timeout) {
  if (bytes.empty()) throw std::invalid_argument("send: no bytes, and descriptors go with a byte");
  if (descriptors.size() > kMostDescriptors) throw std::invalid_argument("send: too many descriptors");
  const auto deadline = Clock::now() + timeout;
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(kMostDescriptors * sizeof(int))> control{};
  std::size_t sent = 0;
  while (sent < bytes.size()) {
    iovec from{const_cast<std::byte*>(bytes.data()) + sent, bytes.size() - sent};
    msghdr message{};
    message.msg_iov = &from;
    message.msg_iovlen = 1;
    if (sent == 0 && !descriptors.empty()) {
      message.msg_control = control.data();
      message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
      cmsghdr* part = CMSG_FIRSTHDR(&message);
      part->cmsg_level = SOL_SOCKET;
      part->cmsg_type = SCM_RIGHTS;
      part->cmsg_len = CMSG_LEN(descriptors.size_bytes());
      std::memcpy(CMSG_DATA(part), descriptors.data(), descriptors.size_bytes());
    }
    const ssize_t count = ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count > 0) {
      sent += static_cast<std::size_t>(count);
      continue;
    }
    if (count < 0 && (errno == EPIPE || errno == ECONNRESET)) return FdOutcome::kPeerGone;
    if (count < 0 && errno != EAGAIN && errno != EINTR) throw_errno("sendmsg");
    switch (wait(POLLOUT, deadline)) {
      case Ready::kYes:
        break;
      case Ready::kTimedOut:
        return FdOutcome::kTimedOut;
      case Ready::kCancelled:
        return FdOutcome::kCancelled;
    }
  }
  return FdOutcome::kOk;
}

void FdConnection::shut_down() {
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = ::write(cancel_.get(), &one, sizeof one);
  // The peer learns it now, also when the descriptor is still in use here. Fails when the peer has gone.
  (void)::shutdown(fd_.get(), SHUT_RDWR);
}

FdListener::FdListener(const std::string& path, mode_t mode) : path_(path), fd_(stream_socket()) {
  const sockaddr_un address = address_of(path);
  // Before bind(): the file is never there with more than these.
  if (::fchmod(fd_.get(), mode & 0777) != 0) throw_errno("fchmod(socket)");
  const int error = listen_at(fd_.get(), address, kBacklog);
  if (error != 0) throw SystemError("bind(" + path + ")", error);
  struct stat info {};
  if (::lstat(address.sun_path, &info) == 0) {
    device_ = info.st_dev;
    inode_ = info.st_ino;
  }
}

UniqueFd FdListener::accept(int cancel_fd) {
  for (;;) {
    std::array<pollfd, 2> waiting{pollfd{fd_.get(), POLLIN, 0}, pollfd{cancel_fd, POLLIN, 0}};
    if (::poll(waiting.data(), waiting.size(), -1) < 0) {
      if (errno == EINTR) continue;
      throw_errno("poll");
    }
    if (waiting[1].revents != 0) return {};
    UniqueFd fd(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd) return fd;
    switch (errno) {
      case EAGAIN:
      case EINTR:
      case ECONNABORTED:
        continue;
      case EMFILE:
      case ENFILE:
      case ENOBUFS:
      case ENOMEM: {
        pollfd cancelled{cancel_fd, POLLIN, 0};
        if (::poll(&cancelled, 1, kExhaustedMs) > 0) return {};
        continue;
      }
      default:
        throw_errno("accept4");
    }
  }
}

void FdListener::close() {
  if (!fd_) return;
  struct stat info {};
  if (inode_ != 0 && ::lstat(path_.c_str(), &info) == 0 && info.st_dev == device_ && info.st_ino == inode_)
    (void)::unlink(path_.c_str());
  fd_.reset();
}

}  // namespace memferry
