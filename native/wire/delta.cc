#include "wire/delta.h"

#include <algorithm>
#include <cstring>
#include <optional>

namespace memferry::wire {
namespace {

constexpr std::size_t kWord = sizeof(std::uint64_t);
// Equal bytes between two changes that are sent along: a token costs two bytes or more.
constexpr std::size_t kGap = kWord;
constexpr unsigned kMostVarintBytes = 5;

std::uint64_t word(std::span<const std::byte> bytes, std::size_t at) {
  std::uint64_t value = 0;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

std::size_t varint_bytes(std::uint64_t value) {
  std::size_t bytes = 1;
  for (; value >= 0x80; value >>= 7) ++bytes;
  return bytes;
}

void put_varint(std::byte*& to, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) *to++ = static_cast<std::byte>(value | 0x80);
  *to++ = static_cast<std::byte>(value);
}

std::optional<std::uint64_t> take_varint(std::span<const std::byte>& from) {
  std::uint64_t value = 0;
  for (unsigned i = 0; i < kMostVarintBytes && i < from.size(); ++i) {
    const auto byte = std::to_integer<std::uint64_t>(from[i]);
    value |= (byte & 0x7f) << (7 * i);
    if (byte < 0x80) {
      from = from.subspan(i + 1);
      return value;
    }
  }
  return std::nullopt;
}

struct Token {
  std::uint64_t skip;
  std::uint64_t length;
};

// The next token, its literal at the front of `from`. nullopt: not one that fits into `left` bytes.
std::optional<Token> take_token(std::span<const std::byte>& from, std::uint64_t left) {
  const auto skip = take_varint(from);
  if (!skip || *skip > left) return std::nullopt;
  const auto length = take_varint(from);
  if (!length || *length > left - *skip || *length > from.size()) return std::nullopt;
  return Token{*skip, *length};
}

bool well_formed(std::span<const std::byte> payload, std::uint64_t length) {
  for (std::uint64_t at = 0;;) {
    const auto token = take_token(payload, length - at);
    if (!token) return false;
    at += token->skip + token->length;
    if (token->length == 0) return payload.empty() && at == length;
    payload = payload.subspan(static_cast<std::size_t>(token->length));
  }
}

}  // namespace

bool DeltaEncoder::put(std::uint64_t skip, std::span<const std::byte> literal, std::size_t end) {
  const std::size_t bytes = varint_bytes(skip) + varint_bytes(literal.size()) + literal.size();
  if (bytes > end - at_) return false;
  std::byte* to = out_.data() + at_;
  put_varint(to, skip);
  put_varint(to, literal.size());
  if (!literal.empty()) std::memcpy(to, literal.data(), literal.size());
  at_ += bytes;
  return true;
}

bool DeltaEncoder::add(std::span<const std::byte> base, std::span<const std::byte> now, std::size_t most) {
  const std::size_t room = out_.size() - at_;
  if (room < kEndBytes) return false;
  const std::size_t end = at_ + std::min(most, room - kEndBytes);
  const std::size_t at_before = at_;
  const std::uint64_t skip_before = skip_;
  const std::size_t size = now.size();
  std::size_t told = 0;  // everything before it is in the payload or in skip_
  for (std::size_t at = 0;;) {
    while (at < size && word(base, at) == word(now, at)) at += kWord;
    if (at == size) break;
    std::size_t from = at;
    std::size_t to = at + kWord;
    for (at = to; at < size && at - to < kGap + kWord; at += kWord) {
      if (word(base, at) != word(now, at)) to = at + kWord;
    }
    while (base[from] == now[from]) ++from;
    while (base[to - 1] == now[to - 1]) --to;
    if (!put(skip_ + (from - told), now.subspan(from, to - from), end)) {
      at_ = at_before;
      skip_ = skip_before;
      return false;
    }
    skip_ = 0;
    told = to;
  }
  skip_ += size - told;
  return true;
}

std::size_t DeltaEncoder::finish() {
  put(skip_, {}, out_.size());
  return at_;
}

bool apply_delta(std::span<const std::byte> payload, std::span<std::byte> pages) {
  if (!well_formed(payload, pages.size())) return false;
  while (const auto token = take_token(payload, pages.size())) {
    if (token->length == 0) break;
    pages = pages.subspan(static_cast<std::size_t>(token->skip));
    const auto length = static_cast<std::size_t>(token->length);
    std::memcpy(pages.data(), payload.data(), length);
    pages = pages.subspan(length);
    payload = payload.subspan(length);
  }
  return true;
}

}  // namespace memferry::wire
