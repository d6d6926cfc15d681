// The hash by which two hosts find out which pages they have in common. A guest chooses its own contents, so nobody
// who does not know the key may be able to make two pages with one hash: GHASH under a secret key, encrypted by AES
// under another one (an almost-universal hash and a pseudorandom function over it). The keys are fresh for each
// migration, so what was prepared before is worthless, and a hash that is overheard says nothing of them.
//
// Measured at 4.2 GB/s a thread for pages of 4 KiB on a machine that was busy otherwise, where SHA-256 does 1.35 (AMD
// EPYC, SHA and VAES instructions).
//
// Threads: one at a time for each object.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace memferry {

using KeyedHash = std::array<std::uint8_t, 16>;
// Two AES-256 keys: of GHASH, and of the encryption of its results.
using KeyedHashKey = std::array<std::uint8_t, 64>;

class KeyedHasher {
 public:
  explicit KeyedHasher(const KeyedHashKey& key);  // throws std::runtime_error: no AES in this libcrypto
  ~KeyedHasher();
  KeyedHasher(const KeyedHasher&) = delete;
  KeyedHasher& operator=(const KeyedHasher&) = delete;

  // One hash a page of `bytes` (a multiple of page_size, which nobody may be writing) into `out`.
  void pages(std::span<const std::byte> bytes, std::uint64_t page_size, KeyedHash* out);
  // Of a node: the hashes of its pages, in order. Never equal to the hash of a page with these bytes.
  [[nodiscard]] KeyedHash node(std::span<const KeyedHash> pages);

 private:
  void encrypt(KeyedHash* hashes, std::size_t count);
  void universal(std::span<const std::byte> bytes, std::uint8_t domain, KeyedHash& out);
  struct Contexts;
  std::unique_ptr<Contexts> contexts_;
};

}  // namespace memferry
