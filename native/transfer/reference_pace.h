// Whether it pays on one connection to hash pages and to send references for those that the destination has: from what
// the link takes, what is hashed in a second by the clock, and how much is found.
//
//   raw rate with references = min(what is hashed in a second, what the link takes / what a raw byte becomes)
//
// A link that is faster than the thread never fills, and nothing pays on it. While it does not pay, a few pages are
// hashed now and then to know what would be found. The beginning is made with references, so that little that is known
// goes plainly; where the link does not fill and its rate is not known, plain windows show whether it would.
//
// Pure: no clock, no socket, no bytes. The owner serialises.
#pragma once

#include <algorithm>
#include <cstdint>

namespace memferry {

class ReferencePace {
 public:
  static constexpr double kTurnOn = 1.08;
  static constexpr double kStay = 1.03;
  static constexpr std::uint64_t kSamplePages = 16;
  static constexpr std::uint64_t kFullInterval = 1ULL
                                                 << 20;  // of raw bytes between two samples on a full link
  static constexpr std::uint64_t kIdleInterval = 64ULL << 20;  // and on one that is faster than the thread
  static constexpr std::uint64_t kMemoryPages = 4096;  // over so many pages what was found is averaged
  static constexpr std::uint64_t kSampleMemoryPages = 64;
  // Before so many were looked at nothing is said of the others: with a limit the first chunk may be a few pages.
  static constexpr std::uint64_t kEnoughPages = 256;
  // Of the time that a window without a full link has: with less hashing than that, something else is waited for.
  static constexpr double kHashIsWaitedFor = 0.5;
  static constexpr unsigned kProbeWindows = 2;
  static constexpr unsigned kBadWindows = 3;
  static constexpr unsigned kFirstPatience = 64;  // windows without a full link before a plain one
  static constexpr unsigned kLongestPatience = 1024;
  static constexpr double kReferenceRatio = 32.0 / 4096;

  // Whether every page of the next batch is hashed.
  [[nodiscard]] bool looks() const { return on_; }
  // How many pages of it are hashed just to know.
  [[nodiscard]] std::uint64_t sample() const {
    return !on_ && since_sample_ >= (full_ ? kFullInterval : kIdleInterval) ? kSamplePages : 0;
  }
  // So many pages took so long, and so many of them the destination has.
  void looked(std::uint64_t pages, std::uint64_t found, double bytes, double seconds) {
    if (pages == 0) return;
    const double share = static_cast<double>(found) / static_cast<double>(pages);
    looked_ = std::min(looked_ + pages, on_ ? kMemoryPages : kSampleMemoryPages);
    found_ += weight(pages) * (share - found_);
    if (seconds > 0) {
      const double rate = bytes / seconds;
      hash_rate_ = hash_rate_ > 0 ? hash_rate_ + 0.1 * (rate - hash_rate_) : rate;
    }
    if (!on_) since_sample_ = 0;
  }
  // So many of what was found were not there after all.
  void refused(std::uint64_t pages) {
    const double of = static_cast<double>(on_ ? std::max(looked_, kEnoughPages) : kMemoryPages);
    found_ = std::max(0.0, found_ - static_cast<double>(pages) / of);
  }
  // So many bytes of pages were handed to the connection, by reference or not.
  void sent(std::uint64_t raw_bytes) { since_sample_ += raw_bytes; }
  // A window of time: what the link took, the pages that were handed to it (both bytes/s), whether it was waited for,
  // and what a byte of a page that goes plainly becomes (compressed).
  void measured(double link_rate, double raw_rate, bool full, double plain_ratio) {
    full_ = full;
    if (full) {
      link_rate_ = link_rate;
      idle_ = bad_ = 0;
      patience_ = kFirstPatience;
    }
    plain_ratio_ = plain_ratio;
    if (on_) {
      measured_on(raw_rate, full);
    } else {
      measured_off(full);
    }
  }

  // What would get through of pages. Exposed for tests.
  [[nodiscard]] double with_references() const {
    const double becomes = plain_ratio_ * (1 - found_) + kReferenceRatio * found_;
    const double by_link = link_rate_ / std::max(becomes, kReferenceRatio);
    return hash_rate_ > 0 ? std::min(hash_rate_, by_link) : by_link;
  }
  [[nodiscard]] double plain() const { return link_rate_ / plain_ratio_; }

 private:
  void measured_on(double raw_rate, bool full) {
    if (full) {
      if (looked_ >= kEnoughPages && with_references() < kStay * plain()) turn(false);
      return;
    }
    if (raw_rate < kHashIsWaitedFor * hash_rate_)
      return;  // a guest with little to send, a CPU that others have
    if (link_rate_ <= 0) {
      probe_ = kProbeWindows;
      turn(false);
    } else if (raw_rate < kStay * plain()) {
      if (++bad_ >= kBadWindows) turn(false);
    } else if (++idle_ >= patience_) {
      idle_ = 0;
      patience_ = std::min(2 * patience_, kLongestPatience);
      probe_ = 1;
      turn(false);
    }
  }
  void measured_off(bool full) {
    if (full) {
      probe_ = 0;
      if (looked_ > 0 && with_references() >= kTurnOn * plain()) turn(true);
    } else if (probe_ > 0 && --probe_ == 0) {
      link_rate_ = 0;  // faster than was thought
    }
  }
  // Of so many pages in what is remembered.
  [[nodiscard]] double weight(std::uint64_t pages) const {
    return static_cast<double>(pages) / static_cast<double>(std::max(pages, looked_));
  }
  void turn(bool on) {
    on_ = on;
    looked_ = std::min(looked_, kSampleMemoryPages);
    bad_ = idle_ = 0;
    since_sample_ = 0;
  }

  bool on_ = true;
  bool full_ = false;
  std::uint64_t looked_ = 0;  // pages that found_ is of
  double found_ = 0;
  double hash_rate_ = 0;
  double link_rate_ = 0;  // 0: not known
  double plain_ratio_ = 1;
  std::uint64_t since_sample_ = 0;
  unsigned probe_ = 0;  // plain windows that are still to show whether the link fills
  unsigned bad_ = 0;
  unsigned idle_ = 0;
  unsigned patience_ = kFirstPatience;
};

}  // namespace memferry
