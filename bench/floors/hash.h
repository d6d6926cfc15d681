// XXH3 as fast as libxxhash computes it on this machine. Every variant is compiled in; fast_hash() is the one
// that pays best where pages are hashed in a stream (AVX2 where the CPU has it).
#pragma once

#include <stddef.h>
#include <stdint.h>

uint64_t hash_baseline(const void *bytes, size_t length);  // inlined for the compiler's default target
#if defined(__x86_64__)
uint64_t hash_avx2(const void *bytes, size_t length);      // inlined for AVX2
uint64_t hash_dispatch(const void *bytes, size_t length);  // the library's own choice at run time
#endif

// Whole loops over pages, so that the call is inlined where the variant allows it.
typedef void hash_loop(const char *memory, uint64_t pages, uint64_t page_bytes, uint64_t *out);
hash_loop loop_baseline;
#if defined(__x86_64__)
hash_loop loop_avx2, loop_dispatch;
#endif

static inline uint64_t fast_hash(const void *bytes, size_t length) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return hash_avx2(bytes, length);
#endif
  return hash_baseline(bytes, length);
}
