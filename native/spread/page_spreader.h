// Brings what many guests have into a host's share ahead of those that come: asks each directory server what is popular,
// takes the best that fits into the budget, fetches what is missing at a bounded rate, and lowers the scores of what is
// popular no longer, so that it leaves first. A page is put into the share by its own hash of it.
//
// Memory: 48 bytes for each page that fits into the budget, while a round lasts twice that.
//
// Threads: one of its own; calls from any.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "os/unique_fd.h"
#include "os/worker_thread.h"
#include "share/page_share.h"
#include "spread/directory_link.h"
#include "wire/bandwidth_cap.h"

namespace memferry {

struct SpreaderConfig {
  std::shared_ptr<PageShare> share;
  std::chrono::milliseconds interval{30'000};  // from the end of a round to the next one
  std::uint64_t bandwidth = 0;                 // bytes/s of pages; 0: no limit
};

struct SpreaderStats {
  std::uint64_t rounds = 0;
  std::uint64_t popular = 0;  // in the last round, of all servers, as many as fit
  std::uint64_t held = 0;     // of these, in the share
  std::uint64_t fetched = 0;
  std::uint64_t refused = 0;  // that the share had no room for after all, or that came wrong
  std::uint64_t bytes = 0;    // on the wire
};

class PageSpreader {
 public:
  explicit PageSpreader(SpreaderConfig config);
  ~PageSpreader();
  PageSpreader(const PageSpreader&) = delete;
  PageSpreader& operator=(const PageSpreader&) = delete;

  // The next round begins at once.
  void set_directories(std::vector<Directory> directories);
  [[nodiscard]] std::vector<bool> lost() const { return links_.lost(); }
  [[nodiscard]] SpreaderStats stats() const;
  // Ends its thread. Twice is fine.
  void close();

 private:
  struct Popular {
    wire::ContentName name{};
    std::uint32_t score = 0;
    std::uint32_t link = 0;
  };
  void run();
  void round();
  // The best that there are, at most `most`; best first. False: not all servers were heard to the end.
  bool ask(DirectoryLinks::Links& links, std::size_t most);
  void score_what_is_here();
  void fetch(DirectoryLinks::Links& links);
  // False when the link is lost.
  bool fetch_some(DirectoryLink& link, std::span<const Popular> some);
  [[nodiscard]] std::size_t room() const;

  const SpreaderConfig config_;
  const UniqueFd cancel_;
  DirectoryLinks links_;
  wire::BandwidthCap cap_;
  // The thread's own:
  std::uint64_t tag_ = 0;
  std::vector<Popular> popular_;
  std::vector<ContentDigest> here_;  // by name

  mutable std::mutex mutex_;  // guards stats_
  SpreaderStats stats_;
  std::mutex close_mutex_;
  WorkerThread thread_;
};

}  // namespace memferry
