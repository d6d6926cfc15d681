// The hash by which equal pages are known as equal between guests that distrust each other: HMAC-SHA256 under the
// key of their deduplication domain. It finds attacks as well as accidents; docs/security.md has the choice.
//
// Threads: any; a hasher is never written after it was made.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>

namespace memferry {

using ContentKey = std::array<std::uint8_t, 32>;
using ContentDigest = std::array<std::uint8_t, 32>;

class ContentHasher {
 public:
  explicit ContentHasher(const ContentKey& key);
  ~ContentHasher();
  ContentHasher(const ContentHasher&) = delete;
  ContentHasher& operator=(const ContentHasher&) = delete;

  [[nodiscard]] ContentDigest operator()(std::span<const std::byte> bytes) const;

 private:
  struct Keyed;  // SHA-256 after the inner and the outer key's block
  const std::unique_ptr<const Keyed> keyed_;
};

// What a content is called: the first half of its digest.
[[nodiscard]] inline std::array<std::uint64_t, 2> content_name(const ContentDigest& digest) {
  std::array<std::uint64_t, 2> name;
  std::memcpy(name.data(), digest.data(), sizeof name);
  return name;
}

// Takes the same time wherever the first difference is.
[[nodiscard]] bool equal_digests(const ContentDigest& a, const ContentDigest& b);

}  // namespace memferry
