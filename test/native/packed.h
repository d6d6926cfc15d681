// Pages that pack well, and frames of encoded pages, right and wrong, for tests.
#pragma once

#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "page/hash.h"
#include "wire/codec.h"
#include "wire/delta.h"
#include "wire/frame.h"

namespace memferry::test {

// Words of a few values: about a third of its size under lz4.
inline std::vector<std::byte> packable_bytes(std::size_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::size_t i = 0; i + 8 <= count; i += 8) {
    const std::uint64_t value = 1 + random() % 13 * (random() % 7 == 0 ? 0x1234567 : 1);
    std::memcpy(bytes.data() + i, &value, 8);
  }
  return bytes;
}

// As the codec has it.
inline std::vector<std::byte> packed(std::uint16_t encoding, std::span<const std::byte> bytes) {
  wire::Compressor codec;
  std::vector<std::byte> out(bytes.size());
  out.resize(codec.compress(encoding, bytes, out));
  return out;
}

inline std::vector<std::byte> delta_of(std::span<const std::byte> base, std::span<const std::byte> now,
                                       std::size_t page_size) {
  std::vector<std::byte> out(2 * now.size() + 64);
  wire::DeltaEncoder encoder(out);
  for (std::size_t at = 0; at < now.size(); at += page_size) {
    if (!encoder.add(base.subspan(at, page_size), now.subspan(at, page_size), 2 * page_size)) return {};
  }
  out.resize(encoder.finish());
  return out;
}

// Some bytes of them here and there.
inline std::vector<std::byte> changed_bytes(std::vector<std::byte> bytes, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  for (std::size_t at = random() % 512; at < bytes.size(); at += 256 + random() % 2048)
    bytes[at] ^= static_cast<std::byte>(1 + random() % 255);
  return bytes;
}

// Whatever the payload is; the checksum is that of `pages`.
inline wire::FrameHeader encoded_header(std::uint16_t flags, std::uint32_t region, std::uint64_t first,
                                        std::span<const std::byte> pages, std::size_t payload_bytes,
                                        std::uint64_t page_size, std::uint64_t tag = 0) {
  std::vector<std::uint64_t> hashes(pages.size() / page_size);
  hash_pages(pages, page_size, hashes.data());
  wire::FrameHeader header =
      wire::make_header(wire::FrameType::kPages, region, {PageNumber{first}, hashes.size()}, tag);
  wire::seal_encoded(header, flags, payload_bytes, hashes);
  return header;
}

}  // namespace memferry::test
