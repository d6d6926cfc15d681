// Compression of what one thread sends on one connection: the choice, the measuring of codec and link, and what it came
// to. The codec itself is whoever's: several connections may share one. The order of calls for a chunk: begin(), then for
// its runs either compress() or, on a copy of a part of it, try_out(); sent() when the chunk has been handed to the
// socket.
//
// Threads: one an object; counters are shared.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>

#include "wire/codec.h"
#include "wire/codec_choice.h"
#include "wire/link_meter.h"

namespace memferry::wire {

// What encoding has come to, over all threads.
struct EncodingCounters {
  std::atomic<std::uint64_t> raw_bytes{0};      // of the pages that went encoded
  std::atomic<std::uint64_t> encoded_bytes{0};  // what they became
  std::atomic<std::uint64_t> pages{0};
  std::atomic<std::uint64_t> cpu_ns{0};  // attempts and what was tried out included
};

class RunCompressor {
 public:
  using Clock = std::chrono::steady_clock;
  // Enough to tell data that packs from data that does not.
  static constexpr std::size_t kTryBytes = 64 * 1024;

  RunCompressor(Compress mode, std::uint16_t allowed, EncodingCounters& counters)
      : choice_(mode, allowed), counters_(counters) {}

  // A new chunk; how it goes stays so until the next one. True: its runs are to be given to compress().
  bool begin();
  // Whether a part of this chunk is wanted by try_out().
  [[nodiscard]] bool tries_out() const { return try_ != 0; }
  // At most kTryBytes are looked at, and `scratch` has as many. They must not change meanwhile.
  void try_out(Compressor& codec, std::span<const std::byte> bytes, std::span<std::byte> scratch);
  // A run of `pages`, which must not change meanwhile. Gives the payload's length in `out`, with its encoding, or 0: it
  // goes as it is.
  std::size_t compress(Compressor& codec, std::span<const std::byte> bytes, std::uint64_t pages,
                       std::span<std::byte> out, std::uint16_t& encoding);
  void sent(int fd, std::uint64_t raw_bytes);
  void waited(Clock::duration duration) { meter_.waited(duration); }
  void rest() { meter_.rest(); }

 private:
  std::size_t timed(Compressor& codec, std::uint16_t encoding, std::span<const std::byte> bytes,
                    std::span<std::byte> out);

  CodecChoice choice_;
  EncodingCounters& counters_;
  LinkMeter meter_;
  std::uint16_t encoding_ = 0;
  std::uint16_t try_ = 0;
};

}  // namespace memferry::wire
