// Whether memory holds zeros only. May read pages that a guest is writing: true then means that every byte
// was zero at some moment of the call.
#pragma once

#include <cstddef>
#include <span>

namespace memferry {

[[nodiscard]] bool is_zero(std::span<const std::byte> bytes);

}  // namespace memferry
