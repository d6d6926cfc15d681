// The bytes of a data or demand connection, native to native. docs/protocol.md has the sequences; this file
// is the one definition of the layout. All integers are little-endian; the numbers here belong to the wire
// and never change meaning within a version.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "page/range.h"

namespace memferry::wire {

inline constexpr std::uint16_t kVersion = 1;

// The first 8 bytes of every connection to a listener say what it is.
inline constexpr std::array<char, 8> kControlPreface = {'M', 'F', 'E', 'R', 'R', 'Y', 'C', '1'};
inline constexpr std::array<char, 8> kDataPreface = {'M', 'F', 'E', 'R', 'R', 'Y', 'D', '1'};
// To a VMD server, about an image: the memory of one guest as the servers hold it.
inline constexpr std::array<char, 8> kStagePreface = {'M', 'F', 'E', 'R', 'R', 'Y', 'S', '1'};

using MigrationId = std::array<std::uint8_t, 16>;
// HMAC-SHA256 over (session key; "memferry data", migration id, epoch, channel): computed by TypeScript on
// both sides from the control handshake's nonces, compared here in constant time, good for one connection.
using Token = std::array<std::uint8_t, 32>;

// Sent by the source when it dials; answered by HelloReply. Channel kDemandChannel is the demand channel,
// 0 .. channels-1 are data channels. Epoch 0 is the first set of connections; each redial after a cut uses
// the next one and replaces every connection of the former epoch.
inline constexpr std::uint16_t kDemandChannel = 0xffff;
struct Hello {
  std::array<char, 8> preface;
  MigrationId migration;
  std::uint16_t version;
  std::uint16_t channel;
  std::uint32_t epoch;
  Token token;
};
static_assert(sizeof(Hello) == 64);

// With kStagePreface: `migration` is the image, `channel` a StageRole, `epoch` is session << 16 | attempt. Sessions
// are given out by the server over the control connection; each has a token for every attempt of every role. A
// connection replaces the former one of its session and role; attempts only ever go up.
enum class StageRole : std::uint16_t {
  kScatter = 0,  // the source writes: pages, zeros, map records, barriers
  kGather = 1,   // the destination reads ahead of the guest
  kDemand = 2,   // the destination reads what somebody waits for
  kChain = 3,    // another server writes replicas
  kProbe = 4,    // the source asks what the servers hold already, and tells what they hold by now
  kPopular = 5,  // a member of a domain tells what its guest has, or learns what many have; of no image
};
inline constexpr std::uint16_t kStageRoles = 6;
// Session of the chain that comes from the server with ordinal n: kFirstChainSession + n.
inline constexpr std::uint16_t kFirstChainSession = 0xff00;

// kRefused is the one answer to every kind of wrong hello: unknown migration, wrong or used token. kLost comes from
// a VMD server only: it has no such image, because it was dropped or the server was restarted.
enum class HelloStatus : std::uint32_t { kAccepted = 1, kRefused = 2, kLost = 3 };
struct HelloReply {
  std::uint32_t magic;  // kFrameMagic
  std::uint32_t status;
};
static_assert(sizeof(HelloReply) == 8);

inline constexpr std::uint32_t kFrameMagic = 0x3146464dU;  // "MFF1"

enum class FrameType : std::uint16_t {
  kPages = 1,       // payload: page_count pages. Source to destination, data or demand channel.
  kZero = 2,        // no payload: these pages are zeros (or were never touched)
  kDiscard = 3,     // payload: WireRun[]: forget these pages, newer content will follow. Channel 0.
  kSwitch = 4,      // the destination becomes post-copy: what it lacks is missing. Channel 0.
  kSwitchAck = 5,   // destination to source, on channel 0
  kBarrier = 6,     // tag: everything before it on this channel must be in memory before the answer
  kBarrierAck = 7,  // destination to source: tag; page_count: suspect pages named on this channel since its
                    // last barrier
  kSuspects = 8,    // destination to source, before a kBarrierAck on a data channel: WireRun[] whose checksum
                    // did not fit in a pre-copy round; they must go again. Each is named once, on whichever
                    // channel's barrier comes first after it was found.
  kFaultRequest = 9,  // destination to source, demand channel: first_page wanted now, page_count is how many
                      // pages from it on are welcome (1 = just this one)
  kBitmap = 10,       // destination to source after an epoch > 0 hello on the demand channel: the pages that
                      // it has, payload: 64-bit words, first_page a multiple of 64. Ends with kBitmapEnd.
  kBitmapEnd = 11,
  kGoodbye = 12,  // source: this channel ends here on purpose; a close without it is a cut

