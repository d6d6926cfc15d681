// Headers of frames: what malformed() lets through is within the bounds that everybody behind it relies on.
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "wire/frame.h"

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace memferry::wire;
  FrameHeader header{};
  if (size < 1 + sizeof header) return 0;
  const std::uint64_t page_size = data[0] % 2 == 0 ? 4096 : 2 << 20;
  std::memcpy(&header, data + 1, sizeof header);
  if (malformed(header, page_size) != nullptr) return 0;
  require(header.magic == kFrameMagic);
  require(header.payload_bytes <= max_payload(page_size));
  const auto type = static_cast<FrameType>(header.type);
  const std::uint16_t encoding = encoding_of(header);
  if (type == FrameType::kPages) {
    require(header.page_count > 0 && header.page_count <= max_run_pages(page_size));
    const std::uint64_t bytes = header.page_count * page_size;
    require(encoding == 0
                ? header.payload_bytes == bytes
                : std::has_single_bit(encoding) && header.payload_bytes > 0 && header.payload_bytes < bytes);
  } else {
    require(encoding == 0 || (type == FrameType::kRead && (encoding & ~kCompressions) == 0));
  }
  if (type == FrameType::kRead) require(header.page_count <= max_run_pages(page_size));
  if (type == FrameType::kHashRequest || type == FrameType::kHashes) {
    require(header.page_count > 0 && header.page_count <= max_run_pages(page_size));
    const std::uint64_t each = type == FrameType::kHashes ? sizeof(TreeHash) : 0;
    require(header.payload_bytes == header.page_count * each);
  }
  if (type == FrameType::kMap && header.payload_bytes > 0) {
    require(header.payload_bytes == header.page_count * sizeof(std::uint64_t));
  }
  if (type == FrameType::kKnown) require(header.payload_bytes == header.page_count * sizeof(KnownName));
  if (type == FrameType::kKnownReference || type == FrameType::kUnresolved) {
    require(header.page_count > 0 && header.page_count <= max_run_pages(page_size));
    const std::uint64_t each = type == FrameType::kKnownReference ? sizeof(ContentHash) : sizeof(KnownName);
    require(header.payload_bytes == header.page_count * each);
  }
  if (type == FrameType::kTaken || type == FrameType::kTurn) require(header.payload_bytes == 0);
  if (type == FrameType::kDiscard || type == FrameType::kSuspects) {
    require(header.payload_bytes % sizeof(WireRun) == 0);
  }
  if (type == FrameType::kReport || type == FrameType::kPopularRead) {
    require(header.page_count > 0 && header.page_count <= kMostNames);
    require(header.payload_bytes == header.page_count * sizeof(ContentName));
  }
  if (type == FrameType::kReported) {
    require(header.payload_bytes * 8 >= header.page_count && header.payload_bytes % 8 == 0);
  }
  if (type == FrameType::kPopularRead) require(header.page_count <= 64);
  if (type == FrameType::kPopularAsk) require(header.page_count <= kMostNames && header.payload_bytes == 0);
  if (type == FrameType::kPopularNames) {
    require(header.page_count <= kMostNames &&
            header.payload_bytes == header.page_count * sizeof(PopularName));
  }
  if (type == FrameType::kPopularContent || type == FrameType::kPopularPages) {
    require(header.page_count <= max_run_pages(page_size));
    require(header.payload_bytes == header.page_count * page_size);
  }
  if (type == FrameType::kPopularPages) {
    require(static_cast<int>(header.page_count) == std::popcount(header.first_page));
  }
  const auto lists = [&](std::uint64_t before, std::uint64_t each, std::uint64_t most) {
    require(header.page_count > 0 && header.page_count <= most);
    require(header.payload_bytes == before + header.page_count * each);
  };
  switch (type) {
    case FrameType::kProbe:
    case FrameType::kNames:
      lists(0, sizeof(ContentName), kMostNames);
      break;
    case FrameType::kProbed:
      lists(0, sizeof(KnownHolders), kMostNames);
      break;
    case FrameType::kHeld:
      lists(sizeof(KnownHolders), sizeof(ContentName), kMostNames);
      break;
    case FrameType::kReference:
      lists(0, sizeof(ContentHash), kMostNames);
      break;
    case FrameType::kTreeRequest:
      require(header.page_count > 0 && header.payload_bytes == 0);
      require(header.tag == kTreePages || header.tag == kTreeNodes || header.tag == kTreeEstimate);
      break;
    case FrameType::kTree: {
      const std::uint64_t level = header.tag & 0xff;
      require(level == kTreePages || level == kTreeNodes || level == kTreeEstimate);
      const std::uint64_t hashes = level == kTreeNodes ? tree_nodes(header.page_count) : header.page_count;
      require(hashes > 0 && hashes <= max_payload(page_size) / sizeof(TreeHash));
      require(header.payload_bytes == hashes * sizeof(TreeHash));
      break;
    }
    case FrameType::kSame:
      require(header.payload_bytes > 0 && header.payload_bytes % sizeof(WireRun) == 0);
      break;
    case FrameType::kBitmap:
      require(header.payload_bytes > 0 && header.payload_bytes % sizeof(std::uint64_t) == 0);
      require(header.first_page % 64 == 0);
      break;
    case FrameType::kLinkProbe:
      require(header.payload_bytes > 0);
      break;
    case FrameType::kZero:
    case FrameType::kFaultRequest:
    case FrameType::kAbsent:
    case FrameType::kRefused:
    case FrameType::kElsewhere:
      require(header.page_count > 0 && header.payload_bytes == 0);
      break;
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
    case FrameType::kBaseEnd:
      require(header.payload_bytes == 0);
      break;
    default:
      break;
  }
  for (const std::uint64_t pages : {std::uint64_t{1}, std::uint64_t{100}, ~std::uint64_t{0}}) {
    if (!run_inside(header.first_page, header.page_count, pages)) continue;
    require(header.first_page < pages && header.first_page + (header.page_count - 1) < pages &&
            header.first_page + (header.page_count - 1) >= header.first_page);
  }
  return 0;
}
