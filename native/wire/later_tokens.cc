#include "wire/later_tokens.h"

#include <algorithm>
#include <array>

#include "page/keyed_hash.h"

namespace memferry::wire {
namespace {

// What is hashed, twice with another `half` for the two halves of a token. Little-endian, without padding.
struct Numbered {
  std::uint32_t attempt;
  std::uint32_t line;
  std::uint64_t half;
};
static_assert(sizeof(Numbered) == sizeof(KeyedHash));

}  // namespace

Token later_token(const TreeKey& key, std::uint32_t line, std::uint32_t attempt) {
  std::array<Numbered, 2> numbered{};
  for (std::uint64_t half = 0; half < numbered.size(); ++half) {
    numbered[half] = {attempt, line, half};
  }
  std::array<KeyedHash, 2> hashes{};
  KeyedHasher(key).pages(std::as_bytes(std::span(numbered)), sizeof(Numbered), hashes.data());
  Token token{};
  static_assert(sizeof token == sizeof hashes);
  std::ranges::copy(hashes[0], token.begin());
  std::ranges::copy(hashes[1], token.begin() + sizeof(KeyedHash));
  return token;
}

std::optional<Token> session_token(std::span<const Token> table, StageRole role, std::uint32_t attempt) {
  const std::size_t at = std::size_t{attempt} * kStageRoles + static_cast<std::size_t>(role);
  if (at < table.size()) return table[at];
  // A member's connections show what would be the key.
  const std::optional<TreeKey> key = role == StageRole::kPopular ? std::nullopt : later_token_key(table);
  if (!key || attempt >= kMostAttempts) return std::nullopt;
  return later_token(*key, static_cast<std::uint32_t>(role), attempt);
}

std::optional<Token> data_token(std::span<const Token> table, std::size_t columns, std::size_t column,
                                std::uint32_t epoch) {
  const std::size_t rows = table.size() / columns;
  if (column >= columns || !has_data_token(table.size(), columns, epoch)) return std::nullopt;
  if (rows == 1 || epoch < rows - 1) return table[epoch * columns + column];
  return later_token(token_pair(table[(rows - 1) * columns], table[(rows - 1) * columns + 1]),
                     static_cast<std::uint32_t>(column), epoch);
}

}  // namespace memferry::wire
