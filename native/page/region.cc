#include "page/region.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <utility>

#include "os/mapping.h"
#include "os/process_maps.h"

namespace memferry {

void Region::check_extents(const std::vector<Extent>& extents, std::uint64_t capacity_bytes,
                           std::uint64_t page_size) {
  if (extents.empty()) throw std::invalid_argument("a region needs at least one extent");
  std::vector<Extent> sorted;
  for (const Extent& extent : extents) {
    if (extent.start.value % page_size != 0 || extent.bytes % page_size != 0) {
      throw std::invalid_argument("a region's extents must start and end on page boundaries");
    }
    const bool last = &extent == &extents.back();
    // A memory that starts empty and grows is fine; an empty extent in the middle is a mistake.
    if (extent.bytes == 0 && !last) throw std::invalid_argument("a region's extent is empty");
    const std::uint64_t reach = last ? capacity_bytes : extent.bytes;
    if (extent.start.value + reach < extent.start.value) {
      throw std::invalid_argument("a region's extent wraps around the address space");
    }
    sorted.push_back({extent.start, reach});
  }
  if (capacity_bytes < extents.back().bytes || capacity_bytes % page_size != 0 || capacity_bytes == 0) {
    throw std::invalid_argument(
        "a region's capacity must be whole pages and at least its last extent's length");
  }
  std::sort(sorted.begin(), sorted.end(), [](const Extent& a, const Extent& b) { return a.start < b.start; });
  for (std::size_t i = 1; i < sorted.size(); ++i) {
    if (sorted[i - 1].start.value + sorted[i - 1].bytes > sorted[i].start.value) {
      throw std::invalid_argument("a region's extents overlap");
    }
  }
}

std::shared_ptr<Region> Region::allocate(std::uint64_t bytes) {
  if (bytes == 0 || bytes % system_page_size() != 0) {
    throw std::invalid_argument("a region's length must be whole pages");
  }
  Mapping mapping = Mapping::anonymous(bytes);
  std::shared_ptr<Region> region(
      new Region({Extent{mapping.start(), bytes}}, bytes, true, system_page_size()));
  (void)mapping.release();
  return region;
}

std::shared_ptr<Region> Region::adopt(const std::vector<Extent>& extents, std::uint64_t capacity_bytes,
                                      std::uint64_t page_size) {
  if (page_size == 0) page_size = system_page_size();
  if (!std::has_single_bit(page_size) || page_size < system_page_size())
    throw std::invalid_argument("a region's page size must be a power of two, and the system's at least");
  check_extents(extents, capacity_bytes, page_size);
  return std::shared_ptr<Region>(new Region(extents, capacity_bytes, false, page_size));
}

Region::Region(const std::vector<Extent>& extents, std::uint64_t capacity_bytes, bool owned,
               std::uint64_t page_size)
    : page_size_(page_size), owned_(owned) {
  const std::uint64_t growth_bytes = capacity_bytes - extents.back().bytes;
  // Neighbours become one, so that runs across their border stay contiguous.
  for (const Extent& extent : extents) {
    if (!extents_.empty() && extents_.back().start.value + extents_.back().bytes == extent.start.value) {
      extents_.back().bytes += extent.bytes;
    } else {
      extents_.push_back(extent);
    }
  }
  std::uint64_t pages = 0;
  for (const Extent& extent : extents_) {
    first_page_.push_back(pages);
    pages += extent.bytes / page_size_;
  }
  pages_.store(pages, std::memory_order_release);
  capacity_pages_ = pages + growth_bytes / page_size_;
}

Region::~Region() {
  leave_turn();
  if (owned_) ::munmap(Address{extents_.front().start.value}.pointer(), extents_.front().bytes);
}

bool Region::claim() {
  if (claimed_.exchange(true)) return false;
  await_glances();
  return true;
}

void Region::begin_arrival() {
  arrivals_.fetch_add(1);
  await_glances();
}

void Region::await_glances() {
  for (std::uint32_t seen = glances_.load(); seen != 0; seen = glances_.load()) glances_.wait(seen);
}

// Counted first, looked at afterwards; whoever moves the region does it the other way round. So one of the two sees the
// other, whatever the order. (Test: PageSampler.LooksAwayWhileTheRegionIsOnItsWay.)
bool Region::begin_glance() {
  glances_.fetch_add(1);
  if (!claimed_.load() && arrivals_.load() == 0) return true;
  end_glance();
  return false;
}

void Region::end_glance() {
  if (glances_.fetch_sub(1) == 1) glances_.notify_all();
}

void Region::grow(std::uint64_t pages) {
  std::uint64_t former = pages_.load(std::memory_order_acquire);
  do {
    if (pages < former || pages > capacity_pages_) {
      throw std::invalid_argument("a region neither shrinks nor grows beyond its capacity");
    }
  } while (!pages_.compare_exchange_weak(former, pages, std::memory_order_acq_rel));
}

std::vector<Extent> Region::extents_for(std::uint64_t pages) const {
  std::vector<Extent> extents = extents_;
  extents.back().bytes = (pages - first_page_.back()) * page_size_;
  return extents;
}

std::vector<Extent> Region::extents() const { return extents_for(pages()); }
std::vector<Extent> Region::capacity_extents() const { return extents_for(capacity_pages_); }

std::size_t Region::extent_of(PageNumber page) const {
  const auto after = std::upper_bound(first_page_.begin(), first_page_.end(), page.value);
  return static_cast<std::size_t>(after - first_page_.begin()) - 1;
}

OwnerAddress Region::owner_address(PageNumber page) const {
  if (page.value >= pages()) throw std::out_of_range("page outside the region");
  const std::size_t index = extent_of(page);
  return extents_[index].start.plus((page.value - first_page_[index]) * page_size_);
}

Address Region::address(PageNumber page) const { return Address::of(contiguous({page, 1}).data()); }

PageRun Region::contiguous_run(PageRun run) const {
  const std::uint64_t now = pages();
  if (run.first.value >= now) throw std::out_of_range("page outside the region");
  const std::size_t index = extent_of(run.first);
  const std::uint64_t end = index + 1 < first_page_.size() ? first_page_[index + 1] : now;
  return {run.first, std::min(run.count, end - run.first.value)};
}

std::span<std::byte> Region::contiguous(PageRun run) const {
  const PageRun part = contiguous_run(run);
  const auto bytes = static_cast<std::size_t>(part.count * page_size_);
  if (!owner_) return {Address{owner_address(part.first).value}.pointer(), bytes};
  if (!viewed_.load(std::memory_order_acquire))
    throw std::logic_error("private memory of another process has no view");
  const std::size_t index = extent_of(part.first);
  std::byte* const base =
      memory_ ? views_[index].data() : views_.front().data() + first_page_[index] * page_size_;
  return {base + (part.first.value - first_page_[index]) * page_size_, bytes};
}

void Region::for_each_run_between(OwnerAddress start, OwnerAddress end,
                                  const std::function<void(PageRun)>& visit) const {
  const std::vector<Extent> parts = extents();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::uint64_t base = parts[i].start.value;
    const std::uint64_t from = std::max(start.value, base);
    const std::uint64_t to = std::min(end.value, base + parts[i].bytes);
    if (from >= to) continue;
    const std::uint64_t first = first_page_[i] + (from - base) / page_size_;
    visit({PageNumber{first}, first_page_[i] + (to - base + page_size_ - 1) / page_size_ - first});
  }
}

