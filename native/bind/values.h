// Reading JavaScript values where the addon's functions take them. TypeScript has validated what users gave;
// these checks keep a mistake from becoming a wild pointer.
//
// Thread: an environment's own.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/node_api.h"
#include "page/range.h"
#include "transfer/events.h"

namespace memferry::bind {

// The bytes of a typed array over any kind of buffer, shared ones included.
[[nodiscard]] std::span<std::byte> bytes_of(const Napi::Value& value, const char* what);
// A safe integer >= 0.
[[nodiscard]] std::uint64_t count_of(const Napi::Value& value, const char* what);
[[nodiscard]] std::uint32_t index_of(const Napi::Value& value, const char* what);
// An address in any process: a bigint of 64 bits.
[[nodiscard]] std::uint64_t address_of(const Napi::Value& value);
[[nodiscard]] int descriptor_of(const Napi::Value& value, const char* what);
[[nodiscard]] std::string text_of(const Napi::Value& value, const char* what);
[[nodiscard]] bool flag_of(const Napi::Value& value, const char* what);
[[nodiscard]] Napi::Function function_of(const Napi::Value& value, const char* what);
[[nodiscard]] Napi::Object object_of(const Napi::Value& value, const char* what);
[[nodiscard]] Napi::Array array_of(const Napi::Value& value, const char* what);
[[nodiscard]] inline std::chrono::milliseconds milliseconds_of(const Napi::Value& value, const char* what) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(count_of(value, what)));
}

template <std::size_t Size>
[[nodiscard]] std::array<std::uint8_t, Size> fixed_bytes_of(const Napi::Value& value, const char* what) {
  const std::span<std::byte> bytes = bytes_of(value, what);
  if (bytes.size() != Size) throw std::invalid_argument(std::string(what) + ": wrong length");
  std::array<std::uint8_t, Size> out{};
  for (std::size_t i = 0; i < Size; ++i) out[i] = static_cast<std::uint8_t>(bytes[i]);
  return out;
}

template <std::size_t Size>
[[nodiscard]] std::vector<std::array<std::uint8_t, Size>> rows_of(const Napi::Value& value,
                                                                  const char* what) {
  const std::span<std::byte> bytes = bytes_of(value, what);
  if (bytes.size() % Size != 0) throw std::invalid_argument(std::string(what) + ": not whole rows");
  std::vector<std::array<std::uint8_t, Size>> rows(bytes.size() / Size);
  for (std::size_t i = 0; i < bytes.size(); ++i)
    rows[i / Size][i % Size] = static_cast<std::uint8_t>(bytes[i]);
  return rows;
}

// Exact up to 2^53.
[[nodiscard]] inline Napi::Number number(Napi::Env env, std::uint64_t value) {
  return Napi::Number::New(env, static_cast<double>(value));
}

// Pairs [first, count, first, count, ...].
[[nodiscard]] Napi::Value run_pairs(Napi::Env env, const std::vector<PageRun>& runs);
[[nodiscard]] Napi::Array run_objects(Napi::Env env, const std::vector<RegionRun>& runs);
[[nodiscard]] Napi::Object event_object(Napi::Env env, const EngineEvent& event);
// 32 hex digits, the high half first, as XXH128_canonicalFromHash prints it.
[[nodiscard]] std::string hex128(std::uint64_t high, std::uint64_t low);

}  // namespace memferry::bind
