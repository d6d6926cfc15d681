// Whether it pays to look for pages that the servers hold already, how far ahead of the sending, and how long a page
// may wait for another guest that sends the same. The law is that none of this lengthens eviction.
//
// Pure.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>

namespace memferry {

struct DedupMeasured {
  std::optional<double> link_bytes_per_second;  // what receivers acknowledge; not known in the first moments
  double hash_bytes_per_second = 0;  // while hashing, by the clock: less when the CPU is wanted elsewhere
  std::uint64_t examined_pages = 0;
  std::uint64_t hits = 0;  // held, or on its way from somebody else
};

// Of pages looked at before anything is known of the link.
inline constexpr std::uint64_t kFirstLookPages = 1024;
// And of each sample, where it does not pay: whether it does by now.
inline constexpr std::uint64_t kDedupSamplePages = 16;
// A hash so many times as fast as the link takes less than a quarter of a CPU, and is always ahead of the sending.
inline constexpr double kFarFaster = 4;
// Between that and a link that is faster than the hash it pays by what is found: each page found saves its sending,
// each page looked at costs its hashing, on a CPU that the sending may want itself.
inline constexpr double kGainOverCost = 2;

[[nodiscard]] inline bool dedup_pays(const DedupMeasured& measured) {
  if (!measured.link_bytes_per_second) return measured.examined_pages < kFirstLookPages;
  const double link = *measured.link_bytes_per_second;
  if (measured.hash_bytes_per_second <= 0) return true;  // nothing was hashed yet
  if (measured.hash_bytes_per_second >= kFarFaster * link) return true;
  if (measured.examined_pages == 0) return true;
  const double found = static_cast<double>(measured.hits) / static_cast<double>(measured.examined_pages);
  return found * measured.hash_bytes_per_second >= kGainOverCost * link;
}

// How many pages that are still to be sent plainly may have been looked at: what the link takes in a quarter of a
// second. Further ahead, one guest would be given everything to send that others have too.
inline constexpr std::chrono::milliseconds kLead{250};
inline constexpr std::uint64_t kLeastLeadPages = 256;
inline constexpr std::uint64_t kMostLeadPages = 16384;
[[nodiscard]] inline std::uint64_t dedup_lead_pages(std::optional<double> link_bytes_per_second,
                                                    std::uint64_t page_size) {
  if (!link_bytes_per_second) return kFirstLookPages;
  const double bytes = *link_bytes_per_second * std::chrono::duration<double>(kLead).count();
  return std::clamp(static_cast<std::uint64_t>(bytes / static_cast<double>(page_size)), kLeastLeadPages,
                    kMostLeadPages);
}

// Once nothing else is left to send, how long to wait for pages that somebody else sends: a quarter of the time that
// references have saved by then, so that waiting in vain is paid for already.
inline constexpr std::chrono::milliseconds kLongestWait{200};
// For pages whose equals this source has sent itself, the acknowledgement of those has to be waited for anyway: for a
// moment, and no longer than a quarter of what sending them would take.
inline constexpr std::chrono::milliseconds kLongestTwinWait{40};
[[nodiscard]] inline std::chrono::microseconds dedup_wait(std::uint64_t saved_bytes, std::uint64_t twin_bytes,
                                                          std::optional<double> link_bytes_per_second) {
  using std::chrono::microseconds;
  if (!link_bytes_per_second || *link_bytes_per_second <= 0) {
    return twin_bytes > 0 ? microseconds(kLongestTwinWait) : microseconds{0};
  }
  const auto quarter_of = [&](std::uint64_t bytes) {
    return microseconds(
        static_cast<std::int64_t>(static_cast<double>(bytes) / *link_bytes_per_second / 4 * 1e6));
  };
  return std::max(std::min(quarter_of(saved_bytes), microseconds(kLongestWait)),
                  std::min(quarter_of(twin_bytes), microseconds(kLongestTwinWait)));
}

// How many pages to look at in one go. Those that are found need no sending, so of them more are looked at than may wait
// to be sent plainly; and each time costs two or three answers of servers, which a full link or a busy CPU holds up, so
// that the longer the last time took the more it is now.
inline constexpr std::uint64_t kLeastLookPages = 512;  // a few milliseconds of hashing
inline constexpr std::uint64_t kMostLookPages = 4096;
inline constexpr std::chrono::milliseconds kLookEvery{10};  // what that many can be looked at in
inline constexpr double kLeastNotFound = 0.125;
[[nodiscard]] inline std::uint64_t dedup_look_pages(const DedupMeasured& measured, std::uint64_t lead_pages,
                                                    std::uint64_t unsent_pages,
                                                    std::chrono::nanoseconds since_last) {
  const double times = std::chrono::duration<double>(since_last) / std::chrono::duration<double>(kLookEvery);
  const auto most = static_cast<std::uint64_t>(
      std::clamp(times * kLeastLookPages, double{kLeastLookPages}, double{kMostLookPages}));
  const double found = measured.examined_pages == 0 ? 0
                                                    : static_cast<double>(measured.hits) /
                                                          static_cast<double>(measured.examined_pages);
  const std::uint64_t room = lead_pages - std::min(lead_pages, unsent_pages);
  return std::min(
      most, static_cast<std::uint64_t>(static_cast<double>(room) / std::max(1 - found, kLeastNotFound)));
}

// A round that is over sooner than anything could be found and asked for.
inline constexpr std::chrono::milliseconds kShortRound{100};
[[nodiscard]] inline bool dedup_round_is_long(std::uint64_t content_bytes,
                                              std::optional<double> link_bytes_per_second) {
  return !link_bytes_per_second ||
         static_cast<double>(content_bytes) >=
             *link_bytes_per_second * std::chrono::duration<double>(kShortRound).count();
}

// How long pages have been waited for in one round or push, with nothing else left to send. What turns up in between
// (a page that was given up, and is sent) does not begin it anew.
class DedupWaiting {
 public:
  using Clock = std::chrono::steady_clock;
  // `since`: when nothing was left to send. True: longer than `allowed` by now.
  [[nodiscard]] bool too_long(Clock::time_point since, Clock::time_point now, Clock::duration allowed) {
    if (!since_) since_ = since;
    return waited_ + (now - *since_) > allowed;
  }
  // Nothing waits, or there is something to send.
  void interrupted(Clock::time_point now) {
    if (since_) waited_ += now - *since_;
    since_.reset();
  }

 private:
  Clock::duration waited_{};
  std::optional<Clock::time_point> since_;
};

}  // namespace memferry
