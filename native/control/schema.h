// Reads a JSON object field by field, as a strict schema does: a field of another type, out of its bounds, or one that
// nobody asked for is a Failure (PROTOCOL_ERROR) that names it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "control/json.h"

namespace memferry::control {

// What JavaScript counts exactly.
inline constexpr std::uint64_t kMaxCount = (1ULL << 53U) - 1;
inline constexpr std::uint64_t kMaxEpoch = (1ULL << 31U) - 1;

class Fields {
 public:
  // `value` outlives this.
  Fields(const Json& value, std::string where);

  [[nodiscard]] const Json& any(const char* name);
  [[nodiscard]] bool has(const char* name) const;  // and is not null
  [[nodiscard]] bool flag(const char* name);
  [[nodiscard]] bool flag_or(const char* name, bool otherwise);
  [[nodiscard]] std::uint64_t count(const char* name, std::uint64_t least = 0,
                                    std::uint64_t most = kMaxCount);
  [[nodiscard]] double number(const char* name);  // not negative, finite
  [[nodiscard]] std::string text(const char* name, std::size_t least_units, std::size_t most_units);
  [[nodiscard]] std::string label(const char* name) { return text(name, 1, 64); }
  [[nodiscard]] std::string hex(const char* name, std::size_t bytes);
  [[nodiscard]] const Json& array(const char* name, std::size_t least, std::size_t most);
  [[nodiscard]] std::string at(const char* name) const { return where_ + name; }
  // Everything was asked for.
  void done() const;
  [[noreturn]] void wrong(const char* name) const;

 private:
  const Json& value_;
  std::string where_;
  std::vector<std::string> asked_;
};

[[nodiscard]] std::uint64_t count_of(const Json& value, const std::string& where, std::uint64_t least,
                                     std::uint64_t most);

}  // namespace memferry::control
