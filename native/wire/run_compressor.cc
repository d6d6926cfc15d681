#include "wire/run_compressor.h"

#include <algorithm>

#include "os/thread_clock.h"
#include "wire/frame.h"

namespace memferry::wire {

bool RunCompressor::begin() {
  encoding_ = choice_.encoding();
  try_ = choice_.to_try();
  return encoding_ != 0;
}

std::size_t RunCompressor::timed(Compressor& codec, std::uint16_t encoding, std::span<const std::byte> bytes,
                                 std::span<std::byte> out) {
  const std::uint64_t began = thread_cpu_ns();
  const std::size_t encoded = codec.compress(encoding, bytes, out);
  const std::uint64_t took = thread_cpu_ns() - began;
  counters_.cpu_ns.fetch_add(took, std::memory_order_relaxed);
  choice_.used(encoding, bytes.size(), encoded > 0 ? encoded : bytes.size(), static_cast<double>(took) / 1e9);
  return encoded;
}

void RunCompressor::try_out(Compressor& codec, std::span<const std::byte> bytes,
                            std::span<std::byte> scratch) {
  bytes = bytes.first(std::min(bytes.size(), kTryBytes));
  for (const std::uint16_t each : {kFlagLz4, kFlagZstd}) {
    if ((try_ & each) != 0 && choice_.worth_trying(each)) timed(codec, each, bytes, scratch);
  }
  try_ = 0;
  choice_.tried_all();
}

std::size_t RunCompressor::compress(Compressor& codec, std::span<const std::byte> bytes, std::uint64_t pages,
                                    std::span<std::byte> out, std::uint16_t& encoding) {
  encoding = encoding_;
  const std::size_t encoded = timed(codec, encoding_, bytes, out);
  if (encoded == 0) return 0;
  counters_.raw_bytes.fetch_add(bytes.size(), std::memory_order_relaxed);
  counters_.encoded_bytes.fetch_add(encoded, std::memory_order_relaxed);
  counters_.pages.fetch_add(pages, std::memory_order_relaxed);
  return encoded;
}

void RunCompressor::sent(int fd, std::uint64_t raw_bytes) {
  choice_.sent(raw_bytes);
  if (const auto window = meter_.sent(fd, raw_bytes, Clock::now())) {
    choice_.measured(window->link_rate, window->raw_rate, window->full);
  }
}

}  // namespace memferry::wire
