#include "page/hash_kernels.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace memferry::hash_kernels {

namespace {

std::uint64_t hash64(const void* data, std::size_t bytes) { return XXH3_64bits(data, bytes); }

Result128 hash128(const void* data, std::size_t bytes) {
  const XXH128_hash_t hash = XXH3_128bits(data, bytes);
  return {hash.low64, hash.high64};
}

void hash_pages(const void* data, std::size_t page_size, std::size_t pages, std::uint64_t* out) {
  const char* page = static_cast<const char*>(data);
  for (std::size_t i = 0; i < pages; ++i, page += page_size) out[i] = XXH3_64bits(page, page_size);
}

}  // namespace

const Kernel kBaseline = {
#if XXH_VECTOR == XXH_NEON
    "neon",
#elif XXH_VECTOR == XXH_SSE2
    "sse2",
#elif XXH_VECTOR == XXH_SCALAR
    "scalar",
#else
    "compiled-in vectors",
#endif
    hash64, hash128, hash_pages};

}  // namespace memferry::hash_kernels
