// How runs of pages with content go on one connection: as a delta against what was last sent of them, compressed, or as
// they are. What is encoded is first copied out of the guest's memory, which may be written meanwhile: neither codec
// sees bytes that change, and the hash is of the copy too.
//
// Threads: one an object, the connection's; cache and counters are shared.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "page/range.h"
#include "transfer/delta_cache.h"
#include "transfer/events.h"
#include "wire/frame.h"
#include "wire/run_compressor.h"

namespace memferry {

// What a sender's connections have in common; the counters and the cache outlive all of them.
struct Encoding {
  wire::Compress compress = wire::Compress::kOff;
  std::uint16_t destination = 0;  // encodings that were agreed on with the destination
  std::uint16_t servers = 0;      // and with all servers
  wire::EncodingCounters* compression = nullptr;
  wire::EncodingCounters* delta = nullptr;
  DeltaCache* cache = nullptr;  // for rounds; may be nullptr
};

class PageEncoder {
 public:
  // nullptr when nothing is ever to be encoded there.
  static std::unique_ptr<PageEncoder> create(const Encoding& encoding, Towards towards,
                                             std::uint64_t page_size);

  // Who gets what is encoded from the next batch on, and so whose former version of a page a delta is against: a
  // server and the one that it passes replicas on to, which then has the same. Until it is called: the destination.
  void set_receiver(wire::Holders receiver) { receiver_ = receiver; }
  // A new batch.
  void begin();
  // The pages as the codecs may see them: a copy, where this batch is encoded; nullopt where it goes as it lies in the
  // guest's memory. Valid until the next begin().
  std::optional<std::span<const std::byte>> hold(std::span<const std::byte> guest_bytes);

  struct Piece {
    std::uint64_t pages = 0;
    std::uint16_t encoding = 0;  // 0: payload are the pages themselves
    std::span<const std::byte> payload;
  };
  // One run of pages without zeros, in pieces. `bytes` were given by hold(), or are the guest's (`held` false).
  void encode(std::uint32_t region, PageNumber first, std::span<const std::byte> bytes, bool held,
              const std::function<void(const Piece&)>& piece);
  // A run that goes as zeros, or as references: what was sent of it before is no base any more.
  void elsewhere(std::uint32_t region, PageRun run);

  // The batch has been handed to the socket; see RunCompressor.
  void sent(int fd, std::uint64_t raw_bytes);
  void waited(std::chrono::steady_clock::duration duration);
  void rest();
  [[nodiscard]] std::uint64_t memory_bytes() const;
  // What one may come to.
  [[nodiscard]] static std::uint64_t most_memory_bytes(std::uint64_t page_size);

 private:
  PageEncoder(const Encoding& encoding, Towards towards, std::uint64_t page_size);
  [[nodiscard]] bool makes_deltas() const { return rounds_ && delta_; }
  Piece compressed(std::span<const std::byte> bytes);
  std::optional<Piece> delta(std::span<const std::byte> bytes, std::size_t from);
  void find_bases(std::uint32_t region, PageNumber first, std::size_t pages);

  const std::size_t page_size_;
  const bool delta_;  // agreed on
  wire::Holders receiver_{wire::Holders::kDestination, wire::Holders::kNobody};
  DeltaCache* const cache_;
  wire::EncodingCounters* const delta_counters_;
  std::optional<wire::RunCompressor> compressor_;
  wire::Compressor codec_;
  std::vector<std::byte> scratch_;
  bool compressing_ = false;  // this batch
  bool rounds_ = false;       // this batch: the cache is open
  std::vector<std::byte> held_;
  std::size_t held_used_ = 0;
  std::vector<std::byte> encoded_;
  std::size_t encoded_used_ = 0;
  std::vector<std::byte> bases_;
  std::vector<bool> has_base_;
};

}  // namespace memferry
