// This one file is compiled for AVX2, by pragmas rather than by a flag, so that no build system has to know.
// Nothing but the hash may be compiled so: an inline function of a shared header that came out with AVX2
// instructions here could be the copy that the linker keeps for every caller. Hence every header comes
// before the pragma.
#include "page/hash_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

#define XXH_INLINE_ALL
#define XXH_VECTOR 2  // XXH_AVX2: clang defines no __AVX2__ by attribute
#include <xxhash.h>
static_assert(XXH_VECTOR == XXH_AVX2);

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

const Kernel kAvx2 = {"avx2", hash64, hash128, hash_pages};

}  // namespace memferry::hash_kernels

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
