#include "transfer/touch_ahead.h"

#include <sys/mman.h>

#include <algorithm>
#include <fstream>

#include "os/kernel_abi.h"

namespace memferry {
namespace {

constexpr std::uint64_t kStepBytes = 2ULL << 20;

std::uint64_t huge_page_bytes() {
  std::uint64_t bytes = 0;
  std::ifstream("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") >> bytes;
  return bytes;
}

}  // namespace

TouchAhead::TouchAhead(std::vector<ArrivalMap*> maps)
    : maps_(std::move(maps)), fronts_(new Front[maps_.size()]) {
  const std::uint64_t huge = huge_page_bytes();
  // Where huge pages are larger than what may lie ahead (arm64 with 64 KiB pages: 512 MiB), do without.
  huge_ = huge > 0 && huge <= kAheadBytes / 2;
  step_bytes_ = huge_ ? huge : kStepBytes;
  thread_.start("mf-touch", [this](WorkerThread& self) { run(self); });
}

void TouchAhead::arrived(std::uint32_t region, PageRun run) {
  Front& front = fronts_[region];
  const std::uint64_t end = run.end().value;
  std::uint64_t former = front.cursor.load(std::memory_order_relaxed);
  while (former < end && !front.cursor.compare_exchange_weak(former, end, std::memory_order_acq_rel)) {
  }
  const std::uint64_t half = kAheadBytes / 2 / maps_[region]->page_size();
  const bool due = end + half > front.touched.load(std::memory_order_acquire);
  if (due && former < end && !asked_.exchange(true)) thread_.wake();
}

void TouchAhead::run(WorkerThread& self) {
  while (!self.stopping()) {
    self.wait(-1);
    asked_.store(false);
    for (bool more = true; more && !self.stopping();) {
      more = false;
      for (std::size_t i = 0; i < maps_.size(); ++i) more = advance(i) || more;
    }
  }
}

bool TouchAhead::advance(std::size_t index) {
  ArrivalMap& map = *maps_[index];
  Front& front = fronts_[index];
  const std::uint64_t page_size = map.page_size();
  const std::uint64_t cursor = front.cursor.load(std::memory_order_acquire);
  const std::uint64_t window = kDenseBytes / page_size;
  if (window == 0 || cursor < window) return false;
  const PageRun behind{PageNumber{cursor - window}, window};
  const std::uint64_t received = map.received.count(behind);
  const std::uint64_t zeros = map.zero.count(behind);
  if (received < zeros || (received - zeros) * 4 < window * 3) return false;

  const std::uint64_t first = std::max(front.touched.load(std::memory_order_relaxed), cursor);
  const std::uint64_t limit = std::min(cursor + kAheadBytes / page_size, map.pages());
  if (first >= limit) return false;
  // Up to the next border of a step, so that huge pages can be had.
  const std::uint64_t address = map.region().address(PageNumber{first}).value;
  const std::uint64_t to_border = (step_bytes_ - address % step_bytes_) / page_size;
  const PageRun run{PageNumber{first}, std::min(std::max<std::uint64_t>(to_border, 1), limit - first)};
  if (map.present.count(run) < run.count) {
    bool touched = true;
    map.for_each_part(run, [&](std::span<std::byte> part, PageNumber) {
      if (huge_ && part.size() == step_bytes_) ::madvise(part.data(), part.size(), MADV_HUGEPAGE);
      if (::madvise(part.data(), part.size(), abi::kMadvPopulateWrite) != 0) touched = false;
    });
    // A failure is left to the thread that receives: it touches the memory itself, and can report.
    if (touched) map.present.set_run(run);
  }
  front.touched.store(run.end().value, std::memory_order_release);
  return run.end().value < limit;
}

}  // namespace memferry