  // With a VMD server (docs/protocol.md, "The VMD"):
  kMap = 13,  // where pages are: tag has the holders; payload: one XXH3_64 a page, nothing for zeros
              // (kFlagZero) and for pages that the destination holds. Source to servers and destination,
              // server to destination.
  kMapRequest = 14,  // destination to server: everything that it knows, as kMap frames and a kMapEnd
  kMapEnd = 15,      // tag: 1 when the image is sealed: its source needs to send nothing more
  kRead = 16,    // destination to server: this run (at most max_run_pages), tag: number of the request. The
                 // answer is kPages, kZero and kAbsent frames with the same tag that cover it, in order.
  kAbsent = 17,  // server to destination: it does not hold these pages
  kRefused =
      18,  // server to source, before the kBarrierAck: the server whose ordinal is in tag does not hold these pages:
           // no room, or (kFlagTorn) they came torn
  kChainBroken =
      19,  // server to source: the replica's server (ordinal in tag) cannot be written; the connection
           // ends, and what was not acknowledged on it is not held twice
  kChainOf =
      47,  // server to server, first on a chain: tag: the epoch of the source's connection whose pages it
           // passes on
  kChainOver =
      48,  // source to server, server to server: what comes by the server whose ordinal is in `region`, of
           // source connections to it up to the epoch in tag, counts no more: what was not acknowledged on
           // those has gone, or goes, another way, and may be newer
  kHashRequest =
      36,  // destination to server, on kGather: as kRead, but only their hashes. The answer is kHashes,
           // kZero and kAbsent frames with the same tag that cover it, in order.
  kHashes =
      37,  // server to destination: one TreeHash a page under the session's stage_hash_key(), of what it holds
  kElsewhere =
      20,  // source to destination, demand channel: it has let go of this page; a kMap says where it is

  // Deduplication (docs/protocol.md, "Deduplication"); on a kProbe connection but for kReference:
  kProbe =
      21,  // source to a directory server: page_count ContentNames: who holds these? tag: the question's number
  kProbed = 22,  // its answer: page_count KnownHolders, in the order asked; the same tag
  kHeld = 23,  // source to a directory server: KnownHolders and then page_count ContentNames: these hold them
  kNames = 24,  // source to a server that holds these pages: page_count ContentNames, one a page of the run
  kNamed = 26,  // its answer: known by these names from now on; the same tag
  kReference =
      25,  // source to server, server to replica: page_count ContentHashes: these pages are content that it
           // holds already; tag: the holders. Refused (kFlagReference) where it does not.
  // A destination that starts from a base (docs/protocol.md, "Starting from a base"). All on channel 0, before
  // the first page.
  kTreeRequest =
      27,  // source to destination: hashes of this run of whole nodes, tag: the level (kTreePages, kTreeNodes, kTreeEstimate)
  kTree =
      28,  // destination to source, in the order of the requests: page_count pages from first_page on, payload:
           // one TreeHash a page or node; tag: level | microseconds that hashing took << 8
  kSame = 29,  // source to destination: WireRun[] of pages that the base has as they are at the source
  kBaseEnd =
      30,  // source to destination: no more is compared; tag 1: what was not confirmed is dropped at once
  kLinkProbe = 31,  // source to destination: bytes that nobody needs, to measure the link

