#include "transfer/known_pages.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>

namespace memferry {
namespace {

// Beside the reception, never instead of it. Not SCHED_IDLE: who closes a guest waits for the page in hand.
constexpr int kLowestPriority = 19;
// Published together: the lock is one that receiving threads take as well.
constexpr std::size_t kBatch = 64;

// A copy of our own memory that fails where a load would raise a signal: poisoned or unmapped pages.
bool copy_own_memory(const std::byte* from, std::span<std::byte> into) {
  const iovec local{into.data(), into.size()};
  const iovec remote{const_cast<std::byte*>(from), into.size()};
  return ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0) == static_cast<ssize_t>(into.size());
}

bool can_copy_own_memory() {
  const std::byte from{42};
  std::byte into{};
  return copy_own_memory(&from, std::span(&into, 1)) && into == from;
}

std::mutex& domains_mutex() {
  static std::mutex mutex;
  return mutex;
}

using Domain = std::pair<ContentKey, std::string>;

// What is in `all` and not in `told`, in the order of `all`.
std::vector<wire::KnownName> beyond(const std::vector<wire::KnownName>& all,
                                    std::vector<wire::KnownName> told) {
  std::sort(told.begin(), told.end());
  std::vector<wire::KnownName> rest;
  std::copy_if(all.begin(), all.end(), std::back_inserter(rest),
               [&](wire::KnownName name) { return !std::binary_search(told.begin(), told.end(), name); });
  return rest;
}

// Guarded by domains_mutex(). What the process's owner has set up: a handful.
std::map<Domain, std::weak_ptr<KnownPages>>& domains() {
  static std::map<Domain, std::weak_ptr<KnownPages>> all;
  return all;
}

}  // namespace

std::shared_ptr<KnownPages> KnownPages::of_domain(const ContentKey& key, const std::string& share_path) {
  const std::lock_guard lock(domains_mutex());
  auto& all = domains();
  for (auto it = all.begin(); it != all.end();) it = it->second.expired() ? all.erase(it) : std::next(it);
  auto& entry = all[{key, share_path}];
  std::shared_ptr<KnownPages> known = entry.lock();
  if (!known) entry = known = std::shared_ptr<KnownPages>(new KnownPages(key, share_path));
  return known;
}

KnownPages::KnownPages(const ContentKey& key, std::string share_path)
    : key_(key), hasher_(key), share_path_(std::move(share_path)), reads_memory_(can_copy_own_memory()) {
  hasher_thread_.start("mf-known", [this](WorkerThread&) { hash_arrivals(); });
  if (!share_path_.empty()) {
    loading_ = true;
    share_thread_.start("mf-share", [this](WorkerThread&) { load_share(); });
  }
}

KnownPages::~KnownPages() {
  {
    const std::scoped_lock lock(mutex_, queue_mutex_);
    stopping_ = true;
    hash_wanted_.notify_all();
    share_wanted_.notify_all();
  }
  hasher_thread_.stop();
  share_thread_.stop();
}

std::unique_ptr<KnownPages::Guest> KnownPages::join(std::vector<ArrivalMap*> maps) {
  auto memory = std::make_shared<Memory>(std::move(maps));
  const std::lock_guard lock(mutex_);
  memories_.push_back(memory);
  if (share_thread_.started()) {
    memory->share_given = share_names_;
    if (share_names_) memory->share_names.push_back(share_names_);
    loading_ = true;
    share_wanted_.notify_all();
  }
  return std::make_unique<Guest>(shared_from_this(), std::move(memory));
}

void KnownPages::leave(Memory& memory) {
  ++memory.barred;  // for good
  const std::lock_guard reading(memory.reading);
  std::unique_lock lock(mutex_);
  memory.closed = true;
  {
    const std::lock_guard queue(queue_mutex_);
    std::erase_if(waiting_, [&](const Waiting& each) { return each.memory.get() == &memory; });
    waiting_bytes_ = 0;
    for (const Waiting& each : waiting_) {
      waiting_bytes_ += each.run.run.count * each.memory->maps[each.run.region]->page_size();
    }
  }
  idle_.wait(lock, [&] { return !memory.hashing; });
  std::erase_if(memories_, [&](const auto& each) {
    const auto locked = each.lock();
    return !locked || locked.get() == &memory;
  });
  sweep_locked();
  const std::lock_guard queue(queue_mutex_);
  full_ = full_locked();
  idle_.notify_all();
}

