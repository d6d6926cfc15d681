// One variant of XXH3, compiled once a variant: -DVARIANT=name, with the target's flags.
#if defined(USE_DISPATCH)
#include <xxh_x86dispatch.h>
#else
#define XXH_INLINE_ALL
#include <xxhash.h>
#endif

#include "hash.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

uint64_t JOIN(hash_, VARIANT)(const void *bytes, size_t length) { return XXH3_64bits(bytes, length); }

void JOIN(loop_, VARIANT)(const char *memory, uint64_t pages, uint64_t page_bytes, uint64_t *out) {
  for (uint64_t i = 0; i < pages; i++) out[i] = XXH3_64bits(memory + i * page_bytes, page_bytes);
}
