// The same hash compiled for different vector units, for hash.cc to choose from.
#pragma once

#include <cstddef>
#include <cstdint>

namespace memferry::hash_kernels {

struct Result128 {
  std::uint64_t low;
  std::uint64_t high;
};

struct Kernel {
  const char* name;
  std::uint64_t (*xxh3_64)(const void* data, std::size_t bytes);
  Result128 (*xxh3_128)(const void* data, std::size_t bytes);
  void (*pages)(const void* data, std::size_t page_size, std::size_t pages, std::uint64_t* out);
};

// For what the compiler targets anyway: SSE2 on x86-64, NEON on arm64, scalar elsewhere.
extern const Kernel kBaseline;
#if defined(__x86_64__)
// Only where the processor has AVX2.
extern const Kernel kAvx2;
#endif

}  // namespace memferry::hash_kernels
