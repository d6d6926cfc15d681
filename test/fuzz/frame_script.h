// Frames of data and stage connections, as a fuzzer's input describes them. What no peer but a right one gets past is put
// right unless the input says otherwise: the magic, the payload's length, the checksum. So what is behind these is reached.
//
//   u8   how       kWide, kAsItIs, ... below
//   u8   type
//   u8   flags, in units of 2^1 from bit 0 on: kFlagAnswer is bit 0, kFlagZero bit 1, and so on; kWide: u16, as they are
//   u8   region, u8 first page, u8 page count, u16 tag     kWide: u32, u64, u64, u64
//   u8   bytes of payload that follow; repeated or cut to what the header's type wants
#pragma once

#include <array>
#include <cstring>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "input.h"
#include "os/mapping.h"
#include "page/hash.h"
#include "wire/codec.h"
#include "wire/delta.h"
#include "wire/frame.h"
#include "wire/run_decoder.h"

namespace memferry::fuzz {

class FrameScript {
 public:
  enum How : std::uint8_t {
    kWide = 1,     // numbers are as wide as in a header
    kAsItIs = 2,   // the payload is the bytes that follow, however many are due
    kTorn = 4,     // a wrong checksum
    kNoFrame = 8,  // a wrong magic
    kCut = 16,     // half of it, and the end of the connection
    kPack = 32,    // pages really are encoded, as the flags say
  };
  struct Frame {
    wire::FrameHeader header{};
    std::vector<std::byte> bytes;  // on the wire
    bool cut = false;
  };

  [[nodiscard]] static std::uint64_t page_size() { return system_page_size(); }

  Frame next(Input& input) {
    const std::uint8_t how = input.byte();
    wire::FrameHeader header{};
    header.magic = wire::kFrameMagic ^ ((how & kNoFrame) != 0 ? 1U : 0U);
    header.type = input.byte();
    if ((how & kWide) != 0) {
      header.flags = input.take<std::uint16_t>();
      header.region = input.take<std::uint32_t>();
      header.first_page = input.take<std::uint64_t>();
      header.page_count = input.take<std::uint64_t>();
      header.tag = input.take<std::uint64_t>();
    } else {
      header.flags = flags_of(input.byte());
      header.region = input.byte();
      header.first_page = input.byte();
      header.page_count = input.byte();
      header.tag = input.take<std::uint16_t>();
    }
    std::vector<std::byte> payload = payload_of(how, header, input.bytes(input.byte()));
    header.payload_bytes = static_cast<std::uint32_t>(payload.size());
    std::uint64_t checksum = wire::payload_checksum(header, payload);
    if (header.type == static_cast<std::uint16_t>(wire::FrameType::kPages))
      checksum = checksum_of_pages(how, header, payload);
    header.checksum = checksum ^ ((how & kTorn) != 0 ? 1U : 0U);

    Frame frame{header, {}, (how & kCut) != 0};
    frame.bytes.resize(sizeof header + payload.size());
    std::memcpy(frame.bytes.data(), &header, sizeof header);
    if (!payload.empty()) std::memcpy(frame.bytes.data() + sizeof header, payload.data(), payload.size());
    if (frame.cut) frame.bytes.resize(frame.bytes.size() / 2);
    return frame;
  }

  // Whether any frame so far had a page with this hash.
  [[nodiscard]] bool said(std::uint64_t xxh3) const { return said_.contains(xxh3); }
  void note(std::span<const std::byte> pages) {
    for (std::size_t at = 0; at + page_size() <= pages.size(); at += page_size())
      said_.insert(hash_page(pages.subspan(at, page_size())));
  }
  [[nodiscard]] static std::uint64_t hash_page(std::span<const std::byte> page) {
    std::uint64_t hash = 0;
    hash_pages(page, page_size(), &hash);
    return hash;
  }

 private:
  // Bits 0, 1, 3, 4, ... 8 of the header's have a meaning; the seven of them that a byte has room for, and 8 for the rest.
  static std::uint16_t flags_of(std::uint8_t byte) {
    constexpr std::array<std::uint16_t, 8> kFlags = {wire::kFlagAnswer, wire::kFlagZero,     wire::kFlagTorn,
                                                     wire::kFlagFinal,  wire::kFlagLz4,      wire::kFlagZstd,
                                                     wire::kFlagDelta,  wire::kFlagReference};
    unsigned flags = 0;
    for (std::size_t i = 0; i < kFlags.size(); ++i) flags |= (byte >> i & 1U) != 0 ? kFlags[i] : 0U;
    return static_cast<std::uint16_t>(flags);
  }

