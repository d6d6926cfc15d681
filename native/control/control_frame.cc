#include "control/control_frame.h"

#include <array>
#include <string>

#include "control/failure.h"

namespace memferry::control {

namespace {

struct Bounds {
  std::size_t min;
  std::size_t max;
};

Bounds bounds_of(std::uint8_t kind) {
  switch (static_cast<FrameKind>(kind)) {
    case FrameKind::kJson:
      return {1, kMaxJsonBytes};
    case FrameKind::kChunk:
      return {1, kMaxChunkBytes};
    case FrameKind::kPing:
      return {0, 0};
    case FrameKind::kBye:
      return {0, kMaxByeBytes};
    case FrameKind::kJsonWithBinary:
      return {kAnnouncementBytes + 1, kAnnouncementBytes + kMaxJsonBytes};
  }
  throw Failure("PROTOCOL_ERROR", "a control frame of unknown kind " + std::to_string(kind));
}

std::array<std::uint8_t, 8> little_endian(std::uint64_t value) {
  std::array<std::uint8_t, 8> bytes;
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(value >> (8 * i));
  return bytes;
}

}  // namespace

FrameHeader parse_frame_header(std::span<const std::uint8_t, kFrameHeaderBytes> bytes) {
  std::uint32_t length = 0;
  for (unsigned i = 0; i < 4; ++i) length |= std::uint32_t{bytes[i]} << (8 * i);
  const Bounds bounds = bounds_of(bytes[4]);
  if (length < bounds.min || length > bounds.max) {
    throw Failure("PROTOCOL_ERROR", "a control frame of kind " + std::to_string(bytes[4]) + " with " +
                                        std::to_string(length) + " bytes");
  }
  return {static_cast<FrameKind>(bytes[4]), length};
}

Bytes FrameAuthenticator::seal(FrameKind kind, std::initializer_list<ByteSpan> payload) {
  std::size_t length = 0;
  for (const ByteSpan part : payload) length += part.size();
  Bytes frame;
  frame.reserve(kFrameHeaderBytes + length + kFrameMacBytes);
  for (unsigned i = 0; i < 4; ++i) frame.push_back(static_cast<std::uint8_t>(length >> (8 * i)));
  frame.push_back(static_cast<std::uint8_t>(kind));
  // Our own frames obey the bounds that we hold others to.
  (void)parse_frame_header(std::span(frame).first<kFrameHeaderBytes>());
  for (const ByteSpan part : payload) frame.insert(frame.end(), part.begin(), part.end());
  const Key mac = hmac_sha256(key_, {little_endian(number_), frame});
  ++number_;
  frame.insert(frame.end(), mac.begin(), mac.begin() + kFrameMacBytes);
  return frame;
}

bool FrameAuthenticator::opens(ByteSpan header, ByteSpan payload, ByteSpan mac) {
  const Key expected = hmac_sha256(key_, {little_endian(number_), header, payload});
  ++number_;
  return equal(mac, ByteSpan(expected).first(kFrameMacBytes));
}

}  // namespace memferry::control
