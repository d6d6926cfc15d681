// Runs of pages as lz4 or zstd and back. A run is a block of its own: nothing carries over from one frame to the next.
//
// The input of compress() must not change while it runs: a guest's memory is copied first. decompress() trusts nothing
// in a payload: it writes inside its buffer alone, and a payload that is not exactly one run of that length, however
// much it claims to decompress to, is refused.
//
// Threads: one an object. The contexts (up to a MiB for zstd) are made when first used, and kept.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace memferry::wire {

class Compressor {
 public:
  Compressor();
  ~Compressor();
  Compressor(const Compressor&) = delete;
  Compressor& operator=(const Compressor&) = delete;

  // `encoding`: kFlagLz4 or kFlagZstd. Gives the length of what is in `out` now; 0 when that is not smaller than
  // `bytes`, or does not fit. Throws std::bad_alloc.
  std::size_t compress(std::uint16_t encoding, std::span<const std::byte> bytes, std::span<std::byte> out);

 private:
  std::vector<std::byte> lz4_state_;
  struct FreeZstd {
    void operator()(void* context) const;
  };
  std::unique_ptr<void, FreeZstd> zstd_;
};

class Decompressor {
 public:
  // Fills `out` exactly, or gives false; what is in it then is anything. Throws std::bad_alloc.
  [[nodiscard]] bool decompress(std::uint16_t encoding, std::span<const std::byte> payload,
                                std::span<std::byte> out);

 private:
  struct FreeZstd {
    void operator()(void* context) const;
  };
  std::unique_ptr<void, FreeZstd> zstd_;
};

}  // namespace memferry::wire
