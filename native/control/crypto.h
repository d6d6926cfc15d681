// The control connection's cryptography: HMAC-SHA256, the token streams that follow from a session's key, sealing, and
// randomness. docs/protocol.md says what each is for.
//
// Threads: any.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "page/hash.h"
#include "wire/frame.h"

namespace memferry::control {

using Bytes = std::vector<std::uint8_t>;
using ByteSpan = std::span<const std::uint8_t>;
using Key = std::array<std::uint8_t, 32>;

[[nodiscard]] ByteSpan bytes_of(std::string_view text);

// Over the parts, one after the other. Throws Failure (SYSTEM): libcrypto refuses.
[[nodiscard]] Key hmac_sha256(ByteSpan key, std::initializer_list<ByteSpan> parts);
// Takes the same time wherever the first difference is.
[[nodiscard]] bool equal(ByteSpan a, ByteSpan b);
void fill_random(std::span<std::uint8_t> bytes);

// Block b, 255 tokens, is HKDF-SHA256(key; no salt; label | context | b as u32 little-endian).
[[nodiscard]] std::vector<wire::Token> token_stream(ByteSpan key, std::string_view label, ByteSpan context,
                                                    std::size_t count);
// A table of kMaxEpochs rows, [epoch * (channels + 1) + channel], the demand channel's last in each row; the last row is
// the key of later epochs (wire/later_tokens.h).
[[nodiscard]] std::vector<wire::Token> data_tokens(const Key& session, const wire::MigrationId& migration,
                                                   unsigned channels);
inline constexpr unsigned kMaxEpochs = 256;

// AES-256-GCM under HMAC(session key; what), the image's or migration's id as additional data: 12 bytes nonce, the 32,
// 16 bytes tag. unseal() throws Failure (AUTH_FAILED).
[[nodiscard]] Bytes seal(const Key& session, ByteSpan id, const Key& secret, std::string_view what);
[[nodiscard]] Key unseal(const Key& session, ByteSpan id, ByteSpan sealed, std::string_view what);

[[nodiscard]] std::string to_hex(ByteSpan bytes);
// A region's digest as messages have it.
[[nodiscard]] std::string to_hex(const Hash128& digest);
// Of lower-case digits; throws Failure (PROTOCOL_ERROR).
[[nodiscard]] Bytes from_hex(std::string_view text);
[[nodiscard]] bool is_hex(std::string_view text, std::size_t bytes);

}  // namespace memferry::control
