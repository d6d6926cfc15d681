#include "control/handshake.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>

#include "control/failure.h"
#include "wire/frame.h"

namespace memferry::control {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kNonceBytes = 32;
constexpr std::size_t kMacBytes = 32;
constexpr std::uint16_t kOk = 1;
constexpr std::uint16_t kWrongVersion = 2;
constexpr std::uint16_t kRefused = 3;
// How long a refusal may take to arrive.
constexpr std::chrono::milliseconds kFarewell{1000};

using DiallerHello = std::array<std::uint8_t, 4 + kNonceBytes>;   // lowest, highest version, nonce
using AcceptorHello = std::array<std::uint8_t, 8 + kNonceBytes>;  // status, version, lowest, highest, nonce
using AcceptorProof = std::array<std::uint8_t, 2 + kMacBytes>;    // status, MAC

std::uint16_t get16(ByteSpan bytes, std::size_t at) {
  return static_cast<std::uint16_t>(bytes[at] | bytes[at + 1] << 8U);
}

void put16(std::span<std::uint8_t> bytes, std::size_t at, std::uint16_t value) {
  bytes[at] = static_cast<std::uint8_t>(value);
  bytes[at + 1] = static_cast<std::uint8_t>(value >> 8U);
}

class Talk {
 public:
  Talk(int fd, Clock::time_point deadline, int cancel_fd)
      : fd_(fd), deadline_(deadline), cancel_fd_(cancel_fd) {}

  void read(std::span<std::uint8_t> bytes) {
    while (!bytes.empty()) {
      check();
      const ssize_t got = ::recv(fd_, bytes.data(), bytes.size(), 0);
      if (got > 0) {
        bytes = bytes.subspan(static_cast<std::size_t>(got));
      } else if (got == 0) {
        throw Failure("PEER_LOST", "the peer closed the connection in the middle of the handshake");
      } else {
        await(POLLIN);
      }
    }
  }

  void write(ByteSpan bytes) {
    while (!bytes.empty()) {
      check();
      const ssize_t put = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (put > 0) {
        bytes = bytes.subspan(static_cast<std::size_t>(put));
      } else {
        await(POLLOUT);
      }
    }
  }

  // Says no and lets it arrive: closing with bytes unread could discard the answer that explains the refusal.
  void farewell(ByteSpan bytes) {
    write(bytes);
    ::shutdown(fd_, SHUT_WR);
    deadline_ = std::min(deadline_, Clock::now() + kFarewell);
    try {
      std::array<std::uint8_t, 256> rest;
      for (;;) read(rest);  // for no longer than that, however much comes
    } catch (const Failure&) {
      // Closed there, or long enough.
    }
  }

 private:
  void await(short events) {
    if (errno == EINTR) return;
    if (errno != EAGAIN && errno != EWOULDBLOCK)
      throw Failure("PEER_LOST", "the connection failed: " + std::generic_category().message(errno));
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - Clock::now()).count();
    std::array<pollfd, 2> fds = {{{fd_, events, 0}, {cancel_fd_, POLLIN, 0}}};
    ::poll(fds.data(), fds.size(), static_cast<int>(std::max<decltype(left)>(left, 0)));
  }

  // Before each piece: a peer that never pauses must not keep this side for longer than a silent one.
  void check() const {
    if (Clock::now() >= deadline_)
      throw Failure("PEER_LOST", "the peer did not finish the handshake in time");
    pollfd cancel{cancel_fd_, POLLIN, 0};
    if (::poll(&cancel, 1, 0) > 0) throw Failure("CANCELLED", "the handshake was given up");
  }

  const int fd_;
  Clock::time_point deadline_;
  const int cancel_fd_;
};

Key proof(ByteSpan secret, Role role, ByteSpan hello, ByteSpan answer) {
  const char* label = role == Role::kDialler ? "memferry control proof of the dialler"
                                             : "memferry control proof of the acceptor";
  return hmac_sha256(secret, {bytes_of(label), hello, answer});
}

