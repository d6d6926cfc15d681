#include "wire/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "os/sys_error.h"

namespace memferry::wire {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::string_view kUnpaced = "reno";

const sockaddr_in& as_v4(const SocketAddress& address) {
  return *reinterpret_cast<const sockaddr_in*>(address.get());
}
const sockaddr_in6& as_v6(const SocketAddress& address) {
  return *reinterpret_cast<const sockaddr_in6*>(address.get());
}

void set_option(int fd, int level, int option, int value, const char* what) {
  if (::setsockopt(fd, level, option, &value, sizeof value) != 0) throw_errno(what);
}

int milliseconds_left(Clock::time_point deadline) {
  // Rounded up, so that a rest below one millisecond does not spin.
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<std::int64_t>(left, 0, 1 << 30));
}

// Waits for `events` on fd, for readability of cancel_fd, or for the deadline.
DialResult::Kind wait_for(int fd, short events, Clock::time_point deadline, int cancel_fd) {
  for (;;) {
    std::array<pollfd, 2> polled{{{fd, events, 0}, {cancel_fd, POLLIN, 0}}};  // a negative fd is ignored
    const int ready = ::poll(polled.data(), polled.size(), milliseconds_left(deadline));
    if (ready < 0) {
      if (errno == EINTR) continue;
      throw_errno("poll");
    }
    if (polled[1].revents != 0) return DialResult::Kind::kCancelled;
    if (polled[0].revents != 0) return DialResult::Kind::kConnected;
    if (Clock::now() >= deadline) return DialResult::Kind::kTimedOut;
  }
}

// A dial to a free port of the ephemeral range on this host can meet itself (simultaneous open); and a peer
// may be gone again by now.
int error_of_connected(int fd, const SocketAddress& address) {
  try {
    const SocketAddress local = SocketAddress::local(fd);
    return address.port() == local.port() && local.same_host(SocketAddress::peer(fd)) ? ECONNREFUSED : 0;
  } catch (const SystemError& error) {
    return error.error();
  }
}

}  // namespace

SocketAddress SocketAddress::parse(const std::string& host, std::uint16_t port) {
  SocketAddress address;
  in_addr v4{};
  if (::inet_pton(AF_INET, host.c_str(), &v4) == 1) {
    auto& out = *reinterpret_cast<sockaddr_in*>(&address.storage_);
    out.sin_family = AF_INET;
    out.sin_port = htons(port);
    out.sin_addr = v4;
    address.bytes_ = sizeof out;
    return address;
  }
  const std::size_t percent = host.find('%');
  in6_addr v6{};
  if (::inet_pton(AF_INET6, host.substr(0, percent).c_str(), &v6) == 1) {
    auto& out = *reinterpret_cast<sockaddr_in6*>(&address.storage_);
    out.sin6_family = AF_INET6;
    out.sin6_port = htons(port);
    out.sin6_addr = v6;
    if (percent != std::string::npos) {
      out.sin6_scope_id = ::if_nametoindex(host.c_str() + percent + 1);
      if (out.sin6_scope_id == 0) throw std::invalid_argument("no such network interface: " + host);
    }
    address.bytes_ = sizeof out;
    return address;
  }
  throw std::invalid_argument("not a numeric IPv4 or IPv6 address: '" + host + "'");
}

SocketAddress SocketAddress::local(int fd) {
  SocketAddress address;
  address.bytes_ = sizeof address.storage_;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address.storage_), &address.bytes_) != 0) {
    throw_errno("getsockname");
  }
  return address;
}

SocketAddress SocketAddress::peer(int fd) {
  SocketAddress address;
  address.bytes_ = sizeof address.storage_;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address.storage_), &address.bytes_) != 0) {
    throw_errno("getpeername");
  }
  return address;
}

std::uint16_t SocketAddress::port() const {
  return ntohs(family() == AF_INET6 ? as_v6(*this).sin6_port : as_v4(*this).sin_port);
}

bool SocketAddress::loopback() const {
  if (family() == AF_INET) return (ntohl(as_v4(*this).sin_addr.s_addr) >> 24) == 127;
  const in6_addr& address = as_v6(*this).sin6_addr;
  return IN6_IS_ADDR_LOOPBACK(&address) || (IN6_IS_ADDR_V4MAPPED(&address) && address.s6_addr[12] == 127);
}

