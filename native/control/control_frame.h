// Frames of an authenticated control connection: `u32 payload length | u8 kind | payload | 16 bytes MAC`. The MAC is
// HMAC-SHA256 under the direction's key over the frame's number in that direction and all before it.
//
// Threads: one at a time for each object.
#pragma once

#include <cstdint>

#include "control/crypto.h"

namespace memferry::control {

inline constexpr std::size_t kFrameHeaderBytes = 5;
inline constexpr std::size_t kFrameMacBytes = 16;
inline constexpr std::size_t kMaxJsonBytes = 256 * 1024;
inline constexpr std::size_t kMaxChunkBytes = 64 * 1024;
inline constexpr std::size_t kAnnouncementBytes = 4;
inline constexpr std::size_t kMaxByeBytes = 8 * 1024;

enum class FrameKind : std::uint8_t {
  kJson = 1,
  kChunk = 2,           // the next bytes of the binary part that was announced
  kPing = 3,            // may stand between any two frames
  kBye = 4,             // the last frame of a direction: empty, or why
  kJsonWithBinary = 5,  // u32 length of the binary part, then the JSON text; chunks follow
};

struct FrameHeader {
  FrameKind kind = FrameKind::kPing;
  std::uint32_t payload_bytes = 0;
};
// Throws Failure (PROTOCOL_ERROR): an unknown kind, or a length that its kind does not allow.
[[nodiscard]] FrameHeader parse_frame_header(std::span<const std::uint8_t, kFrameHeaderBytes> bytes);

class FrameAuthenticator {
 public:
  explicit FrameAuthenticator(const Key& key) : key_(key) {}
  // The next frame whole, MAC and all.
  [[nodiscard]] Bytes seal(FrameKind kind, std::initializer_list<ByteSpan> payload);
  // Whether these are the next frame's header, payload and MAC.
  [[nodiscard]] bool opens(ByteSpan header, ByteSpan payload, ByteSpan mac);

 private:
  Key key_;
  std::uint64_t number_ = 0;
};

}  // namespace memferry::control
