#include "fault/pager.h"

#include <algorithm>

#include "os/sys_error.h"

namespace memferry {
namespace {

std::uint64_t wanted_features(bool huge) {
  // Without it a mapping that fails is put over pages that are lost.
  const Userfaultfd::Offer offer = Userfaultfd::probe();
  return (offer.features & abi::kUffdFeaturePoison) |
         (huge ? UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS : 0);
}

}  // namespace

Pager::Pager(std::vector<ArrivalMap*> maps, std::function<void(std::string, std::string)> broken)
    : maps_(std::move(maps)), broken_(std::move(broken)), attached_(maps_.size()), children_(maps_.size()) {
  bool huge = false;
  for (ArrivalMap* const map : maps_) {
    huge_.push_back(HugeMemory::of(*map));
    huge = huge || huge_.back();
  }
  const auto ours = [](const ArrivalMap* map) { return !map->region().owner(); };
  // Not one for faults of user code alone: system calls on a missing page would fail with EFAULT.
  if (std::any_of(maps_.begin(), maps_.end(), ours)) own_ = Userfaultfd::open(wanted_features(huge), false);
  if (own_ && (own_->features() & abi::kUffdFeaturePoison) == 0) failing_.emplace();
  try {
    take_attached();
    thread_.start("mf-faults", [this](WorkerThread& self) { run(self); });
  } catch (...) {
    // Who touches what was registered by then would wait for nobody.
    unregister_attached();
    let_go_attached();
    throw;
  }
}

Pager::~Pager() { stop(); }

Userfaultfd& Pager::uffd_of(std::uint32_t region) {
  Region& memory = maps_[region]->region();
  return memory.owner() ? *memory.uffd() : *own_;
}

void Pager::set_router(Router router) {
  // The thread runs already: what it does for a fault starts with this mutex.
  const std::lock_guard lock(mutex_);
  router_ = std::move(router);
}

void Pager::serve() {
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    if (!maps_[region]->region().owner()) register_memory(region);
    if (huge_[region]) huge_[region]->open();
  }
  serve_attached();
}

void Pager::register_memory(std::uint32_t region) {
  const ArrivalMap& map = *maps_[region];
  const RegisterMode mode = huge_[region] ? huge_[region]->mode() : RegisterMode::kMissing;
  map.for_each_run({PageNumber{0}, map.pages()}, [&](PageRun part) {
    uffd_of(region).register_range(map.region().owner_address(part.first), part.count * map.page_size(),
                                   mode);
  });
}

bool Pager::lately(const std::atomic<Clock::rep>& last) {
  const Clock::rep at = last.load(std::memory_order_relaxed);
  return at != 0 && Clock::now().time_since_epoch() - Clock::duration(at) < kLately;
}

bool Pager::faulted_lately() const { return lately(last_request_); }

bool Pager::strayed_lately() const { return lately(last_stray_); }

void Pager::finish() {
  deliver_all();
  // Letting go of what is still missing would make zeros of it.
  if (broken_once_.load()) throw SystemError("a page could not be installed", EIO);
  letting_go_.store(true);
  for (std::uint32_t region = 0; region < maps_.size(); ++region) {
    const ArrivalMap& map = *maps_[region];
    map.for_each_run({PageNumber{0}, map.pages()}, [&](PageRun part) {
      uffd_of(region).unregister(map.region().owner_address(part.first), part.count * map.page_size());
    });
  }
  stop();
}

void Pager::stop() {
  deliverer_.stop();
  thread_.stop();
  bool poisoned = false;
  {
    const std::lock_guard lock(mutex_);
    poisoned = poisoning_;
  }
  if (serving() && poisoned) give_up_rooms();
  if (!serving() || poisoned) {
    // Nothing was ever served: there is no guest here, and whoever waits in its memory need not. Or what is missing
    // fails by now: the rest (zeros that nobody has read, what the owner has dropped) is ordinary memory, and would be
    // waited for in vain, since the owner keeps its userfaultfd.
    unregister_attached();
  }
  serving_.store(false, std::memory_order_release);
  if (own_) own_->close();
  failing_.reset();  // what was put over lost pages stays; a stopped pager may be kept for long
  let_go_attached();
}

std::chrono::nanoseconds Pager::longest_wait() const {
  const Clock::time_point now = Clock::now();
  const std::lock_guard lock(mutex_);
  return now - waiting_.oldest_at_source(now, false);
}

std::chrono::nanoseconds Pager::longest_probe() const {
  const Clock::time_point now = Clock::now();
  const std::lock_guard lock(mutex_);
  return now - waiting_.oldest_at_source(now, true);
}

void Pager::break_off(const char* code, const std::string& message) {
  if (!broken_once_.exchange(true)) broken_(code, message);
}

}  // namespace memferry