  // How many bytes malformed() asks for; nullopt: any number.
  static std::optional<std::uint64_t> due(const wire::FrameHeader& header) {
    using wire::FrameType;
    const std::uint64_t most = wire::max_payload(page_size());
    const std::uint64_t count = std::min(header.page_count, most);
    switch (static_cast<FrameType>(header.type)) {
      case FrameType::kPages:
        if (wire::encoding_of(header) != 0) return std::nullopt;
        return count * page_size();
      case FrameType::kPopularContent:
      case FrameType::kPopularPages:
        return count * page_size();
      case FrameType::kHashes:
        return count * sizeof(wire::TreeHash);
      case FrameType::kMap: {
        const bool bare = (header.flags & wire::kFlagZero) != 0 ||
                          wire::Holders::of(header.tag).first == wire::Holders::kDestination;
        return bare ? 0 : count * sizeof(std::uint64_t);
      }
      case FrameType::kTree:
        return ((header.tag & 0xff) == wire::kTreeNodes ? wire::tree_nodes(count) : count) *
               sizeof(wire::TreeHash);
      case FrameType::kKnown:
      case FrameType::kUnresolved:
        return count * sizeof(wire::KnownName);
      case FrameType::kKnownReference:
      case FrameType::kReference:
        return count * sizeof(wire::ContentHash);
      case FrameType::kProbe:
      case FrameType::kProbed:
      case FrameType::kNames:
      case FrameType::kReport:
      case FrameType::kPopularRead:
        return count * sizeof(wire::ContentName);
      case FrameType::kHeld:
        return sizeof(wire::KnownHolders) + count * sizeof(wire::ContentName);
      case FrameType::kReported:
        return wire::wanted_words(count) * sizeof(std::uint64_t);
      case FrameType::kPopularNames:
        return count * sizeof(wire::PopularName);
      case FrameType::kDiscard:
      case FrameType::kSame:
      case FrameType::kSuspects:
      case FrameType::kBitmap:
      case FrameType::kLinkProbe:
        return std::nullopt;
      default:
        return 0;
    }
  }

  std::vector<std::byte> payload_of(std::uint8_t how, const wire::FrameHeader& header,
                                    std::span<const std::byte> given) {
    const bool pages = header.type == static_cast<std::uint16_t>(wire::FrameType::kPages);
    if (pages && (how & kPack) != 0 && wire::encoding_of(header) != 0) return packed(header, given);
    std::size_t bytes = given.size();
    if ((how & kAsItIs) == 0) {
      const auto wanted = due(header);
      // Lists of runs are whole; a byte or two more would only be refused.
      bytes = wanted ? static_cast<std::size_t>(*wanted) : given.size() / 8 * 8;
    }
    return repeated(given, std::min<std::size_t>(bytes, wire::max_payload(page_size()) + 8));
  }

  static std::vector<std::byte> repeated(std::span<const std::byte> given, std::size_t bytes) {
    std::vector<std::byte> all(bytes);
    for (std::size_t at = 0; !given.empty() && at < bytes; at += given.size())
      std::memcpy(&all[at], given.data(), std::min(given.size(), bytes - at));
    return all;
  }

  // The run's pages as the input has them, encoded. A delta is against what this script sent of them last.
  std::vector<std::byte> packed(const wire::FrameHeader& header, std::span<const std::byte> given) {
    const std::uint64_t count =
        std::clamp<std::uint64_t>(header.page_count, 1, wire::max_run_pages(page_size()));
    std::vector<std::byte> content = repeated(given, static_cast<std::size_t>(count * page_size()));
    std::vector<std::byte> out(3 * content.size() + wire::DeltaEncoder::kEndBytes);
    const std::uint16_t encoding = wire::encoding_of(header);
    std::size_t length = 0;
    if (encoding == wire::kFlagDelta) {
      const std::vector<std::byte> base = last(header, count);
      content = base;
      for (std::size_t at = 0; at < given.size(); ++at) content[at * 37 % content.size()] = given[at];
      wire::DeltaEncoder encoder(out);
      for (std::size_t at = 0; at < content.size(); at += page_size()) {
        require(encoder.add(std::span(base).subspan(at, page_size()),
                            std::span(content).subspan(at, page_size()), 3 * page_size()));
      }
      length = encoder.finish();
    } else if (encoding == wire::kFlagLz4 || encoding == wire::kFlagZstd) {
      length = compressor_.compress(encoding, content, std::span(out).first(content.size()));
    }
    out.resize(length);
    return out;
  }

