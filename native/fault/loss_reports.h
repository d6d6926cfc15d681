// Pages that cannot be had: reported first, poisoned then, and until that whoever touches one waits. One report at a time,
// however much is lost: what is lost before the pages of the last one are poisoned is in the next. So pages that fail one
// by one, millions of them where a file was cut off, are a few events.
//
// Life: lose() -> a report -> its grace, or acknowledge() -> poison(), by whoever looks at due() -> perhaps the next one.
//
// Threads: lose(), acknowledge() and stop() from any; due(), poison() and forget() from the pager's.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "page/bitmap.h"

namespace memferry {

class LossReports {
 public:
  using Clock = std::chrono::steady_clock;
  struct Config {
    std::uint64_t pages = 0;
    std::chrono::milliseconds grace{250};
    // One that is no loss any more: it came after all, or its owner has discarded it.
    std::function<bool(PageNumber page)> needless;
    std::function<void(const std::string& why, std::vector<PageRun> lost)> report;  // must not block
    std::function<void()> due_changed = [] {};
  };
  explicit LossReports(Config config);

  // False when it was lost before, or is no loss.
  bool lose(PageNumber page, const std::string& why);
  [[nodiscard]] bool lost(PageNumber page) const { return lost_.test(page); }
  [[nodiscard]] std::uint64_t count() const { return lost_.count(); }
  // They are no loss any more; gives how many of them were one.
  std::uint64_t forget(PageRun run);
  // What was reported has been told to whom it concerns.
  void acknowledge();
  // When poison() is to be called; nullopt: nothing waits for it.
  [[nodiscard]] std::optional<Clock::time_point> due() const;
  // Poisons what was reported, and reports what was lost since.
  void poison(const std::function<void(PageRun run)>& each);
  // No more reports.
  void stop() { stopped_.store(true, std::memory_order_release); }

 private:
  void report_locked();
  template <class Which, class Each>
  void for_each(Which which, Each each) const;

  const Config config_;
  AtomicBitmap lost_;
  AtomicBitmap told_;
  AtomicBitmap poisoned_;
  std::atomic<bool> stopped_{false};
  std::atomic<Clock::rep> poison_at_{0};  // since the clock's epoch; 0: nothing to poison
  std::mutex mutex_;                      // guards why_, and telling; held while the report is given
  std::string why_;
};

}  // namespace memferry
