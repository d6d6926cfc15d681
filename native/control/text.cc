#include "control/text.h"

#include <cstdint>

namespace memferry::control {

namespace {

constexpr std::size_t kMostCodeUnits = 64;
constexpr std::size_t kMostMessageUnits = 4096;

// Units that the character beginning with this byte has; 0 for a byte that continues one.
std::size_t units_of(char byte) {
  const auto value = static_cast<std::uint8_t>(byte);
  if ((value & 0xc0U) == 0x80U) return 0;
  return value >= 0xf0U ? 2 : 1;
}

}  // namespace

std::size_t text_length(std::string_view text) {
  std::size_t units = 0;
  for (const char byte : text) units += units_of(byte);
  return units;
}

std::string cut(std::string_view text, std::size_t units) {
  std::size_t have = 0;
  for (std::size_t at = 0; at < text.size(); ++at) {
    have += units_of(text[at]);
    if (have > units) return std::string(text.substr(0, at));
  }
  return std::string(text);
}

Cause told(const Cause& cause) {
  std::string code = cut(cause.code, kMostCodeUnits);
  if (code.empty()) code = "SYSTEM";
  return {std::move(code), cut(cause.message, kMostMessageUnits)};
}

}  // namespace memferry::control
