#include "transfer/receiver.h"

#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "os/mapping.h"
#include "os/pagemap.h"
#include "os/sys_error.h"
#include "transfer/receiver_impl.h"

namespace memferry {

Receiver::Impl::~Impl() { close(); }

// Who waits for a page that will not come is woken first; then everything ends. A second caller waits until
// the first is done. The regions' tokens are dropped last: dropping one waits for a retire() that is calling
// region_gone() right now, and that one waits for `closed`.
void Receiver::Impl::close() {
  std::vector<std::unique_ptr<Region::User>> released;
  // A closed receiver may be kept for long; the domain's threads are not.
  std::shared_ptr<KnownPages> left_domain;
  std::unique_ptr<KnownPages::Guest> left;
  {
    std::unique_lock lock(mutex);
    if (closing) {
      changed.wait(lock, [this] { return closed; });
      return;
    }
    closing = true;
    shut_down_all_locked();
    changed.notify_all();
    changed.wait(lock, [this] { return !delivering; });
  }
  if (gather) gather->shut_down();
  // Completion belongs to the supervisor, so let it end first: it may be letting go of the memory right now.
  supervisor.stop();
  const bool incomplete = pager && pager->serving() && state != State::kComplete;
  if (incomplete) pager->poison_missing();
  // Whoever reads these pages for others has an answer by now, whatever it waited for.
  if (known) known->close();
  for (const auto& channel : channels) channel->thread.stop();
  if (gather) gather->close();
  // A channel may have claimed a page and failed to install it meanwhile.
  if (incomplete) pager->poison_missing();
  if (pager) pager->stop();
  if (ahead) ahead->stop();
  {
    const std::lock_guard lock(mutex);
    closed = true;
    // One that was attached while closing began was taken by nobody; a closed receiver may be kept for long.
    for (const auto& channel : channels) channel->next = channel->current = nullptr;
    released.swap(users);
    left = std::move(known);
    left_domain = std::move(domain);
    arrivals.clear();
    changed.notify_all();
  }
}

void Receiver::Impl::region_gone() {
  {
    const std::lock_guard lock(mutex);
    if (!closing && (state != State::kComplete || delivering)) {
      const std::string gone = gone_owner(config.regions);
      fail_locked(gone.empty() ? "REGION_GONE" : "OWNER_GONE",
                  gone.empty() ? "the memory of a region went away" : gone);
    }
  }
  close();
}

bool Receiver::Impl::deliver() {
  const bool remote = std::any_of(config.regions.begin(), config.regions.end(),
                                  [](const auto& region) { return region->remote(); });
  if (!remote) {
    // It waited for a switch that does not come: zeros that nothing lies behind are no longer missing.
    const bool attached = std::any_of(config.regions.begin(), config.regions.end(),
                                      [](const auto& region) { return region->owner() != nullptr; });
    if (pager && attached) pager->stop();
    return true;
  }
  try {
    if (pager->deliver()) return true;
    undelivered = "see its owner";
  } catch (const std::exception& error) {
    undelivered = error.what();
  }
  return false;
}

void Receiver::Impl::push(EngineEvent event) {
  events.push_back(std::move(event));
  changed.notify_all();
}

void Receiver::Impl::fail(std::string code, std::string message) {
  const std::lock_guard lock(mutex);
  fail_locked(std::move(code), std::move(message));
}

void Receiver::Impl::fail_locked(std::string code, std::string message) {
  if (closing || state == State::kFailed || state == State::kLost) return;
  if (state == State::kComplete && !delivering) return;
  // While paging a page can no longer be had, so somebody may be blocked on one: fail that access, soon.
  if (pager && pager->serving()) poison_at = Clock::now() + config.loss_grace;
  state = State::kFailed;
  recover_by = Clock::time_point::max();
  shut_down_all_locked();
  EngineEvent event{};
  event.kind = EngineEventKind::kFailed;
  event.code = std::move(code);
  event.message = std::move(message);
  push(std::move(event));
}

void Receiver::Impl::lose_locked(std::string code, std::string message) {
  if (lost_due || state != State::kPaging) return;
  lost_due = true;
  lost_code = std::move(code);
  lost_message = std::move(message);
  changed.notify_all();
}

void Receiver::Impl::check_complete() {
  if (!switched.load() || state.load() != State::kPaging) return;
  std::uint64_t all = 0;
  for (const auto& map : maps) all += map->pages();
  if (settled.load(std::memory_order_acquire) != all) return;
  const std::lock_guard lock(mutex);
  complete_due = true;
  changed.notify_all();
}

std::vector<RegionRun> Receiver::Impl::missing_runs(std::size_t max_runs) const {
  std::vector<RegionRun> runs;
  for (std::uint32_t region = 0; region < maps.size(); ++region) {
    const ArrivalMap& map = *maps[region];
    const PageNumber end{map.pages()};
    for (PageNumber from{0}; runs.size() < max_runs;) {
      const auto run = map.received.next_clear(from, end, map.pages());
      if (!run) break;
      runs.push_back({region, *run});
      from = run->end();
    }
  }
  return runs;
}

bool Receiver::Impl::filled() const {
  return filling_frames == 0 && suspects() == 0 && missing_runs(1).empty();
}

std::uint64_t Receiver::Impl::suspects() const {
  std::uint64_t pages = 0;
  for (const auto& map : maps) pages += map->suspect.count();
  return pages;
}

Receiver::Receiver() = default;
Receiver::~Receiver() { close(); }

std::shared_ptr<Receiver> Receiver::create(ReceiverConfig config) {
  std::shared_ptr<Receiver> receiver(new Receiver());
  receiver->impl_ = std::make_unique<Impl>(std::move(config));
  receiver->impl_->start();
  return receiver;
}

const wire::MigrationId& Receiver::migration() const { return impl_->config.migration; }
bool Receiver::attach(const wire::Hello& hello, UniqueFd& fd) { return impl_->attach(hello, fd); }

bool Receiver::ready() const {
  const Impl::State state = impl_->state;
  if (state == Impl::State::kComplete) return !impl_->delivering;
  if (state == Impl::State::kPaging) return impl_->switched;
  return state == Impl::State::kFilling && impl_->filled();
}

bool Receiver::seal() {
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait(lock, [this] { return !impl_->delivering; });
  if (impl_->closing) return false;
  if (impl_->state == Impl::State::kPaging) return impl_->switched;
  if (impl_->state == Impl::State::kComplete) return true;
  if (impl_->state != Impl::State::kFilling) return false;
  // First the state, then the look: a frame announces itself before it looks at the state, so whichever of the
  // two comes second sees the other.
  impl_->sealing = true;
  impl_->state = Impl::State::kComplete;
  const bool whole = impl_->filled();
  if (!whole) impl_->state = Impl::State::kFilling;
  impl_->sealing = false;
  if (!whole) return false;
  // It copies all of the memory, and the pager's threads that it ends may be telling of a failure right now.
  impl_->delivering = true;
  lock.unlock();
  const bool delivered = impl_->deliver();
  lock.lock();
  // Its pages wait where nobody brings them: they are poisoned soon, or as it is closed.
  if (!delivered) impl_->fail_locked("SYSTEM", impl_->undelivered);
  impl_->delivering = false;
  impl_->changed.notify_all();
  if (!delivered || impl_->state != Impl::State::kComplete)
    throw std::runtime_error("the memory of another process does not take its pages: " +
                             (delivered ? std::string("see its owner") : impl_->undelivered));
  return true;
}

bool Receiver::paging() const {
  return impl_->state == Impl::State::kPaging || impl_->state == Impl::State::kLost;
}

ReceiverStats Receiver::stats() const {
  ReceiverStats stats;
  stats.bytes_received = impl_->bytes_received;
  stats.pages_received = impl_->pages_received;
  stats.pages_zero = impl_->pages_zero;
  stats.pages_suspect = impl_->suspects();
  const std::uint64_t payload = wire::max_payload(impl_->page_size);
  for (const auto& map : impl_->maps) {
    stats.pages_missing += map->missing();
    stats.extra_memory_bytes += map->extra_bytes();
  }
  stats.pages_from_base = impl_->pages_from_base;
  stats.base_hash_us = impl_->base_hash_us;
  stats.pages_known = impl_->pages_known;
  stats.pages_unresolved = impl_->pages_unresolved;
  {
    const std::lock_guard lock(impl_->mutex);
    if (impl_->known) stats.extra_memory_bytes += impl_->known->memory_bytes();
  }
  stats.extra_memory_bytes += impl_->tree_bytes;
  stats.pages_gathered = impl_->pages_gathered;
  stats.pages_lost = impl_->pages_lost;
  stats.pages_missing += impl_->pages_lost;
  if (impl_->gather) {
    stats.servers = impl_->gather->stats();
    stats.base_problem = impl_->gather->base_stats().problem;
    stats.extra_memory_bytes += impl_->gather->memory_bytes();
  }
  stats.extra_memory_bytes += impl_->channels.size() * payload * (impl_->pager ? 2 : 1);
  if (impl_->pager) {
    stats.extra_memory_bytes += impl_->pager->extra_bytes();
    const LatencyHistogram& latencies = impl_->pager->latencies();
    const auto us = [](std::chrono::nanoseconds time) { return static_cast<double>(time.count()) / 1000.0; };
    stats.faults.count = latencies.count();
    stats.faults.p50_us = us(latencies.quantile(0.5));
    stats.faults.p99_us = us(latencies.quantile(0.99));
    stats.faults.max_us = us(latencies.max());
  }
  return stats;
}

Gather::Reach Receiver::reach(const std::vector<bool>& away) const {
  if (!impl_->gather) throw std::invalid_argument("there are no servers");
  return impl_->gather->reach(away);
}

std::vector<RegionRun> Receiver::missing(std::size_t max_runs) const { return impl_->missing_runs(max_runs); }

Hash128 Receiver::digest(std::uint32_t region) const {
  if (region >= impl_->maps.size()) throw std::invalid_argument("no such region");
  return impl_->maps[region]->digest();
}

void Receiver::acknowledge_loss() {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->poison_at == Impl::Clock::time_point::max()) return;
  impl_->poison_at = Impl::Clock::now();
  impl_->changed.notify_all();
}