// Reading the index takes milliseconds; this thread does it, for each guest as it comes. Without memory for it there is
// no share.
void KnownPages::load_share() {
  std::unique_lock lock(mutex_);
  for (;;) {
    share_wanted_.wait(lock, [this] { return stopping_ || loading_; });
    if (stopping_) return;
    loading_ = false;
    reading_ = true;
    // By what they were told already; most have the same.
    std::map<Names, Names> rests;
    for (const auto& each : memories_) {
      const auto memory = each.lock();
      if (!memory || !memory->wants_share) continue;
      memory->share_read_for = true;
      rests[memory->share_given];
    }
    std::shared_ptr<PageShareReader> share = share_;
    Names names = share_names_;
    lock.unlock();
    try {
      if (!share || !share->is_at(share_path_) || !share->refresh(&stopping_))
        share = PageShareReader::open(share_path_, key_, &stopping_);
      std::vector<wire::KnownName> listed = share ? share->names() : std::vector<wire::KnownName>();
      if (!names || *names != listed)
        names = std::make_shared<const std::vector<wire::KnownName>>(std::move(listed));
      for (auto& [given, rest] : rests) {
        if (given == names) continue;
        rest = given ? std::make_shared<const std::vector<wire::KnownName>>(beyond(*names, *given)) : names;
      }
    } catch (const std::exception&) {
      share = nullptr;
      names = nullptr;
    }
    lock.lock();
    reading_ = false;
    share_ = share;
    share_names_ = names;
    for (const auto& each : memories_) {
      const auto memory = each.lock();
      if (!memory || !memory->share_read_for || !std::exchange(memory->wants_share, false)) continue;
      const Names given = std::exchange(memory->share_given, nullptr);
      if (const auto rest = rests.find(given); rest != rests.end() && rest->second)
        memory->share_names.push_back(rest->second);
    }
    idle_.notify_all();
  }
}

std::vector<wire::KnownName> KnownPages::next_names(Memory& memory, std::size_t most) {
  std::vector<wire::KnownName> next;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || memory.closed) return next;
  while (!memory.share_names.empty() && next.size() < most) {
    const auto& all = *memory.share_names.front();
    const std::size_t count = std::min(most - next.size(), all.size() - memory.share_told);
    const auto first = all.begin() + static_cast<std::ptrdiff_t>(memory.share_told);
    next.insert(next.end(), first, first + static_cast<std::ptrdiff_t>(count));
    memory.share_told += count;
    if (memory.share_told < all.size()) break;
    memory.share_names.pop_front();
    memory.share_told = 0;
  }
  // What has gone meanwhile is passed over, some of it at a time.
  const std::size_t count = std::min(most - next.size(), names_.size() - memory.told);
  for (std::size_t i = 0; i < count; ++i) {
    const wire::KnownName name = names_[memory.told++];
    if (living_locked(name)) next.push_back(name);
  }
  return next;
}

bool KnownPages::living_locked(wire::KnownName name) const {
  const auto place = places_.find(name);
  if (place == places_.end()) return false;
  const auto memory = place->second.memory.lock();
  return memory && !memory->closed;
}

bool KnownPages::awaits_share(const Memory& memory) const {
  const std::lock_guard lock(mutex_);
  return memory.wants_share && !memory.closed && share_thread_.started();
}

// Received and in memory, and nobody has said that it is to come again.
bool KnownPages::Memory::has(std::uint32_t region, PageNumber page) const {
  if (closed || region >= maps.size()) return false;
  const ArrivalMap& map = *maps[region];
  return page.value < map.pages() && map.received.test(page) && map.present.test(page) &&
         !map.suspect.test(page) && !map.lost.test(page);
}

bool KnownPages::Memory::read(std::uint32_t region, PageNumber page, std::span<std::byte> into) const {
  if (maps[region]->region().remote()) return false;  // its waiting room is left as pages go to their owner
  const auto bytes = maps[region]->region().contiguous({page, 1});
  return copy_own_memory(bytes.data(), into.first(bytes.size()));
}

bool KnownPages::Memory::copy(std::uint32_t region, PageNumber page, std::span<std::byte> into) {
  if (barred != 0) return false;
  const std::shared_lock lock(reading);
  return has(region, page) && into.size() == maps[region]->page_size() && read(region, page, into);
}

// Said before it is looked whether it may be: who stops it and sees nothing in hand has stopped it.
bool KnownPages::Memory::read_in_hand(std::uint32_t region, PageNumber page, std::span<std::byte> into) {
  in_hand = hand_of(region, page);
  const bool there = !hushed && has(region, page) && read(region, page, into);
  in_hand = 0;
  in_hand.notify_all();
  return there;
}

bool KnownPages::resolve(const ContentDigest& digest, std::span<std::byte> into) {
  const wire::KnownName name = PageShareReader::name_of(digest);
  Place place;
  std::shared_ptr<PageShareReader> share;
  {
    const std::lock_guard lock(mutex_);
    share = share_;
    if (const auto found = places_.find(name); found != places_.end()) place = found->second;
  }
  if (share && share->read(digest, into)) return true;
  // Its maps are gone once it is closed: only copy() looks at them.
  const std::size_t size = into.size();
  const auto memory = place.memory.lock();
  if (memory && memory->copy(place.region, place.page, into) &&
      equal_digests(hasher_(into.first(size)), digest)) {
    return true;
  }
  const std::lock_guard lock(mutex_);
  places_.erase(name);
  return false;
}

