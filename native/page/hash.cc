#include "page/hash.h"

#include <stdexcept>

#include "page/hash_kernels.h"
#include "page/racy_read.h"

namespace memferry {

namespace {

// AVX-512 is left out on purpose: on the processors measured it hashes pages slower than AVX2.
const hash_kernels::Kernel& choose() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") != 0) return hash_kernels::kAvx2;
#endif
  return hash_kernels::kBaseline;
}

const hash_kernels::Kernel& chosen() {
  static const hash_kernels::Kernel& kernel = choose();
  return kernel;
}

}  // namespace

std::uint64_t xxh3_64(std::span<const std::byte> bytes) {
  const RacyView view(bytes);
  return chosen().xxh3_64(view.bytes().data(), view.bytes().size());
}

Hash128 xxh3_128(std::span<const std::byte> bytes) {
  const RacyView view(bytes);
  const hash_kernels::Result128 hash = chosen().xxh3_128(view.bytes().data(), view.bytes().size());
  return {hash.low, hash.high};
}

void hash_pages(std::span<const std::byte> bytes, std::uint64_t page_size, std::uint64_t* out) {
  if (page_size == 0 || bytes.size() % page_size != 0) {
    throw std::invalid_argument("hash_pages: the bytes are not whole pages");
  }
  const RacyView view(bytes);
  chosen().pages(view.bytes().data(), page_size, bytes.size() / page_size, out);
}

const char* hash_implementation() { return chosen().name; }

}  // namespace memferry
