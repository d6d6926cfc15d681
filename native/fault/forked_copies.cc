#include "fault/forked_copies.h"

#include <poll.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "os/sys_error.h"

namespace memferry {
namespace {

constexpr int kPruneMs = 1000;
// Children that live at once. One more fails in its missing pages too, but its own children would not.
constexpr std::size_t kMostKept = 256;

}  // namespace

// A private copy that waits would read zeros if it were let go of: it waits for as long as this process lives.
ForkedCopies::~ForkedCopies() {
  thread_.stop();
  if (shared_) return;
  for (const auto& each : kept_) {
    if (each->waits && !each->dead) (void)each->copy.release();
  }
}

void ForkedCopies::add(UniqueFd child) {
  auto kept = std::make_shared<Kept>();
  try {
    kept->copy = std::make_unique<ForkedCopy>(child);
    missing_([&](OwnerAddress start, std::uint64_t bytes) {
      kept->waits = !kept->copy->poison(start, bytes, page_bytes_(start)) || kept->waits;
    });
  } catch (const SystemError&) {
    kept->waits = true;
    if (!kept->copy) return;  // it was no userfaultfd
  }
  if (!shared_ && !kept->waits) {
    // Children that it had meanwhile.
    for (UniqueFd& next : kept->copy->serve([this](OwnerAddress at) { return around(at); }))
      add(std::move(next));
    return;
  }
  prune();
  {
    const std::lock_guard lock(mutex_);
    if (kept_.size() >= kMostKept && !kept->waits) return;
    kept_.push_back(std::move(kept));
    if (!started_) thread_.start("mf-forked", [this](WorkerThread& self) { run(self); });
    started_ = true;
  }
  thread_.wake();
}

std::size_t ForkedCopies::kept() const {
  const std::lock_guard lock(mutex_);
  return kept_.size();
}

void ForkedCopies::prune() {
  std::optional<OwnerAddress> any;
  missing_([&](OwnerAddress start, std::uint64_t) { any = start; });
  const std::lock_guard lock(mutex_);
  // Once nothing is missing of a file whoever is let go of has ordinary memory. A private copy that waits never gets
  // what it lacks.
  std::erase_if(kept_, [&](const auto& each) {
    return each->dead || (any ? each->copy->ended(*any) : shared_ || !each->waits);
  });
}

void ForkedCopies::run(WorkerThread& self) {
  while (!self.stopping()) {
    std::vector<pollfd> waiting{pollfd{self.wake_fd(), POLLIN, 0}};
    std::vector<std::shared_ptr<Kept>> watched;
    std::vector<std::shared_ptr<Kept>> fresh;
    {
      const std::lock_guard lock(mutex_);
      for (const auto& each : kept_) {
        // One that waits is not read: its faults would be lost.
        if (each->waits || each->dead) continue;
        waiting.push_back({each->copy->fd(), POLLIN, 0});
        watched.push_back(each);
        // Of what was read while it was made to fail no event will tell.
        if (std::exchange(each->fresh, false)) fresh.push_back(each);
      }
    }
    for (const auto& each : fresh) look(*each);
    if (!fresh.empty()) continue;
    const int ready = ::poll(waiting.data(), waiting.size(), kPruneMs);
    if (self.stopping()) return;
    if ((waiting[0].revents & POLLIN) != 0) self.drain_wake();
    if (ready == 0) prune();
    for (std::size_t i = 1; i < waiting.size(); ++i) {
      if (waiting[i].revents != 0) look(*watched[i - 1]);
    }
  }
}

ForkedCopy::Around ForkedCopies::around(OwnerAddress at) const {
  const std::uint64_t page = page_bytes_(at);
  ForkedCopy::Around found{OwnerAddress{at.value / page * page}, page, false};
  missing_([&](OwnerAddress start, std::uint64_t bytes) {
    found.missing = found.missing || (start <= found.start && found.start < start.plus(bytes));
  });
  return found;
}

void ForkedCopies::look(Kept& kept) {
  try {
    for (UniqueFd& next : kept.copy->serve([this](OwnerAddress at) { return around(at); }))
      add(std::move(next));
  } catch (const SystemError&) {
    kept.dead = true;
  }
}

}  // namespace memferry
