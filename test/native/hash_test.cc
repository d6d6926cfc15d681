// The page hashes against the library's own code, its published test values, and each other.
#include "page/hash.h"

#include <gtest/gtest.h>
#include <xxhash.h>  // not inlined here: the shared library is the independent twin

#include <cstring>
#include <random>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "page/hash_kernels.h"

namespace memferry {
namespace {

std::vector<std::byte> random_bytes(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

std::vector<const hash_kernels::Kernel*> kernels() {
  std::vector<const hash_kernels::Kernel*> all = {&hash_kernels::kBaseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") != 0) all.push_back(&hash_kernels::kAvx2);
#endif
  return all;
}

TEST(HashTest, OfNothingIsTheDocumentedValue) {
  EXPECT_EQ(xxh3_64({}), 0x2d06800538d394c2ULL);
  const Hash128 hash = xxh3_128({});
  EXPECT_EQ(hash.high, 0x99aa06d3014798d8ULL);
  EXPECT_EQ(hash.low, 0x6001c324468d497fULL);
}

TEST(HashTest, EveryKernelAgreesWithTheLibraryAtEveryLength) {
  std::vector<std::size_t> lengths;
  for (std::size_t n = 0; n <= 600; ++n) lengths.push_back(n);
  for (const std::size_t n : {1023U, 1024U, 1025U, 4096U, 16384U, 65536U, 65537U, 2097152U})
    lengths.push_back(n);
  const auto bytes = random_bytes(2097152 + 1, 1);
  for (const hash_kernels::Kernel* kernel : kernels()) {
    for (const std::size_t n : lengths) {
      // Odd starts too: a guest's pages are aligned, other callers' bytes are not.
      for (const std::size_t start : {0U, 1U}) {
        const void* data = bytes.data() + start;
        ASSERT_EQ(kernel->xxh3_64(data, n), XXH3_64bits(data, n)) << kernel->name << " " << n;
        const auto got = kernel->xxh3_128(data, n);
        const auto expected = XXH3_128bits(data, n);
        ASSERT_EQ(got.low, expected.low64) << kernel->name << " " << n;
        ASSERT_EQ(got.high, expected.high64) << kernel->name << " " << n;
      }
    }
  }
}

TEST(HashTest, PagesAreHashedOneByOne) {
  for (const std::size_t page_size : {4096U, 16384U, 65536U}) {
    constexpr std::size_t kPages = 9;
    const auto bytes = random_bytes(page_size * kPages, page_size);
    for (const hash_kernels::Kernel* kernel : kernels()) {
      std::vector<std::uint64_t> out(kPages);
      kernel->pages(bytes.data(), page_size, kPages, out.data());
      for (std::size_t i = 0; i < kPages; ++i) {
        EXPECT_EQ(out[i], XXH3_64bits(bytes.data() + i * page_size, page_size)) << kernel->name;
      }
    }
    std::vector<std::uint64_t> chosen(kPages);
    hash_pages(bytes, page_size, chosen.data());
    EXPECT_EQ(chosen[kPages - 1], XXH3_64bits(bytes.data() + (kPages - 1) * page_size, page_size));
  }
}

TEST(HashTest, RefusesHalfPages) {
  const std::vector<std::byte> bytes(4097);
  std::uint64_t out[2];
  EXPECT_THROW(hash_pages(bytes, 4096, out), std::invalid_argument);
  EXPECT_THROW(hash_pages(bytes, 0, out), std::invalid_argument);
}

TEST(HashTest, NamesWhatItChose) {
  const std::string_view name = hash_implementation();
#if defined(__x86_64__)
  EXPECT_EQ(name, __builtin_cpu_supports("avx2") != 0 ? "avx2" : "sse2");
#elif defined(__aarch64__)
  EXPECT_EQ(name, "neon");
#else
  EXPECT_FALSE(name.empty());
#endif
}

}  // namespace
}  // namespace memferry
