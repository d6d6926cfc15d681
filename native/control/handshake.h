// Who speaks: mutual challenge and response over the shared secret, on a fresh control connection after its preface;
// docs/protocol.md has the four messages and why they are so. Both sides.
//
// Threads: any; each call blocks its caller until it is over, at most for the deadline, or until `cancel_fd` is readable.
#pragma once

#include <chrono>
#include <cstdint>

#include "control/crypto.h"

namespace memferry::control {

inline constexpr std::chrono::milliseconds kHandshakeTimeout{5000};
inline constexpr std::uint16_t kProtocolVersion = 1;

enum class Role : std::uint8_t { kDialler, kAcceptor };

// `fd`: a connected socket, non-blocking. Each gives the session's key, which only the two ends of this very connection
// know. They throw Failure: AUTH_FAILED, VERSION_MISMATCH, PROTOCOL_ERROR, PEER_LOST, CANCELLED.
[[nodiscard]] Key handshake_as_acceptor(int fd, ByteSpan secret,
                                        std::chrono::steady_clock::time_point deadline, int cancel_fd);
// The preface included.
[[nodiscard]] Key handshake_as_dialler(int fd, ByteSpan secret,
                                       std::chrono::steady_clock::time_point deadline, int cancel_fd);

// The key under which the frames that `sender` sends are authenticated.
[[nodiscard]] Key direction_key(const Key& session, Role sender);

}  // namespace memferry::control
