// Texts on their way to a peer or to an embedder: bounded as the protocol's schemas bound them, which count UTF-16 code
// units, and never cut in the middle of a character. Pure.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

#include "control/failure.h"

namespace memferry::control {

// How many UTF-16 code units a text in UTF-8 has.
[[nodiscard]] std::size_t text_length(std::string_view text);
// Its beginning, of at most so many.
[[nodiscard]] std::string cut(std::string_view text, std::size_t units);
// What a peer is told of a cause: the schemas bound both texts, and no local error may break that bound.
[[nodiscard]] Cause told(const Cause& cause);

}  // namespace memferry::control