bool SocketAddress::same_host(const SocketAddress& other) const {
  if (family() != other.family()) return false;
  if (family() == AF_INET) return as_v4(*this).sin_addr.s_addr == as_v4(other).sin_addr.s_addr;
  return std::memcmp(&as_v6(*this).sin6_addr, &as_v6(other).sin6_addr, sizeof(in6_addr)) == 0;
}

std::string SocketAddress::host() const {
  std::array<char, INET6_ADDRSTRLEN> text{};
  const void* address = family() == AF_INET6 ? static_cast<const void*>(&as_v6(*this).sin6_addr)
                                             : static_cast<const void*>(&as_v4(*this).sin_addr);
  if (::inet_ntop(family(), address, text.data(), text.size()) == nullptr) return "?";
  return text.data();
}

std::string SocketAddress::describe() const {
  std::string text = host();
  if (family() == AF_INET6) text.insert(0, 1, '[').push_back(']');
  return text.append(":").append(std::to_string(port()));
}

bool is_same_host(int connected_fd) {
  const SocketAddress peer = SocketAddress::peer(connected_fd);
  return peer.loopback() || peer.same_host(SocketAddress::local(connected_fd));
}

void configure_connection(int fd) {
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1, "setsockopt(TCP_NODELAY)");
  const int limit_ms = static_cast<int>(kSilenceLimit.count());
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, limit_ms, "setsockopt(TCP_USER_TIMEOUT)");
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1, "setsockopt(SO_KEEPALIVE)");
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 5, "setsockopt(TCP_KEEPIDLE)");
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 3, "setsockopt(TCP_KEEPINTVL)");
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 3, "setsockopt(TCP_KEEPCNT)");
  if (is_same_host(fd)) {
    // Every kernel has it, for everybody. Without it, it is only slower.
    (void)::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, kUnpaced.data(), kUnpaced.size());
  }
}

void bear_with_full_window(int fd) {
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 0, "setsockopt(TCP_USER_TIMEOUT)");
}

DialResult dial(const SocketAddress& address, std::chrono::milliseconds timeout, int cancel_fd) {
  const auto deadline = Clock::now() + timeout;
  UniqueFd fd(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw_errno("socket");
  if (::connect(fd.get(), address.get(), address.bytes()) != 0) {
    if (errno != EINPROGRESS && errno != EINTR) return {DialResult::Kind::kFailed, errno, {}};
    const DialResult::Kind waited = wait_for(fd.get(), POLLOUT, deadline, cancel_fd);
    if (waited != DialResult::Kind::kConnected) return {waited, 0, {}};
    int error = 0;
    socklen_t bytes = sizeof error;
    if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &bytes) != 0) error = errno;
    if (error != 0) return {DialResult::Kind::kFailed, error, {}};
  }
  if (const int error = error_of_connected(fd.get(), address); error != 0) {
    return {DialResult::Kind::kFailed, error, {}};
  }
  const int flags = ::fcntl(fd.get(), F_GETFL);
  if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags & ~O_NONBLOCK) != 0) throw_errno("fcntl");
  configure_connection(fd.get());
  return {DialResult::Kind::kConnected, 0, std::move(fd)};
}

DialResult::Kind wait_readable(int fd, Clock::time_point deadline, int cancel_fd) {
  return wait_for(fd, POLLIN, deadline, cancel_fd);
}

std::optional<std::chrono::milliseconds> silent_for(int fd) {
  int unread = 0;
  if (::ioctl(fd, FIONREAD, &unread) != 0) return std::nullopt;
  if (unread > 0) return std::chrono::milliseconds::zero();
  tcp_info info{};
  socklen_t bytes = sizeof info;
  if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0 || info.tcpi_state != TCP_ESTABLISHED)
    return std::nullopt;
  return std::chrono::milliseconds(info.tcpi_last_data_recv);
}

UniqueFd listen_on(const SocketAddress& address, int backlog) {
  UniqueFd fd(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw_errno("socket");
  // A port whose former connections are still in TIME_WAIT may be bound again.
  set_option(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1, "setsockopt(SO_REUSEADDR)");
  if (::bind(fd.get(), address.get(), address.bytes()) != 0) throw_errno("bind");
  if (::listen(fd.get(), backlog) != 0) throw_errno("listen");
  return fd;
}

}  // namespace memferry::wire
