// Whether compressing pays on one connection, and with which codec: from what the link takes, what each codec does in a
// second of CPU time and to how much it packs this data. Decided for each connection apart.
//
//   raw rate with a codec = min(what the thread compresses in a second, what the link takes / what a byte becomes)
//
// A link that is faster than the thread never fills, and nothing pays on it. On a full one a codec is tried out on a
// part of a chunk: at once, and each time that it would not have paid after twice as many bytes. Where the link takes
// raw bytes faster than any codec does here, whatever they are, none is tried. Where a codec in use gets less through
// than its CPU time says, the CPUs are shared, and both codecs count for that much less. While a codec is in use the other one is
// tried now and then; and where it is the codec that is waited for, plain chunks show from time to time what the link
// takes.
//
// Pure: no clock, no socket, no bytes. The owner serialises.
#pragma once

#include <cstdint>
#include <optional>

namespace memferry::wire {

enum class Compress : std::uint8_t { kOff, kAuto, kLz4, kZstd };

// What is known of one codec on this connection's data. Rates are in raw bytes a second.
struct CodecFigures {
  double rate = 0;   // of the thread's CPU time; 0: not known yet
  double ratio = 1;  // encoded / raw
};

// What would get through in a second, beside the rest of what the thread does for each byte.
[[nodiscard]] double predicted_rate(double link_rate, const CodecFigures& codec);

// Which encoding (kFlagLz4, kFlagZstd or 0) to go on with. With hysteresis: another one has to promise clearly more than
// `now` does.
[[nodiscard]] std::uint16_t better_codec(std::uint16_t now, double link_rate, const CodecFigures& lz4,
                                         const CodecFigures& zstd);

class CodecChoice {
 public:
  static constexpr double kFastestCodec = 1.5e9;  // no codec gets rid of more raw bytes in a second
  static constexpr unsigned kFullWindows = 3;     // a link that was full so often is; once may be a hiccup
  static constexpr std::uint64_t kFirstInterval = 4ULL << 20;  // of raw bytes between two attempts
  static constexpr std::uint64_t kLongestInterval = 256ULL << 20;
  static constexpr std::uint64_t kOtherInterval = 16ULL
                                                  << 20;  // while one is in use: until the other is tried
  static constexpr unsigned kFirstPatience = 64;          // windows without a full link before a plain one
  static constexpr unsigned kLongestPatience = 1024;

  // `allowed`: encodings that the receiver takes. A codec that is asked for and not allowed is as good as kOff.
  CodecChoice(Compress mode, std::uint16_t allowed);

  // How the next chunk goes: 0 as it is. Incompressible runs go as they are in any case.
  [[nodiscard]] std::uint16_t encoding() const { return encoding_; }
  // Encodings to be tried on a part of the next chunk, beside encoding(); kFlagLz4 first.
  [[nodiscard]] std::uint16_t to_try() const;
  // Of those, whether it is still of interest after what was found of the first.
  [[nodiscard]] bool worth_trying(std::uint16_t encoding) const;
  // A codec was used, or tried out, on `raw` bytes. `encoded` is `raw` where it did not get smaller.
  void used(std::uint16_t encoding, std::uint64_t raw, std::uint64_t encoded, double cpu_seconds);
  void tried_all();
  // `raw` bytes have gone out, compressed or not.
  void sent(std::uint64_t raw);
  // Over some time the link took `link_rate` bytes a second of what was handed to it (`full`: it was always waited for;
  // otherwise it may take more), which were `raw_rate` bytes of pages.
  void measured(double link_rate, double raw_rate, bool full);

 private:
  void decide();
  void note_share(double raw_rate, bool full);
  [[nodiscard]] CodecFigures& figures(std::uint16_t encoding);

  const bool adaptive_;
  const std::uint16_t allowed_;
  std::uint16_t encoding_ = 0;
  CodecFigures lz4_;
  CodecFigures zstd_;
  double share_ = 1;  // of a CPU that this thread gets when it is what is waited for: others need them too
  double link_rate_ = 0;  // 0: not known yet
  bool full_ = false;
  unsigned full_windows_ = 0;  // one after the other
  std::uint64_t since_try_ = 0;
  std::uint64_t interval_ = 0;  // the first attempt comes at once
  unsigned idle_windows_ = 0;   // with a codec in use and the link not full
  unsigned patience_ = kFirstPatience;
  std::uint16_t resume_ = 0;  // what was in use before the plain window that is under way
};

}  // namespace memferry::wire