  std::vector<std::byte> last(const wire::FrameHeader& header, std::uint64_t count) const {
    std::vector<std::byte> pages(static_cast<std::size_t>(count * page_size()));
    for (std::uint64_t i = 0; i < count; ++i) {
      const auto found = last_.find({header.region, header.first_page + i});
      if (found != last_.end()) std::memcpy(&pages[i * page_size()], found->second.data(), page_size());
    }
    return pages;
  }

  std::uint64_t checksum_of_pages(std::uint8_t how, const wire::FrameHeader& header,
                                  std::span<const std::byte> payload) {
    const std::uint64_t count = std::min(header.page_count, wire::max_run_pages(page_size()));
    std::vector<std::byte> pages;
    if (wire::encoding_of(header) == 0) {
      pages.assign(payload.begin(), payload.end());
    } else {
      pages = last(header, count);
      if (!decoder_.decode(wire::encoding_of(header), payload, pages)) pages.clear();
    }
    pages.resize(static_cast<std::size_t>(count * page_size()));
    std::vector<std::uint64_t> hashes(static_cast<std::size_t>(count));
    hash_pages(pages, page_size(), hashes.data());
    said_.insert(hashes.begin(), hashes.end());
    if ((how & (kTorn | kNoFrame | kCut)) == 0) {
      for (std::uint64_t i = 0; i < count; ++i) {
        const auto page = std::span(pages).subspan(static_cast<std::size_t>(i * page_size()), page_size());
        last_[{header.region, header.first_page + i}].assign(page.begin(), page.end());
      }
    }
    return wire::pages_checksum(header, hashes);
  }

  std::map<std::pair<std::uint32_t, std::uint64_t>, std::vector<std::byte>> last_;
  std::set<std::uint64_t> said_;
  wire::Compressor compressor_;
  wire::RunDecoder decoder_;
};

// The frames that a peer sends: each whole, well-formed and with the checksum that it ought to have.
class FrameSplitter {
 public:
  struct Frame {
    wire::FrameHeader header{};
    std::vector<std::byte> payload;
    std::vector<std::uint64_t> hashes;  // of kPages
    [[nodiscard]] bool is(wire::FrameType type) const {
      return header.type == static_cast<std::uint16_t>(type);
    }
  };
  void add(std::span<const std::byte> bytes) { bytes_.insert(bytes_.end(), bytes.begin(), bytes.end()); }
  // False: no whole frame is left.
  bool next(Frame& into) {
    const auto left = std::span<const std::byte>(bytes_).subspan(at_);
    if (left.size() < sizeof into.header) return false;
    std::memcpy(&into.header, left.data(), sizeof into.header);
    require(wire::malformed(into.header, system_page_size()) == nullptr);
    if (left.size() < sizeof into.header + into.header.payload_bytes) return false;
    const auto payload = left.subspan(sizeof into.header, into.header.payload_bytes);
    at_ += sizeof into.header + payload.size();
    into.payload.assign(payload.begin(), payload.end());
    into.hashes.clear();
    if (!into.is(wire::FrameType::kPages)) {
      require(wire::payload_checksum(into.header, payload) == into.header.checksum);
      return true;
    }
    const std::uint16_t encoding = wire::encoding_of(into.header);
    if (encoding == wire::kFlagDelta) return true;  // the base is the reader's
    if (encoding != 0) {
      into.payload.assign(static_cast<std::size_t>(into.header.page_count * system_page_size()), {});
      require(decoder_.decode(encoding, payload, into.payload));
    }
    into.hashes.resize(static_cast<std::size_t>(into.header.page_count));
    hash_pages(into.payload, system_page_size(), into.hashes.data());
    require(wire::pages_checksum(into.header, into.hashes) == into.header.checksum);
    return true;
  }
  // Nothing but whole frames came.
  [[nodiscard]] bool empty() const { return at_ == bytes_.size(); }

 private:
  std::vector<std::byte> bytes_;
  std::size_t at_ = 0;
  wire::RunDecoder decoder_;
};

}  // namespace memferry::fuzz
