// At which pages do two buffers differ?
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "page/range.h"

namespace memferry {

// Maximal runs of the pages at which `a` and `b` differ, in order. Both are equally long and a multiple of
// `page_size` (else std::invalid_argument).
[[nodiscard]] std::vector<PageRun> diff_pages(std::span<const std::byte> a, std::span<const std::byte> b,
                                              std::uint64_t page_size);

}  // namespace memferry
