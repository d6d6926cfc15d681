#include "wire/hello.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <cerrno>
#include <exception>

#include "wire/socket.h"

namespace memferry::wire {
namespace {

// The first bytes on a fresh connection always fit into its buffer.
bool answer(int fd, HelloStatus status) {
  const HelloReply reply{kFrameMagic, static_cast<std::uint32_t>(status)};
  return ::send(fd, &reply, sizeof reply, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(sizeof reply);
}

}  // namespace

bool equal_tokens(const Token& a, const Token& b) {
  unsigned difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) difference |= static_cast<unsigned>(a[i] ^ b[i]);
  // The compiler must not turn the loop into an early return.
  asm volatile("" : "+r"(difference));
  return difference == 0;
}

bool accept_connection(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) != 0) return false;
  try {
    configure_connection(fd);
  } catch (const std::exception&) {
    return false;  // it was reset already
  }
  return answer(fd, HelloStatus::kAccepted);
}

void turn_away(int fd, HelloStatus status) { (void)answer(fd, status); }

IoResult receive_until(Stream& stream, std::span<std::byte> buffer,
                       std::chrono::steady_clock::time_point deadline, int cancel_fd) {
  while (!buffer.empty()) {
    switch (wait_readable(stream.fd(), deadline, cancel_fd)) {
      case DialResult::Kind::kConnected:
        break;
      case DialResult::Kind::kCancelled:
        return {IoResult::Kind::kCut, ECANCELED};
      default:
        return {IoResult::Kind::kCut, ETIMEDOUT};
    }
    std::size_t received = 0;
    const IoResult result = stream.recv_some(buffer, received);
    if (!result.done()) return result;
    buffer = buffer.subspan(received);
  }
  return {};
}

}  // namespace memferry::wire
