// JSON of control messages, by nlohmann's library. A text from a peer is parsed with a bound on its depth: what handles a
// value afterwards recurses.
#pragma once

#include <nlohmann/json.hpp>
#include <string_view>

namespace memferry::control {

using Json = nlohmann::json;

// Throws Failure (PROTOCOL_ERROR): no JSON, no UTF-8, or nested too deeply.
[[nodiscard]] Json parse_json(std::string_view text);
// Bytes that are no UTF-8 are replaced, never thrown over.
[[nodiscard]] std::string to_text(const Json& value);

}  // namespace memferry::control