  // Pages that the destination has already (docs/protocol.md, "References"), on data channels:
  kKnown = 32,           // destination to source: page_count KnownNames of pages that it has
  kKnownReference = 33,  // source to destination: page_count ContentHashes: these pages are such content
  kUnresolved = 34,      // destination to source, before the kBarrierAck: these references came to nothing;
                         // payload: the KnownName of each
  kTaken =
      35,  // destination to source: tag: bytes of this connection that it has worked off so far. Once a second
  // while frames come, so that one that is slow is not taken for one that has died. Server to source,
  // server to server, on kScatter and kChain, every kTellWork: tag: what it and those whom it passes
  // replicas on to have worked off so far; the same again while it waits for its turn
  kTurn = 38,  // server to destination, every kTellWork while an answer waits for its turn

  // Page distribution (docs/protocol.md, "Page distribution"), on a kPopular connection:
  kReport = 40,    // member to directory server: page_count ContentNames of pages that its guest keeps
  kReported = 41,  // its answer: one bit a name, in 64-bit words: the page itself is wanted; the same tag
  kPopularContent = 42,  // member to server: page_count pages that were wanted
  kPopularAsk =
      43,  // member to server: popular names from the cursor first_page on, of a score of at least `region`,
           // at most page_count
  kPopularNames =
      44,  // its answer: page_count PopularNames; first_page: where to go on, 0 at the end; the same tag
  kPopularRead = 45,  // member to server: page_count ContentNames: send these
  kPopularPages =
      46,  // its answer: first_page: one bit a name that was asked for; page_count pages, those of
           // the bits that are set, in order; the same tag
};

// The first half of a content's hash: what it is asked for by. Only a hint, so half is enough.
using ContentName = std::array<std::uint64_t, 2>;
// HMAC-SHA256 of a page under its deduplication domain's key: what decides.
using ContentHash = std::array<std::uint8_t, 32>;
// Who holds a content, as identities of servers: 0 nobody. Both the same in every migration of a domain.
struct KnownHolders {
  static constexpr std::uint64_t kNobody = 0;
  static constexpr std::uint64_t kOnItsWay = ~0ULL;  // as `first`: another source has said that it sends it
  std::uint64_t first = kNobody;
  std::uint64_t second = kNobody;
  bool operator==(const KnownHolders&) const = default;
};
static_assert(sizeof(ContentName) == 16 && sizeof(ContentHash) == 32 && sizeof(KnownHolders) == 16);
// How useful a content is, as the directory of its name has counted; higher is more.
struct PopularName {
  ContentName name;
  std::uint32_t score;
  std::uint32_t reserved;  // 0
};
static_assert(sizeof(PopularName) == 24);
// Asked for in one kPopularRead: its answer has a bit for each, and carries their pages.
inline constexpr std::uint64_t kMostPopularReads = 64;
// In one frame of any of these; a reader's buffers are made for it.
inline constexpr std::uint64_t kMostNames = 4096;
// Words of a bit a name.
[[nodiscard]] constexpr std::uint64_t wanted_words(std::uint64_t names) {
  return names / 64 + (names % 64 != 0 ? 1 : 0);
}

// What a page that the destination has is called: the first eight bytes of its ContentHash. Only a hint.
using KnownName = std::uint64_t;
inline constexpr std::uint64_t kMostKnownNames = 1024;  // in one frame

// A hash of a page, or of a node's page hashes, under this migration's key (kHashes: under the session's);
// page/keyed_hash.h.
using TreeHash = std::array<std::uint8_t, 16>;
using TreeKey = std::array<std::uint8_t, 64>;
[[nodiscard]] constexpr TreeKey token_pair(const Token& first, const Token& second) {
  static_assert(sizeof(TreeKey) == 2 * sizeof(Token));
  TreeKey key{};
  std::copy(first.begin(), first.end(), key.begin());
  std::copy(second.begin(), second.end(), key.begin() + sizeof(Token));
  return key;
}
// A pair of a session's tokens ([attempt * kStageRoles + role]) for kPopular: both ends have them, and no connection
// about an image ever shows them. Nothing where there are fewer.
[[nodiscard]] constexpr std::optional<TreeKey> unshown_pair(std::span<const Token> tokens,
                                                            std::size_t attempt) {
  const std::size_t first = attempt * kStageRoles + static_cast<std::size_t>(StageRole::kPopular);
  const std::size_t second = first + kStageRoles;
  if (tokens.size() <= second) return std::nullopt;
  return token_pair(tokens[first], tokens[second]);
}
// Under which servers hash pages for whoever reads them.
[[nodiscard]] constexpr std::optional<TreeKey> stage_hash_key(std::span<const Token> tokens) {
  return unshown_pair(tokens, 0);
}
// Of the tokens behind the table's end; wire/later_tokens.h.
[[nodiscard]] constexpr std::optional<TreeKey> later_token_key(std::span<const Token> tokens) {
  return unshown_pair(tokens, 2);
}
inline constexpr std::uint64_t kTreeNodePages = 256;  // of one node; the last one of a region may have fewer
inline constexpr std::uint64_t kTreePages = 0;
inline constexpr std::uint64_t kTreeNodes = 1;
// Of pages as well, of which nothing is kept: whoever asked only wants to know how much is alike.
inline constexpr std::uint64_t kTreeEstimate = 2;
[[nodiscard]] constexpr bool tree_level(std::uint64_t level) { return level <= kTreeEstimate; }
[[nodiscard]] constexpr std::uint64_t tree_nodes(std::uint64_t pages) {
  return pages / kTreeNodePages + (pages % kTreeNodePages != 0 ? 1 : 0);
}

// Where a page is, as a server's ordinal in the migration's list; in the tags of kPages and kZero (to a server) and
// of kMap. `second` is the replica, which the first holder passes the page on to.
struct Holders {
  static constexpr std::uint8_t kNobody = 0xff;
  static constexpr std::uint8_t kDestination = 0xfe;
  static constexpr std::uint8_t kMostServers = 0xfa;
  std::uint8_t first = kNobody;
  std::uint8_t second = kNobody;
  [[nodiscard]] constexpr std::uint64_t tag() const {
    return static_cast<std::uint64_t>(first) | static_cast<std::uint64_t>(second) << 8;
  }
  [[nodiscard]] static constexpr Holders of(std::uint64_t tag) {
    return {static_cast<std::uint8_t>(tag & 0xff), static_cast<std::uint8_t>(tag >> 8 & 0xff)};
  }
  [[nodiscard]] constexpr bool has(std::uint8_t ordinal) const {
    return first == ordinal || second == ordinal;
  }
  bool operator==(const Holders&) const = default;
};

inline constexpr std::uint16_t kFlagAnswer =
    1;                                         // kPages/kZero on the demand channel: the faulted page itself
inline constexpr std::uint16_t kFlagZero = 2;  // kMap: these pages are zeros, nobody needs to be asked
inline constexpr std::uint16_t kFlagFinal = 16;  // kMap: told after the guest had left, so it never changes
inline constexpr std::uint16_t kFlagTorn = 8;    // kRefused: not for want of room, the checksum did not fit
// kPages: what the payload is, instead of the pages as they are; at most one of them, and only what the two ends have
// agreed on. The checksum is over the pages all the same. kRead: which compressions the answer may have.
inline constexpr std::uint16_t kFlagLz4 = 32;
inline constexpr std::uint16_t kFlagZstd = 64;
inline constexpr std::uint16_t kFlagDelta =
    128;  // wire/delta.h, against what the receiver has of these pages
inline constexpr std::uint16_t kCompressions = kFlagLz4 | kFlagZstd;
inline constexpr std::uint16_t kEncodings = kCompressions | kFlagDelta;
inline constexpr std::uint16_t kFlagReference = 256;  // kRefused: a reference to what is not held here

struct FrameHeader {
  std::uint32_t magic;
  std::uint16_t type;
  std::uint16_t flags;
  std::uint32_t region;         // index in the migration's region table
  std::uint32_t payload_bytes;  // <= max_payload(page size)
  std::uint64_t first_page;
  std::uint64_t page_count;
  std::uint64_t tag;       // round or barrier number, or as the type says; else 0
  std::uint64_t checksum;  // XXH3_64 over the 40 bytes before it, then: kPages the page hashes (one u64 a
                           // page, XXH3_64 of the page, decoded), other types the payload itself
};
static_assert(sizeof(FrameHeader) == 48);
static_assert(offsetof(FrameHeader, checksum) == 40);

// A number that both ends of a migration have in common, for choices that they make alike.
[[nodiscard]] constexpr std::uint64_t shared_key(const MigrationId& migration) {
  std::uint64_t key = 0;
  for (const std::uint8_t byte : migration) key = key * 31 + byte;
  return key;
}

struct WireRun {
  std::uint64_t first_page;
  std::uint64_t page_count;
};
static_assert(sizeof(WireRun) == 16);

// A server that is slow, or has used up its bandwidth for now, says so often that nobody takes it for dead. Who hears it
// bears with no progress at all for the one, and with an answer that never comes for the other.
inline constexpr std::chrono::milliseconds kTellWork{500};
inline constexpr std::chrono::milliseconds kLongestTurn{60'000};
inline constexpr std::chrono::milliseconds kLongestAnswer{600'000};

// A run of pages carries at most 256 KiB, or one page where pages are larger: the piece that sockets, the
// L2 cache and UFFDIO_COPY all like.
inline constexpr std::uint64_t kRunBytes = 256 * 1024;
[[nodiscard]] constexpr std::uint64_t max_payload(std::uint64_t page_size) {
  return page_size > kRunBytes ? page_size : kRunBytes;
}
[[nodiscard]] constexpr std::uint64_t max_run_pages(std::uint64_t page_size) {
  return max_payload(page_size) / page_size;
}

// Structs go over the wire as they lie in memory.
static_assert(std::endian::native == std::endian::little, "the wire is little-endian");

// A header with its magic and no checksum yet.
[[nodiscard]] FrameHeader make_header(FrameType type, std::uint32_t region = 0, PageRun run = {},
                                      std::uint64_t tag = 0);

// The checksum of a kPages frame: header and page hashes. The page bytes themselves are not read again.
[[nodiscard]] std::uint64_t pages_checksum(const FrameHeader& header,
                                           std::span<const std::uint64_t> page_hashes);
// The checksum of every other frame: header and payload.
[[nodiscard]] std::uint64_t payload_checksum(const FrameHeader& header, std::span<const std::byte> payload);

// How a kPages frame's payload is encoded: one of kEncodings, or 0.
[[nodiscard]] constexpr std::uint16_t encoding_of(const FrameHeader& header) {
  return header.flags & kEncodings;
}

// Set the checksum; kPages frames get their payload_bytes from `page_size`, others from the payload.
void seal_pages(FrameHeader& header, std::uint64_t page_size, std::span<const std::uint64_t> page_hashes);
void seal(FrameHeader& header, std::span<const std::byte> payload = {});
// The same for pages whose payload is encoded.
void seal_encoded(FrameHeader& header, std::uint16_t encoding, std::size_t payload_bytes,
                  std::span<const std::uint64_t> page_hashes);

// What is wrong with the form of a header, whatever the state of the migration: magic, type, payload length
// against type, page count and page size. nullptr when nothing is. Region and page range are the caller's
// to check (see run_inside), since only the caller knows the regions.
[[nodiscard]] const char* malformed(const FrameHeader& header, std::uint64_t page_size);

// Whether the run is not empty and lies inside [0, pages), with no overflow whatever the peer wrote.
[[nodiscard]] constexpr bool run_inside(std::uint64_t first_page, std::uint64_t page_count,
                                        std::uint64_t pages) {
  return page_count > 0 && first_page < pages && page_count <= pages - first_page;
}

}  // namespace memferry::wire
