// Tokens of connections: those of a table that both ends compute in advance, and behind its end those that follow from a
// key in it which no connection ever shows. A table is bounded, and a guest whose pages come for hours over a bad link is
// not lost because of it.
//
// Threads: any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "wire/frame.h"

namespace memferry::wire {

// Attempts of a session's role, epochs of a migration: of those of a session a hello has 16 bits.
inline constexpr std::uint32_t kMostAttempts = 1U << 16U;
// That may come to nothing one after the other, before whoever dials or is dialled gives up: connecting is no progress.
inline constexpr unsigned kMostBarrenAttempts = 64;  // of a session's role, each asked something
inline constexpr unsigned kMostBarrenEpochs = 256;

// `line`: a role, or the column of a data connection. Who has overheard all others knows nothing of it. Throws
// std::runtime_error (libcrypto).
[[nodiscard]] Token later_token(const TreeKey& key, std::uint32_t line, std::uint32_t attempt);

// nullopt: there is none (left).
//
// With a VMD server, of the table [attempt * kStageRoles + role]; the key is later_token_key().
[[nodiscard]] std::optional<Token> session_token(std::span<const Token> table, StageRole role,
                                                 std::uint32_t attempt);
// From source to destination, of the table [epoch * columns + column]; the key is the last row's first two, which are
// tokens themselves where there is one row.
[[nodiscard]] std::optional<Token> data_token(std::span<const Token> table, std::size_t columns,
                                              std::size_t column, std::uint32_t epoch);
[[nodiscard]] constexpr bool has_data_token(std::size_t table_tokens, std::size_t columns,
                                            std::uint32_t epoch) {
  return epoch < (table_tokens == columns ? 1 : kMostAttempts);
}

}  // namespace memferry::wire
