// Sealing and checking of frame headers. Pure; any thread.
#include "wire/frame.h"

#include <algorithm>
#include <bit>
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace memferry::wire {
namespace {

constexpr std::size_t kCheckedHeaderBytes = offsetof(FrameHeader, checksum);

// Header and hashes in one buffer, hashed in one go: streaming costs more than the copy for so few bytes.
constexpr std::size_t kSmallHashes = 64;

std::uint64_t checksum_of(const FrameHeader& header, const void* rest, std::size_t rest_bytes) {
  if (rest_bytes <= kSmallHashes * sizeof(std::uint64_t)) {
    std::array<std::byte, kCheckedHeaderBytes + kSmallHashes * sizeof(std::uint64_t)> joined;
    std::memcpy(joined.data(), &header, kCheckedHeaderBytes);
    if (rest_bytes > 0) std::memcpy(joined.data() + kCheckedHeaderBytes, rest, rest_bytes);
    return XXH3_64bits(joined.data(), kCheckedHeaderBytes + rest_bytes);
  }
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  XXH3_64bits_update(&state, &header, kCheckedHeaderBytes);
  XXH3_64bits_update(&state, rest, rest_bytes);
  return XXH3_64bits_digest(&state);
}

}  // namespace

FrameHeader make_header(FrameType type, std::uint32_t region, PageRun run, std::uint64_t tag) {
  FrameHeader header{};
  header.magic = kFrameMagic;
  header.type = static_cast<std::uint16_t>(type);
  header.region = region;
  header.first_page = run.first.value;
  header.page_count = run.count;
  header.tag = tag;
  return header;
}

std::uint64_t pages_checksum(const FrameHeader& header, std::span<const std::uint64_t> page_hashes) {
  return checksum_of(header, page_hashes.data(), page_hashes.size_bytes());
}

std::uint64_t payload_checksum(const FrameHeader& header, std::span<const std::byte> payload) {
  return checksum_of(header, payload.data(), payload.size());
}

void seal_pages(FrameHeader& header, std::uint64_t page_size, std::span<const std::uint64_t> page_hashes) {
  header.payload_bytes = static_cast<std::uint32_t>(page_hashes.size() * page_size);
  header.checksum = pages_checksum(header, page_hashes);
}

void seal(FrameHeader& header, std::span<const std::byte> payload) {
  header.payload_bytes = static_cast<std::uint32_t>(payload.size());
  header.checksum = payload_checksum(header, payload);
}

void seal_encoded(FrameHeader& header, std::uint16_t encoding, std::size_t payload_bytes,
                  std::span<const std::uint64_t> page_hashes) {
  header.flags |= encoding;
  header.payload_bytes = static_cast<std::uint32_t>(payload_bytes);
  header.checksum = pages_checksum(header, page_hashes);
}

const char* malformed(const FrameHeader& header, std::uint64_t page_size) {
  if (header.magic != kFrameMagic) return "not a frame: wrong magic";
  if (header.payload_bytes > max_payload(page_size)) return "payload longer than a frame may carry";
  const bool read = header.type == static_cast<std::uint16_t>(FrameType::kRead);
  const bool pages = header.type == static_cast<std::uint16_t>(FrameType::kPages);
  const std::uint16_t encodings_here = pages ? kEncodings : read ? kCompressions : std::uint16_t{0};
  if ((encoding_of(header) & ~encodings_here) != 0) return "an encoding where nothing can be encoded";
  switch (static_cast<FrameType>(header.type)) {
    case FrameType::kPages:
      if (header.page_count == 0 || header.page_count > max_run_pages(page_size)) {
        return "page count of a pages frame out of bounds";
      }
      if (const std::uint16_t encoding = encoding_of(header); encoding != 0) {
        if (!std::has_single_bit(encoding)) return "more than one encoding";
        // What does not get smaller goes as it is.
        return header.payload_bytes > 0 && header.payload_bytes < header.page_count * page_size
                   ? nullptr
                   : "an encoded payload that is empty or not smaller than its pages";
      }
      return header.payload_bytes == header.page_count * page_size
                 ? nullptr
                 : "payload is not page count times page size";
    case FrameType::kZero:
    case FrameType::kFaultRequest:
    case FrameType::kAbsent:
    case FrameType::kRefused:
    case FrameType::kElsewhere:
      if (header.page_count == 0) return "empty run of pages";
      return header.payload_bytes == 0 ? nullptr : "payload where there must be none";
    case FrameType::kSwitch:
    case FrameType::kSwitchAck:
    case FrameType::kBarrier:
    case FrameType::kBarrierAck:
    case FrameType::kBitmapEnd:
    case FrameType::kGoodbye:
    case FrameType::kMapRequest:
    case FrameType::kMapEnd:
    case FrameType::kChainBroken:
    case FrameType::kChainOf:
    case FrameType::kChainOver:
    case FrameType::kNamed:
    case FrameType::kTaken:
    case FrameType::kTurn:
      return header.payload_bytes == 0 ? nullptr : "payload where there must be none";
    case FrameType::kRead:
      if (header.page_count == 0 || header.page_count > max_run_pages(page_size)) {
        return "page count of a read out of bounds";
      }
      return header.payload_bytes == 0 ? nullptr : "payload where there must be none";
    case FrameType::kHashRequest:
    case FrameType::kHashes: {
      if (header.page_count == 0 || header.page_count > max_run_pages(page_size)) {
        return "page count of hashes out of bounds";
      }
      const bool request = header.type == static_cast<std::uint16_t>(FrameType::kHashRequest);
      return header.payload_bytes == (request ? 0 : header.page_count * sizeof(TreeHash))
                 ? nullptr
                 : "payload is not one hash a page, or where there must be none";
    }
    case FrameType::kMap: {
      if (header.page_count == 0) return "empty run of pages";
      const bool bare =
          (header.flags & kFlagZero) != 0 || Holders::of(header.tag).first == Holders::kDestination;
      if (bare) return header.payload_bytes == 0 ? nullptr : "payload where there must be none";
      return header.page_count <= max_payload(page_size) / sizeof(std::uint64_t) &&
                     header.payload_bytes == header.page_count * sizeof(std::uint64_t)
                 ? nullptr
                 : "payload is not one hash a page";
    }
    case FrameType::kTreeRequest:
      if (header.page_count == 0) return "empty run of pages";
      if (!tree_level(header.tag)) return "no such level of a hash tree";
      return header.payload_bytes == 0 ? nullptr : "payload where there must be none";
    case FrameType::kTree: {
      const std::uint64_t level = header.tag & 0xff;
      if (header.page_count == 0) return "empty run of pages";
      if (!tree_level(level)) return "no such level of a hash tree";
      const std::uint64_t hashes = level == kTreeNodes ? tree_nodes(header.page_count) : header.page_count;
      return hashes <= max_payload(page_size) / sizeof(TreeHash) &&
                     header.payload_bytes == hashes * sizeof(TreeHash)
                 ? nullptr
                 : "payload is not one hash a page or node";
    }
    case FrameType::kBaseEnd:
      return header.payload_bytes == 0 ? nullptr : "payload where there must be none";
    case FrameType::kLinkProbe:
      return header.payload_bytes > 0 ? nullptr : "a probe without bytes";
    case FrameType::kKnown:
      if (header.page_count == 0 || header.page_count > kMostKnownNames)
        return "count of names out of bounds";
      return header.payload_bytes == header.page_count * sizeof(KnownName) ? nullptr
                                                                           : "payload is not one name a page";
    case FrameType::kKnownReference:
    case FrameType::kUnresolved: {
      if (header.page_count == 0 || header.page_count > max_run_pages(page_size)) {
        return "page count of references out of bounds";
      }
      const bool reference = header.type == static_cast<std::uint16_t>(FrameType::kKnownReference);
      return header.payload_bytes == header.page_count * (reference ? sizeof(ContentHash) : sizeof(KnownName))
                 ? nullptr
                 : "payload is not one entry a page";
    }
    case FrameType::kProbe:
    case FrameType::kProbed:
    case FrameType::kHeld:
    case FrameType::kNames:
    case FrameType::kReference: {
      if (header.page_count == 0 || header.page_count > kMostNames) return "count of contents out of bounds";
      const auto type = static_cast<FrameType>(header.type);
      const std::uint64_t each = type == FrameType::kReference ? sizeof(ContentHash) : sizeof(ContentName);
      const std::uint64_t before = type == FrameType::kHeld ? sizeof(KnownHolders) : 0;
      return header.payload_bytes == before + header.page_count * each ? nullptr
                                                                       : "payload is not one entry a content";
    }
    case FrameType::kReport:
    case FrameType::kPopularRead: {
      const bool read_of_popular = header.type == static_cast<std::uint16_t>(FrameType::kPopularRead);
      const std::uint64_t most =
          read_of_popular ? std::min(kMostPopularReads, max_run_pages(page_size)) : kMostNames;
      if (header.page_count == 0 || header.page_count > most) return "count of contents out of bounds";
      return header.payload_bytes == header.page_count * sizeof(ContentName)
                 ? nullptr
                 : "payload is not one name a content";
    }
    case FrameType::kReported:
      if (header.page_count == 0 || header.page_count > kMostNames) return "count of contents out of bounds";
      return header.payload_bytes == wanted_words(header.page_count) * sizeof(std::uint64_t)
                 ? nullptr
                 : "payload is not one bit a content";
    case FrameType::kPopularContent:
      if (header.page_count == 0 || header.page_count > max_run_pages(page_size)) {
        return "page count of a content frame out of bounds";
      }
      return header.payload_bytes == header.page_count * page_size
                 ? nullptr
                 : "payload is not page count times page size";
    case FrameType::kPopularAsk:
      if (header.page_count == 0 || header.page_count > kMostNames) return "count of contents out of bounds";
      return header.payload_bytes == 0 ? nullptr : "payload where there must be none";
    case FrameType::kPopularNames:
      if (header.page_count > kMostNames) return "count of contents out of bounds";
      return header.payload_bytes == header.page_count * sizeof(PopularName)
                 ? nullptr
                 : "payload is not one entry a content";
    case FrameType::kPopularPages:
      if (header.page_count > max_run_pages(page_size) ||
          header.page_count != static_cast<std::uint64_t>(std::popcount(header.first_page))) {
        return "page count is not that of the bits that are set";
      }
      return header.payload_bytes == header.page_count * page_size
                 ? nullptr
                 : "payload is not page count times page size";
    case FrameType::kDiscard:
    case FrameType::kSame:
    case FrameType::kSuspects:
      if (header.payload_bytes == 0 || header.payload_bytes % sizeof(WireRun) != 0) {
        return "payload is not a list of runs";
      }
      return nullptr;
    case FrameType::kBitmap:
      if (header.payload_bytes == 0 || header.payload_bytes % sizeof(std::uint64_t) != 0) {
        return "payload is not a list of bitmap words";
      }
      return header.first_page % 64 == 0 ? nullptr : "bitmap does not start at a whole word";
  }
  return "unknown frame type";
}

}  // namespace memferry::wire