void Receiver::base_sampled(bool stays) {
  impl_->base_sampled = stays ? Impl::Sampled::kStays : Impl::Sampled::kChanges;
}

void Receiver::base_ready() { impl_->base_awaited = false; }

void Receiver::await_filled() {
  // The rounds are over and the guest stands still: the link is the gather's now.
  impl_->rounds_over = true;
  if (impl_->gather) impl_->gather->wake_ahead();
  impl_->filled_wanted = true;
  impl_->check_filled();
}

void Receiver::source_rests() {
  impl_->rests_until = (Impl::Clock::now() + kRest).time_since_epoch().count();
  if (impl_->gather) impl_->gather->wake_ahead();
}

void Receiver::set_gather_limit(std::uint64_t bytes_per_second) {
  if (impl_->gather) impl_->gather->set_limit(bytes_per_second);
}

void Receiver::set_bandwidth(std::uint64_t bytes_per_second) { impl_->intake.set_rate(bytes_per_second); }

void Receiver::grow(std::uint32_t region, std::uint64_t pages) {
  if (region >= impl_->maps.size()) throw std::invalid_argument("no such region");
  const std::lock_guard lock(impl_->mutex);
  if (impl_->state != Impl::State::kFilling) throw std::logic_error("a region grows only while it is filled");
  ArrivalMap& map = *impl_->maps[region];
  if (pages < map.pages()) throw std::invalid_argument("a region never shrinks");
  if (pages > map.region().pages()) map.region().grow(pages);
  const PageRun tail{PageNumber{map.pages()}, pages - map.pages()};
  Discarder discarder(impl_->backings[region]);
  map.for_each_part(tail, [&](std::span<std::byte> part, PageNumber) {
    if (impl_->pager) ::madvise(part.data(), part.size(), MADV_NOHUGEPAGE);
    if (impl_->config.discard_first) discarder.add(Address::of(part.data()), part.size());
  });
  discarder.flush();
  map.grow(pages, impl_->config.discard_first);
}

void Receiver::close() {
  if (impl_) impl_->close();
}

}  // namespace memferry
