#include "wire/codec.h"

#include <lz4.h>
#include <zstd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "wire/frame.h"

namespace memferry::wire {
namespace {

// Level 1 packs pages of real heaps at about half of lz4's speed and to two thirds of its size; the next levels take
// much longer for little.
constexpr int kZstdLevel = 1;
constexpr int kLz4Acceleration = 1;
constexpr std::uint32_t kZstdMagic = ZSTD_MAGICNUMBER;

void check(std::size_t result, const char* what) {
  if (ZSTD_isError(result)) throw std::logic_error(std::string(what) + ": " + ZSTD_getErrorName(result));
}

}  // namespace

Compressor::Compressor() = default;
Compressor::~Compressor() = default;

void Compressor::FreeZstd::operator()(void* context) const {
  ZSTD_freeCCtx(static_cast<ZSTD_CCtx*>(context));
}

void Decompressor::FreeZstd::operator()(void* context) const {
  ZSTD_freeDCtx(static_cast<ZSTD_DCtx*>(context));
}

std::size_t Compressor::compress(std::uint16_t encoding, std::span<const std::byte> bytes,
                                 std::span<std::byte> out) {
  if (bytes.size() < 2) return 0;
  // Of no use when it is not smaller: it need not be finished then.
  const std::size_t room = std::min(out.size(), bytes.size() - 1);
  if (encoding == kFlagLz4) {
    if (lz4_state_.empty()) lz4_state_.resize(static_cast<std::size_t>(LZ4_sizeofState()));
    const int written = LZ4_compress_fast_extState(
        lz4_state_.data(), reinterpret_cast<const char*>(bytes.data()), reinterpret_cast<char*>(out.data()),
        static_cast<int>(bytes.size()), static_cast<int>(room), kLz4Acceleration);
    return written > 0 ? static_cast<std::size_t>(written) : 0;
  }
  if (encoding != kFlagZstd) throw std::logic_error("not a codec");
  if (!zstd_) {
    zstd_.reset(ZSTD_createCCtx());
    if (!zstd_) throw std::bad_alloc();
    auto* made = static_cast<ZSTD_CCtx*>(zstd_.get());
    check(ZSTD_CCtx_setParameter(made, ZSTD_c_compressionLevel, kZstdLevel), "zstd's level");
    // The frame's checksum says the same of the pages themselves.
    check(ZSTD_CCtx_setParameter(made, ZSTD_c_checksumFlag, 0), "zstd's checksum");
  }
  const std::size_t written =
      ZSTD_compress2(static_cast<ZSTD_CCtx*>(zstd_.get()), out.data(), room, bytes.data(), bytes.size());
  return ZSTD_isError(written) ? 0 : written;
}

bool Decompressor::decompress(std::uint16_t encoding, std::span<const std::byte> payload,
                              std::span<std::byte> out) {
  if (encoding == kFlagLz4) {
    const int written = LZ4_decompress_safe(reinterpret_cast<const char*>(payload.data()),
                                            reinterpret_cast<char*>(out.data()),
                                            static_cast<int>(payload.size()), static_cast<int>(out.size()));
    return written >= 0 && static_cast<std::size_t>(written) == out.size();
  }
  if (encoding != kFlagZstd) return false;
  // One frame of today's format and nothing else: zstd itself would also take several, frames to be skipped, and those
  // of its own past.
  std::uint32_t magic = 0;
  if (payload.size() < sizeof magic) return false;
  std::memcpy(&magic, payload.data(), sizeof magic);
  if (magic != kZstdMagic || ZSTD_findFrameCompressedSize(payload.data(), payload.size()) != payload.size())
    return false;
  if (!zstd_) {
    zstd_.reset(ZSTD_createDCtx());
    if (!zstd_) throw std::bad_alloc();
  }
  const std::size_t written = ZSTD_decompressDCtx(static_cast<ZSTD_DCtx*>(zstd_.get()), out.data(),
                                                  out.size(), payload.data(), payload.size());
  return !ZSTD_isError(written) && written == out.size();
}

}  // namespace memferry::wire