std::optional<PageNumber> Region::page_at(OwnerAddress address) const {
  for (std::size_t i = 0; i < extents_.size(); ++i) {
    if (address < extents_[i].start) continue;
    const std::uint64_t page = (address.value - extents_[i].start.value) / page_size_;
    const std::uint64_t end = i + 1 < first_page_.size() ? first_page_[i + 1] : capacity_pages_;
    if (page < end - first_page_[i]) return PageNumber{first_page_[i] + page};
  }
  return std::nullopt;
}

std::unique_ptr<Region::User> Region::enlist(std::function<void()> stop) {
  const std::lock_guard lock(users_mutex_);
  if (retired_.load(std::memory_order_acquire)) return nullptr;
  // What may fail for want of memory comes before the token, whose destructor takes the lock that is held here.
  users_.reserve(users_.size() + 1);
  std::unique_ptr<User> user(new User(shared_from_this(), next_key_));
  users_.push_back(Enlisted{next_key_, std::move(stop), false, {}});
  ++next_key_;
  return user;
}

// The race that the wait below is for: retire() has chosen this user and left the lock to call its stop,
// while the user's owner drops the token and then itself. (Test: RegionTest.DroppingATokenWaitsForItsStop.)
Region::User::~User() {
  std::unique_lock lock(region_->users_mutex_);
  const auto find = [this] {
    return std::find_if(region_->users_.begin(), region_->users_.end(),
                        [this](const Enlisted& user) { return user.key == key_; });
  };
  region_->users_changed_.wait(lock, [&] {
    const auto user = find();
    return user == region_->users_.end() || user->stopping_on == std::thread::id() ||
           user->stopping_on == std::this_thread::get_id();
  });
  if (const auto user = find(); user != region_->users_.end()) region_->users_.erase(user);
  region_->users_changed_.notify_all();
}

void Region::retire() {
  std::unique_lock lock(users_mutex_);
  retired_.store(true, std::memory_order_release);
  for (;;) {
    const auto next = std::find_if(users_.begin(), users_.end(), [](const Enlisted& user) {
      return !user.stopped && user.stopping_on == std::thread::id();
    });
    if (next == users_.end()) break;
    const std::uint64_t key = next->key;
    const std::function<void()> stop = next->stop;
    next->stopping_on = std::this_thread::get_id();
    lock.unlock();
    stop();
    lock.lock();
    // The stop may have dropped its own token, and others may have come and gone: look again.
    for (Enlisted& user : users_) {
      if (user.key != key) continue;
      user.stopped = true;
      user.stopping_on = {};
    }
    users_changed_.notify_all();
  }
  // What another retire() is stopping right now.
  users_changed_.wait(lock, [this] {
    return std::all_of(users_.begin(), users_.end(), [](const Enlisted& user) { return user.stopped; });
  });
  lock.unlock();
  leave_turn();
}

RegionUse::RegionUse(const std::shared_ptr<Region>& region, const char* operation) {
  user_ = region->enlist([this] {
    revoked_.store(true, std::memory_order_release);
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return over_; });
  });
  if (!user_) throw RegionGone(operation);
}

RegionUse::~RegionUse() {
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
    changed_.notify_all();
  }
  user_.reset();
}

}  // namespace memferry
