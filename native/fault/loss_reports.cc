#include "fault/loss_reports.h"

#include <utility>

namespace memferry {

LossReports::LossReports(Config config)
    : config_(std::move(config)), lost_(config_.pages), told_(config_.pages), poisoned_(config_.pages) {}

bool LossReports::lose(PageNumber page, const std::string& why) {
  const bool before = lost_.set(page);
  // Discarded meanwhile, and read by nobody any more. (Who notes a discard does that first, and takes back a loss then.)
  if (config_.needless(page)) {
    lost_.clear(page);
    return false;
  }
  if (before) return false;
  const std::lock_guard lock(mutex_);
  why_ = why;
  if (poison_at_.load(std::memory_order_acquire) == 0) report_locked();
  return true;
}

std::uint64_t LossReports::forget(PageRun run) {
  poisoned_.clear_run(run);
  return lost_.clear_run(run);
}

void LossReports::report_locked() {
  if (stopped_.load(std::memory_order_acquire)) return;
  std::vector<PageRun> runs;
  const auto untold = [this](PageNumber page) { return !told_.test(page) && !config_.needless(page); };
  for_each(untold, [&](PageRun run) {
    told_.set_run(run);
    runs.push_back(run);
  });
  if (runs.empty()) return;
  config_.report(why_, std::move(runs));
  poison_at_.store((Clock::now() + config_.grace).time_since_epoch().count(), std::memory_order_release);
  config_.due_changed();
}

void LossReports::acknowledge() {
  Clock::rep at = poison_at_.load(std::memory_order_acquire);
  while (at != 0 && !poison_at_.compare_exchange_weak(at, 1, std::memory_order_acq_rel)) {
  }
  config_.due_changed();
}

std::optional<LossReports::Clock::time_point> LossReports::due() const {
  const Clock::rep at = poison_at_.load(std::memory_order_acquire);
  return at == 0 ? std::nullopt : std::optional(Clock::time_point(Clock::duration(at)));
}

void LossReports::poison(const std::function<void(PageRun run)>& each) {
  for_each([this](PageNumber page) { return told_.test(page) && !poisoned_.set(page); }, each);
  const std::lock_guard lock(mutex_);
  poison_at_.store(0, std::memory_order_release);
  report_locked();
}

// Runs of lost pages of which `which` is true.
template <class Which, class Each>
void LossReports::for_each(Which which, Each each) const {
  const PageNumber end{config_.pages};
  for (PageNumber from{0}; from < end;) {
    const auto run = lost_.next_set(from, end, config_.pages);
    if (!run) return;
    for (PageNumber page = run->first; page < run->end(); ++page.value) {
      if (!which(page)) continue;
      PageRun part{page, 1};
      while (part.end() < run->end() && which(part.end())) ++part.count;
      each(part);
      page = PageNumber{part.end().value - 1};
    }
    from = run->end();
  }
}

}  // namespace memferry