void KnownPages::arrived(const std::shared_ptr<Memory>& memory, RegionRun run) {
  if (!reads_memory_) return;
  const std::lock_guard queue(queue_mutex_);
  if (memory->closed || full_) return;
  const Clock::time_point now = Clock::now();
  if (now < rest_until_) return;
  waiting_bytes_ += run.run.count * memory->maps[run.region]->page_size();
  if (waiting_bytes_ > kMostWaitingBytes) {
    rest_until_ = now + kRest;
    waiting_.clear();
    waiting_bytes_ = 0;
    return;
  }
  waiting_.push_back({memory, run});
  hash_wanted_.notify_one();
}

void KnownPages::hash_arrivals() {
  set_this_thread_nice(kLowestPriority);
  std::vector<std::byte> page;
  for (;;) {
    Waiting next;
    {
      std::unique_lock queue(queue_mutex_);
      hash_wanted_.wait(queue, [this] { return stopping_ || !waiting_.empty(); });
      if (stopping_) return;
      next = std::move(waiting_.front());
      waiting_.pop_front();
      waiting_bytes_ -= next.run.run.count * next.memory->maps[next.run.region]->page_size();
      hashing_ = true;
    }
    std::unique_lock lock(mutex_);
    if (!next.memory->closed && !full_locked()) {
      next.memory->hashing = true;
      lock.unlock();
      try {
        hash_run(next, page);
      } catch (const std::exception&) {
        // No memory for its names: they are never known.
      }
      lock.lock();
      next.memory->hashing = false;
    }
    {
      const std::lock_guard queue(queue_mutex_);
      hashing_ = false;
      full_ = full_locked();
    }
    idle_.notify_all();
  }
}

// Without Memory::reading: whoever discards is not to wait for a thread of low priority. While paging, a page that is
// missing by the time that it is read is waited for, like by anybody who touches it; leave() comes when that has ended.
// Before that, reading it would put memory behind it: Guest::stop_hashing().
void KnownPages::hash_run(const Waiting& waiting, std::vector<std::byte>& page) {
  const std::shared_ptr<Memory>& memory = waiting.memory;
  const RegionRun& where = waiting.run;
  std::vector<Found> found;
  const auto publish = [&] {
    const std::lock_guard lock(mutex_);
    publish_locked(memory, found);
    found.clear();
  };
  for (std::uint64_t i = 0; i < where.run.count && !memory->closed; ++i) {
    const PageNumber number{where.run.first.value + i};
    page.resize(static_cast<std::size_t>(memory->maps[where.region]->page_size()));
    if (!memory->read_in_hand(where.region, number, page)) continue;
    found.emplace_back(PageShareReader::name_of(hasher_(page)), RegionRun{where.region, {number, 1}});
    if (found.size() == kBatch) publish();
  }
  publish();
}

void KnownPages::publish_locked(const std::shared_ptr<Memory>& memory, std::span<const Found> found) {
  for (const auto& [name, where] : found) {
    if (full_locked()) return;
    const auto [at, fresh] = places_.try_emplace(name);
    const auto former = at->second.memory.lock();
    if (former && !former->closed) continue;
    at->second = {memory, where.region, where.run.first};
    if (fresh && !(share_ && share_->lists(name))) names_.push_back(name);
  }
}

// A guest has left: what it had makes room. Nobody is told again what stays.
void KnownPages::sweep_locked() {
  std::erase_if(places_, [](const auto& each) {
    const auto memory = each.second.memory.lock();
    return !memory || memory->closed;
  });
  std::vector<std::shared_ptr<Memory>> telling;
  for (const auto& each : memories_) {
    if (auto memory = each.lock()) telling.push_back(std::move(memory));
  }
  std::sort(telling.begin(), telling.end(), [](const auto& a, const auto& b) { return a->told < b->told; });
  auto teller = telling.begin();
  std::size_t kept = 0;
  for (std::size_t at = 0; at < names_.size(); ++at) {
    for (; teller != telling.end() && (*teller)->told == at; ++teller) (*teller)->told = kept;
    if (places_.contains(names_[at])) names_[kept++] = names_[at];
  }
  for (; teller != telling.end(); ++teller) (*teller)->told = kept;
  names_.resize(kept);
}

void KnownPages::limit_places(std::size_t most) {
  const std::lock_guard lock(mutex_);
  most_places_ = most;
}

bool KnownPages::wait_idle(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  return idle_.wait_for(lock, patience, [this] {
    const std::lock_guard queue(queue_mutex_);
    return waiting_.empty() && !hashing_ && !loading_ && !reading_;
  });
}

std::uint64_t KnownPages::memory_bytes() const {
  constexpr std::uint64_t kPlaceBytes = 56;  // a node of the table
  const std::lock_guard lock(mutex_);
  return places_.size() * kPlaceBytes + names_.capacity() * sizeof(wire::KnownName) +
         (share_names_ ? share_names_->capacity() * sizeof(wire::KnownName) : 0) +
         (share_ ? share_->memory_bytes() : 0);
}

}  // namespace memferry
