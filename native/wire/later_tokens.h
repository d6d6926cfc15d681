// Tokens of a session's connections, of attempts that its table does not reach to: a table is bounded, and a guest that is
// gathered for hours over a bad link is not lost because of it.
//
// Threads: any.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "wire/frame.h"

namespace memferry::wire {

// An epoch has 16 bits for it.
inline constexpr std::uint32_t kMostStageAttempts = 1U << 16U;

// Under a key that no connection shows; who has overheard all others knows nothing of it. Throws std::runtime_error
// (libcrypto).
[[nodiscard]] Token later_token(const TreeKey& key, StageRole role, std::uint32_t attempt);

// Of a table ([attempt * kStageRoles + role]), or behind its end. nullopt: there is none (left).
[[nodiscard]] std::optional<Token> session_token(std::span<const Token> table, StageRole role,
                                                 std::uint32_t attempt);

}  // namespace memferry::wire
