// Hellos: what receivers and stages have in common when they are dialled, and a server when it dials another.
//
// Threads: any.
#pragma once

#include <chrono>
#include <cstddef>
#include <span>

#include "wire/frame.h"
#include "wire/stream.h"

namespace memferry::wire {

// Takes the same time wherever the first difference is.
[[nodiscard]] bool equal_tokens(const Token& a, const Token& b);

// Makes an accepted descriptor a connection (blocking, configured) and answers its hello. False when the peer has
// gone again. Never blocks.
[[nodiscard]] bool accept_connection(int fd);

// The answer to a hello that is not accepted; whoever owns the descriptor closes it. Never blocks.
void turn_away(int fd, HelloStatus status);

// Reads exactly the buffer, never longer than the deadline and never past the moment when `cancel_fd` is readable,
// however slowly the peer sends: kCut with ETIMEDOUT, ECANCELED.
[[nodiscard]] IoResult receive_until(Stream& stream, std::span<std::byte> buffer,
                                     std::chrono::steady_clock::time_point deadline, int cancel_fd);

}  // namespace memferry::wire
