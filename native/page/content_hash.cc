#include "page/content_hash.h"

// SHA-256's own functions rather than EVP: a context of theirs is copied by assignment, one of EVP's by two
// allocations a page. In the addon they are the node binary's, in the core alone the system's libcrypto's.
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/crypto.h>
#include <openssl/sha.h>

namespace memferry {
namespace {

constexpr std::size_t kBlockBytes = 64;

SHA256_CTX begun_with(const ContentKey& key, std::uint8_t pad) {
  std::array<std::uint8_t, kBlockBytes> block;
  block.fill(pad);
  for (std::size_t i = 0; i < key.size(); ++i) block[i] ^= key[i];
  SHA256_CTX begun;
  SHA256_Init(&begun);
  SHA256_Update(&begun, block.data(), block.size());
  OPENSSL_cleanse(block.data(), block.size());
  return begun;
}

}  // namespace

struct ContentHasher::Keyed {
  explicit Keyed(const ContentKey& key) : inner(begun_with(key, 0x36)), outer(begun_with(key, 0x5c)) {}
  ~Keyed() {
    OPENSSL_cleanse(&inner, sizeof inner);
    OPENSSL_cleanse(&outer, sizeof outer);
  }
  Keyed(const Keyed&) = delete;
  Keyed& operator=(const Keyed&) = delete;
  SHA256_CTX inner;
  SHA256_CTX outer;
};

ContentHasher::ContentHasher(const ContentKey& key) : keyed_(std::make_unique<const Keyed>(key)) {}

ContentHasher::~ContentHasher() = default;

ContentDigest ContentHasher::operator()(std::span<const std::byte> bytes) const {
  ContentDigest digest;
  SHA256_CTX state = keyed_->inner;
  SHA256_Update(&state, bytes.data(), bytes.size());
  SHA256_Final(digest.data(), &state);
  state = keyed_->outer;
  SHA256_Update(&state, digest.data(), digest.size());
  SHA256_Final(digest.data(), &state);
  return digest;
}

bool equal_digests(const ContentDigest& a, const ContentDigest& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace memferry
