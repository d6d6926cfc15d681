#include "wire/stream.h"

#include <limits.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace memferry::wire {
namespace {

// What is left of `buffers` after their first `bytes`.
std::span<iovec> advanced(std::span<iovec> buffers, std::size_t bytes) {
  while (!buffers.empty() && bytes >= buffers.front().iov_len) {
    bytes -= buffers.front().iov_len;
    buffers = buffers.subspan(1);
  }
  if (bytes > 0) {
    buffers.front().iov_base = static_cast<std::byte*>(buffers.front().iov_base) + bytes;
    buffers.front().iov_len -= bytes;
  }
  return buffers;
}

}  // namespace

std::string IoResult::describe() const {
  switch (kind) {
    case Kind::kDone:
      return "done";
    case Kind::kEnd:
      return "connection closed by the peer";
    case Kind::kCut:
      return error == 0 ? "connection closed by the peer in the middle of a frame"
                        : "connection lost: " + std::generic_category().message(error);
  }
  return "unknown";
}

IoResult Stream::send_all(std::span<const std::byte> bytes) {
  iovec buffer{const_cast<std::byte*>(bytes.data()), bytes.size()};
  return send_all(std::span(&buffer, 1));
}

IoResult Stream::recv_scattered(std::span<iovec> buffers) {
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    IoResult io = recv_exact({static_cast<std::byte*>(buffers[i].iov_base), buffers[i].iov_len});
    if (io.done()) continue;
    if (i > 0 && io.kind == IoResult::Kind::kEnd) io = {IoResult::Kind::kCut, 0};
    return io;
  }
  return {};
}

IoResult PlainStream::send_all(std::span<iovec> buffers) {
  while (!buffers.empty()) {
    if (buffers.front().iov_len == 0) {
      buffers = buffers.subspan(1);
      continue;
    }
    msghdr message{};
    message.msg_iov = buffers.data();
    message.msg_iovlen = std::min<std::size_t>(buffers.size(), IOV_MAX);
    const ssize_t sent = ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) continue;
      return {IoResult::Kind::kCut, errno};
    }
    buffers = advanced(buffers, static_cast<std::size_t>(sent));
  }
  return {};
}

IoResult PlainStream::recv_exact(std::span<std::byte> buffer) {
  const std::size_t wanted = buffer.size();
  while (!buffer.empty()) {
    const ssize_t received = ::recv(fd_.get(), buffer.data(), buffer.size(), MSG_WAITALL);
    if (received > 0) {
      buffer = buffer.subspan(static_cast<std::size_t>(received));
    } else if (received == 0) {
      return {buffer.size() == wanted ? IoResult::Kind::kEnd : IoResult::Kind::kCut, 0};
    } else if (errno != EINTR) {
      return {IoResult::Kind::kCut, errno};
    }
  }
  return {};
}

IoResult PlainStream::recv_scattered(std::span<iovec> buffers) {
  for (bool begun = false;;) {
    buffers = advanced(buffers, 0);  // empty ones at the front
    if (buffers.empty()) return {};
    msghdr message{};
    message.msg_iov = buffers.data();
    message.msg_iovlen = std::min<std::size_t>(buffers.size(), IOV_MAX);
    const ssize_t received = ::recvmsg(fd_.get(), &message, MSG_WAITALL);
    if (received > 0) {
      begun = true;
      buffers = advanced(buffers, static_cast<std::size_t>(received));
    } else if (received == 0) {
      return {begun ? IoResult::Kind::kCut : IoResult::Kind::kEnd, 0};
    } else if (errno != EINTR) {
      return {IoResult::Kind::kCut, errno};
    }
  }
}

IoResult PlainStream::recv_some(std::span<std::byte> buffer, std::size_t& received) {
  for (;;) {
    const ssize_t got = ::recv(fd_.get(), buffer.data(), buffer.size(), 0);
    received = got > 0 ? static_cast<std::size_t>(got) : 0;
    if (got > 0) return {};
    if (got == 0) return {IoResult::Kind::kEnd, 0};
    if (errno != EINTR) return {IoResult::Kind::kCut, errno};
  }
}

void PlainStream::shutdown() { ::shutdown(fd_.get(), SHUT_RDWR); }

}  // namespace memferry::wire