Key session_key(ByteSpan secret, ByteSpan hello, ByteSpan answer) {
  return hmac_sha256(secret, {bytes_of("memferry control session"), hello, answer});
}

[[noreturn]] void version_mismatch(std::uint16_t lowest, std::uint16_t highest) {
  throw Failure("VERSION_MISMATCH", "the peer speaks protocol versions " + std::to_string(lowest) + " to " +
                                        std::to_string(highest) + ", this side " +
                                        std::to_string(kProtocolVersion));
}

}  // namespace

Key handshake_as_acceptor(int fd, ByteSpan secret, Clock::time_point deadline, int cancel_fd) {
  Talk talk(fd, deadline, cancel_fd);
  DiallerHello hello;
  talk.read(hello);
  const std::uint16_t lowest = get16(hello, 0);
  const std::uint16_t highest = get16(hello, 2);
  if (lowest > highest) throw Failure("PROTOCOL_ERROR", "the peer sent a range of versions that is empty");
  const bool spoken = lowest <= kProtocolVersion && kProtocolVersion <= highest;
  AcceptorHello answer{};
  put16(answer, 0, spoken ? kOk : kWrongVersion);
  put16(answer, 2, spoken ? kProtocolVersion : 0);
  put16(answer, 4, kProtocolVersion);
  put16(answer, 6, kProtocolVersion);
  if (!spoken) {
    talk.farewell(answer);
    version_mismatch(lowest, highest);
  }
  fill_random(std::span(answer).subspan(8));
  talk.write(answer);

  Key claimed;
  talk.read(claimed);
  AcceptorProof reply{};
  if (!equal(claimed, proof(secret, Role::kDialler, hello, answer))) {
    put16(reply, 0, kRefused);
    talk.farewell(reply);
    throw Failure("AUTH_FAILED", "a peer could not prove that it knows the shared secret");
  }
  put16(reply, 0, kOk);
  const Key own = proof(secret, Role::kAcceptor, hello, answer);
  std::memcpy(reply.data() + 2, own.data(), own.size());
  talk.write(reply);
  return session_key(secret, hello, answer);
}

Key handshake_as_dialler(int fd, ByteSpan secret, Clock::time_point deadline, int cancel_fd) {
  Talk talk(fd, deadline, cancel_fd);
  talk.write(ByteSpan(reinterpret_cast<const std::uint8_t*>(wire::kControlPreface.data()),
                      wire::kControlPreface.size()));
  DiallerHello hello{};
  put16(hello, 0, kProtocolVersion);
  put16(hello, 2, kProtocolVersion);
  fill_random(std::span(hello).subspan(4));
  talk.write(hello);

  AcceptorHello answer;
  talk.read(answer);
  const std::uint16_t status = get16(answer, 0);
  if (status == kWrongVersion) version_mismatch(get16(answer, 4), get16(answer, 6));
  if (status != kOk) throw Failure("PROTOCOL_ERROR", "the peer does not speak memferry's control protocol");
  if (get16(answer, 2) != kProtocolVersion) version_mismatch(get16(answer, 4), get16(answer, 6));

  talk.write(proof(secret, Role::kDialler, hello, answer));
  AcceptorProof reply;
  talk.read(reply);
  if (get16(reply, 0) == kRefused)
    throw Failure("AUTH_FAILED", "the peer refused the shared secret: it was given another one");
  if (get16(reply, 0) != kOk ||
      !equal(ByteSpan(reply).subspan(2), proof(secret, Role::kAcceptor, hello, answer)))
    throw Failure("AUTH_FAILED", "the peer could not prove that it knows the shared secret");
  return session_key(secret, hello, answer);
}

Key direction_key(const Key& session, Role sender) {
  return hmac_sha256(session, {bytes_of(sender == Role::kDialler ? "memferry control frames from dialler"
                                                                 : "memferry control frames from acceptor")});
}

}  // namespace memferry::control
