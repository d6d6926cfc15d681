#include "wire/codec_choice.h"

#include <algorithm>

#include "wire/frame.h"

namespace memferry::wire {
namespace {

// Copying, hashing and handing over: what a thread does with raw bytes beside compressing them.
constexpr double kOtherWork = 4e9;
// What turning a codec on has to promise over going plain, and one codec over the other.
constexpr double kToBegin = 1.15;
constexpr double kToChange = 1.10;
// Of the share, an interval in which nothing is known of it: it may have become larger.
constexpr double kForget = 0.005;
constexpr double kLeastShare = 0.1;
// Below it a codec that is in use goes.
constexpr double kToStay = 1.03;
constexpr double kNewShare = 0.5;
// A run of a chunk that is in use says less than one that was tried out to know: there are many of them. A whole chunk
// counts more than a small run.
constexpr double kChunkWeight = 0.5;
constexpr double kWholeChunk = 256 * 1024;

double thread_rate(const CodecFigures& codec) {
  return codec.rate <= 0 ? 0 : 1 / (1 / codec.rate + 1 / kOtherWork);
}

}  // namespace

double predicted_rate(double link_rate, const CodecFigures& codec) {
  if (codec.rate <= 0) return 0;
  const double thread = thread_rate(codec);
  return codec.ratio <= 0 ? thread : std::min(thread, link_rate / codec.ratio);
}

std::uint16_t better_codec(std::uint16_t now, double link_rate, const CodecFigures& lz4,
                           const CodecFigures& zstd) {
  const double with_lz4 = predicted_rate(link_rate, lz4);
  const double with_zstd = predicted_rate(link_rate, zstd);
  const std::uint16_t best = with_zstd > with_lz4 ? kFlagZstd : kFlagLz4;
  const double with_best = std::max(with_lz4, with_zstd);
  if (now == 0) return with_best > kToBegin * link_rate ? best : std::uint16_t{0};
  const double with_now = now == kFlagLz4 ? with_lz4 : with_zstd;
  if (best != now && with_best > kToBegin * link_rate && with_best > kToChange * with_now) return best;
  return with_now > kToStay * link_rate ? now : std::uint16_t{0};
}

CodecChoice::CodecChoice(Compress mode, std::uint16_t allowed)
    : adaptive_(mode == Compress::kAuto && (allowed & kCompressions) != 0),
      allowed_(allowed & kCompressions) {
  if (mode == Compress::kLz4) encoding_ = allowed_ & kFlagLz4;
  if (mode == Compress::kZstd) encoding_ = allowed_ & kFlagZstd;
}

CodecFigures& CodecChoice::figures(std::uint16_t encoding) { return encoding == kFlagLz4 ? lz4_ : zstd_; }

std::uint16_t CodecChoice::to_try() const {
  if (!adaptive_ || resume_ != 0) return 0;
  if (encoding_ != 0) {
    return since_try_ >= kOtherInterval ? static_cast<std::uint16_t>(allowed_ & ~encoding_)
                                        : std::uint16_t{0};
  }
  const bool may_pay = full_windows_ >= kFullWindows && link_rate_ > 0 && link_rate_ < kFastestCodec;
  return may_pay && since_try_ >= interval_ ? allowed_ : std::uint16_t{0};
}

// zstd is never the faster one: a link that outruns lz4 outruns it too.
bool CodecChoice::worth_trying(std::uint16_t encoding) const {
  return encoding == kFlagLz4 || (allowed_ & kFlagLz4) == 0 || lz4_.rate <= 0 || lz4_.rate > link_rate_;
}

void CodecChoice::used(std::uint16_t encoding, std::uint64_t raw, std::uint64_t encoded, double cpu_seconds) {
  if (raw == 0) return;
  CodecFigures& codec = figures(encoding);
  const double rate = static_cast<double>(raw) / std::max(cpu_seconds, 1e-9);
  const double ratio = static_cast<double>(encoded) / static_cast<double>(raw);
  const bool first = codec.rate <= 0;
  const bool trial = encoding != encoding_;
  const double weight = trial ? 1 : kChunkWeight * std::min(1.0, static_cast<double>(raw) / kWholeChunk);
  const double share = first ? 1 : kNewShare * weight;
  codec.rate += share * (rate - codec.rate);
  codec.ratio += share * (ratio - codec.ratio);
}

void CodecChoice::tried_all() {
  since_try_ = 0;
  const bool was_off = encoding_ == 0;
  decide();
  if (!was_off) return;
  interval_ = encoding_ != 0 ? 0 : std::clamp(2 * interval_, kFirstInterval, kLongestInterval);
}

void CodecChoice::sent(std::uint64_t raw) { since_try_ += raw; }

void CodecChoice::measured(double link_rate, double raw_rate, bool full) {
  if (!adaptive_ || link_rate <= 0) return;
  full_windows_ = full ? full_windows_ + 1 : 0;
  if (resume_ != 0) {
    // The plain window is over; what it shows counts as it is.
    link_rate_ = link_rate;
    full_ = full;
    encoding_ = resume_;
    resume_ = 0;
    const std::uint16_t before = encoding_;
    decide();
    patience_ = encoding_ == before ? std::min(2 * patience_, kLongestPatience) : kFirstPatience;
    if (!full) encoding_ = 0;  // the thread is what was waited for, with less to do
    return;
  }
  full_ = full;
  if (encoding_ != 0) note_share(raw_rate, full);
  if (encoding_ == 0 || full) {
    link_rate_ = link_rate_ > 0 ? link_rate_ + kNewShare * (link_rate - link_rate_) : link_rate;
    idle_windows_ = 0;
  } else {
    link_rate_ = std::max(link_rate_, link_rate);
    if (raw_rate < link_rate_) {
      // The codec was to be faster than this.
      encoding_ = 0;
      interval_ = std::clamp(2 * interval_, kFirstInterval, kLongestInterval);
      since_try_ = 0;
      return;
    }
    if (++idle_windows_ >= patience_) {
      idle_windows_ = 0;
      resume_ = encoding_;
      encoding_ = 0;
      return;
    }
  }
  if (encoding_ != 0) decide();
}

void CodecChoice::decide() {
  if (encoding_ == 0 && !full_) return;
  encoding_ = better_codec(encoding_, link_rate_, {lz4_.rate * share_, lz4_.ratio},
                           {zstd_.rate * share_, zstd_.ratio});
}

void CodecChoice::note_share(double raw_rate, bool full) {
  if (full) {
    share_ += kForget * (1 - share_);
    return;
  }
  const double alone = thread_rate(figures(encoding_));
  if (alone <= 0) return;
  share_ += kNewShare * (std::clamp(raw_rate / alone, kLeastShare, 1.0) - share_);
}

}  // namespace memferry::wire
