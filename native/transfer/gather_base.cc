#include "transfer/gather_base.h"

#include <algorithm>
#include <system_error>

#include "page/hash.h"
#include "transfer/gather.h"
#include "transfer/gather_link.h"

namespace memferry {
namespace {

constexpr int kLookMs = 20;

}  // namespace

GatherBase::Check::~Check() {
  // Here, or the gather's: in either case nobody holds them back any more.
  bool any = false;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (wanted[i]) any = base.let_go(region, {PageNumber{run.first.value + i}, 1}) || any;
  }
  if (any) base.gather_.wake_ahead();
  const std::lock_guard lock(base.mutex_);
  --base.checks_;
  base.changed_.notify_all();
}

GatherBase::GatherBase(Gather& gather, std::vector<BaseImage> images)
    : gather_(gather), images_(std::move(images)) {
  for (const auto& server : gather_.servers_) {
    const auto key = wire::stage_hash_key(server->address->tokens);
    hashers_.push_back(key ? std::make_unique<KeyedHasher>(*key) : nullptr);
    silent_[server->ordinal] = !key;
  }
  for (std::size_t region = 0; region < gather_.maps_.size(); ++region) {
    const ArrivalMap& map = *gather_.maps_[region];
    held_.push_back(std::make_unique<AtomicBitmap>(map.received.capacity()));
    uncompared_.push_back(std::make_unique<AtomicBitmap>(map.received.capacity()));
    if (region >= images_.size() || images_[region].path.empty()) continue;
    held_.back()->set_run({PageNumber{0}, map.pages()});
    uncompared_.back()->set_run({PageNumber{0}, map.pages()});
  }
  ready_.resize(gather_.servers_.size());
}

void GatherBase::start() {
  thread_.start("mf-base", [this](WorkerThread& self) { main(self); });
}

void GatherBase::map_known() {
  map_known_ = true;
  if (thread_.started()) thread_.wake();
}

void GatherBase::main(WorkerThread& self) {
  // Not of a lower priority: it takes the lock of this process's mappings now and then, which a fault waits for.
  CpuCourtesy courtesy(wire::shared_key(gather_.config_.image));
  try {
    await_map(self);
    std::uint32_t region = 0;
    PageRun run{};
    while (going_on() && next_piece(region, run)) {
      courtesy.follow(gather_.receiver_.strayed_lately());
      compare(region, run);
      const std::lock_guard lock(mutex_);
      piece_ = {};
    }
  } catch (const std::exception& error) {
    note_problem(error.what());
  }
  if (!self.stopping()) release_everything();
}

void GatherBase::await_map(WorkerThread& self) {
  const auto map_by = Clock::now() + kMapPatience;
  while (going_on() && !map_known_ && Clock::now() < map_by) self.wait(kLookMs);
  const auto servers_by = Clock::now() + kServerPatience;
  const auto settled = [this] {
    return std::all_of(gather_.servers_.begin(), gather_.servers_.end(),
                       [](const auto& server) { return server->up || server->failed; });
  };
  while (going_on() && !settled() && Clock::now() < servers_by) self.wait(kLookMs);
}

// From behind the last fault, as links read ahead.
bool GatherBase::next_piece(std::uint32_t& region, PageRun& run) {
  const std::uint64_t most = wire::max_run_pages(gather_.config_.page_size);
  gather_.follow_faults(cursor_);
  for (std::size_t step = 0; step <= uncompared_.size(); ++step) {
    const PageNumber end{gather_.maps_[cursor_.region]->pages()};
    // Said before it is taken, so that whoever abandons all of it has either.
    const auto found = uncompared_[cursor_.region]->next_set(cursor_.page, end, most);
    if (found) {
      {
        const std::lock_guard lock(mutex_);
        piece_region_ = cursor_.region;
        piece_ = *found;
      }
      uncompared_[cursor_.region]->clear_run(*found);
      cursor_.page = found->end();
      region = cursor_.region;
      run = *found;
      return true;
    }
    cursor_.region = (cursor_.region + 1) % static_cast<std::uint32_t>(uncompared_.size());
    cursor_.page = PageNumber{0};
  }
  return false;
}

void GatherBase::compare(std::uint32_t region, PageRun run) {
  const ArrivalMap& map = *gather_.maps_[region];
  if (map.received.count(run) == run.count) return release(region, run);
  const auto pages = read(region, run);
  if (!pages) {
    release(region, run);
    return release_rest(region, PageNumber{0});
  }
  if (*pages == 0) {
    release(region, run);
    return release_rest(region, run.end());
  }
  const std::uint64_t page_size = gather_.config_.page_size;
  const auto count = static_cast<std::size_t>(*pages);
  xxh3_.resize(count);
  hash_pages(std::span(bytes_).first(count * page_size), page_size, xxh3_.data());
  ask_whom_.assign(static_cast<std::size_t>(run.count), wire::Holders::kNobody);
  for (std::size_t i = 0; i < count; ++i) {
    const PageNumber page{run.first.value + i};
    if (map.received.test(page) || !gather_.is_current(region, page, xxh3_[i])) continue;
    const std::uint8_t whom = gather_.chosen(page, gather_.where_[region]->holders(page));
    if (whom != wire::Holders::kNobody && gather_.servers_[whom]->up && !silent_[whom]) ask_whom_[i] = whom;
  }
  pages_compared_.fetch_add(count, std::memory_order_relaxed);
  // What differs is the gather's now.
  bool any = false;
  for (std::size_t from = 0; from < ask_whom_.size();) {
    std::size_t end = from;
    while (end < ask_whom_.size() && ask_whom_[end] == wire::Holders::kNobody) ++end;
    if (end > from) any = let_go(region, {PageNumber{run.first.value + from}, end - from}) || any;
    from = std::max(end, from + 1);
  }
  if (any) gather_.wake_ahead();
  ask(region, run);
}

std::optional<std::uint64_t> GatherBase::read(std::uint32_t region, PageRun run) {
  const std::uint64_t page_size = gather_.config_.page_size;
  bytes_.resize(static_cast<std::size_t>(run.count * page_size));
  const BaseImage& image = images_[region];
  const auto since = Clock::now();
  std::optional<std::size_t> got;
  try {
    got = reader_.read(image.path, image.offset_bytes + run.first.value * page_size, bytes_, kReadPatience,
                       [this] { return going_on(); });
    if (!got && going_on()) abandon("the base is not read in time");
  } catch (const std::system_error& error) {
    note_problem(image.path + ": " + error.what());
  }
  if (!got) return std::nullopt;
  reading_took_ += Clock::now() - since;
  bytes_read_ += *got;
  if (reading_took_ >= kRateWindow) {
    const double seconds = std::chrono::duration<double>(reading_took_).count();
    if (static_cast<double>(bytes_read_) < seconds * static_cast<double>(kLeastBytesASecond)) {
      abandon("the base is read too slowly");
      return std::nullopt;
    }
    reading_took_ = {};
    bytes_read_ = 0;
  }
  return *got / page_size;
}

// One check for each server that has some of the piece.
void GatherBase::ask(std::uint32_t region, PageRun run) {
  const auto page_size = static_cast<std::size_t>(gather_.config_.page_size);
  for (std::size_t i = 0; i < ask_whom_.size(); ++i) {
    const std::uint8_t whom = ask_whom_[i];
    if (whom == wire::Holders::kNobody) continue;
    std::size_t end = i + 1;
    for (std::size_t at = end; at < ask_whom_.size(); ++at) {
      if (ask_whom_[at] == whom) end = at + 1;
    }
    if (!take_place()) return release(region, run);
    auto check = std::make_unique<Check>(*this, region, PageRun{PageNumber{run.first.value + i}, end - i});
    check->wanted.resize(end - i);
    check->same.resize(end - i);
    check->hashes.resize(end - i);
    check->xxh3.assign(xxh3_.begin() + static_cast<std::ptrdiff_t>(i),
                       xxh3_.begin() + static_cast<std::ptrdiff_t>(end));
    check->bytes.assign(bytes_.begin() + static_cast<std::ptrdiff_t>(i * page_size),
                        bytes_.begin() + static_cast<std::ptrdiff_t>(end * page_size));
    for (std::size_t at = i; at < end; ++at) {
      if (ask_whom_[at] != whom) continue;
      ask_whom_[at] = wire::Holders::kNobody;
      check->wanted[at - i] = true;
      const auto page = std::span(check->bytes).subspan((at - i) * page_size, page_size);
      hashers_[whom]->pages(page, page_size, &check->hashes[at - i]);
    }
    {
      const std::lock_guard lock(mutex_);
      ready_[whom].push_back(std::move(check));
    }
    // Looked at after it lies there: who takes it down drops what lies there afterwards.
    if (!gather_.servers_[whom]->up || silent_[whom]) drop(whom);
    gather_.servers_[whom]->ahead->wake();
  }
}

// For one more check; false: none for this piece. The place is the check's from then on. Who does not say what its pages
// are holds up the questions to nobody else: whoever lets most of them lie is asked no more.
bool GatherBase::take_place() {
  auto by = Clock::now() + kAnswerPatience;
  std::unique_lock lock(mutex_);
  while (going_on() && checks_ >= kMostChecks) {
    changed_.wait_for(lock, std::chrono::milliseconds(kLookMs));
    if (checks_ < kMostChecks || Clock::now() < by) continue;
    const auto most = std::ranges::max_element(ready_, {}, &std::deque<std::unique_ptr<Check>>::size);
    if (most->empty()) return false;
    lock.unlock();
    refused(static_cast<std::uint8_t>(most - ready_.begin()));
    lock.lock();
    by = Clock::now() + kAnswerPatience;
  }
  if (!going_on()) return false;
  ++checks_;
  return true;
}

std::unique_ptr<GatherBase::Check> GatherBase::next(std::uint8_t ordinal) {
  const std::lock_guard lock(mutex_);
  if (ready_[ordinal].empty()) return nullptr;
  auto check = std::move(ready_[ordinal].front());
  ready_[ordinal].pop_front();
  return check;
}

void GatherBase::answered(Check& check, PageNumber first, std::span<const std::byte> hashes) {
  const auto from = static_cast<std::size_t>(first.value - check.run.first.value);
  for (std::size_t i = 0; i < hashes.size() / sizeof(KeyedHash); ++i) {
    const auto theirs = hashes.subspan(i * sizeof(KeyedHash), sizeof(KeyedHash));
    const auto ours = std::as_bytes(std::span(check.hashes[from + i]));
    if (check.wanted[from + i]) check.same[from + i] = std::ranges::equal(theirs, ours);
  }
}

void GatherBase::finish(std::unique_ptr<Check> check) {
  const auto page_size = static_cast<std::size_t>(gather_.config_.page_size);
  for (std::size_t from = 0; from < check->same.size();) {
    std::size_t end = from;
    while (end < check->same.size() && check->same[end]) ++end;
    if (end > from) {
      gather_.receiver_.from_base(
          check->region, {PageNumber{check->run.first.value + from}, end - from},
          std::span<const std::byte>(check->bytes).subspan(from * page_size, (end - from) * page_size),
          std::span<const std::uint64_t>(check->xxh3).subspan(from, end - from));
    }
    from = std::max(end, from + 1);
  }
}

void GatherBase::refused(std::uint8_t ordinal) {
  silent_[ordinal] = true;
  note_problem("server " + gather_.servers_[ordinal]->address->name + " does not say what its pages are");
  drop(ordinal);
}

void GatherBase::drop(std::uint8_t ordinal) {
  std::deque<std::unique_ptr<Check>> dropped;
  const std::lock_guard lock(mutex_);
  dropped.swap(ready_[ordinal]);
}

// Not held any more: the gather's, unless they are here. True: there are such.
bool GatherBase::let_go(std::uint32_t region, PageRun run) {
  if (closing_) return false;
  bool any = false;
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    if (!held_[region]->clear(page) || gather_.maps_[region]->received.test(page)) continue;
    // Who is told of a place looks afterwards whether the page is held: one of the two sees the other.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    gather_.assign(region, page);
    any = true;
  }
  return any;
}

void GatherBase::release(std::uint32_t region, PageRun run) {
  if (let_go(region, run)) gather_.wake_ahead();
}

// What nobody has looked at.
void GatherBase::release_rest(std::uint32_t region, PageNumber from) {
  const PageNumber end{gather_.maps_[region]->pages()};
  bool any = false;
  while (const auto run = uncompared_[region]->take_run(from, end, end.value)) {
    any = let_go(region, *run) || any;
  }
  if (any) gather_.wake_ahead();
}

// Also what was being looked at. Checks that are under way come to their end.
void GatherBase::release_everything() {
  std::uint32_t region = 0;
  PageRun piece{};
  {
    const std::lock_guard lock(mutex_);
    region = piece_region_;
    piece = piece_;
  }
  release(region, piece);
  for (region = 0; region < held_.size(); ++region) release_rest(region, PageNumber{0});
}

void GatherBase::abandon(const std::string& why) {
  if (abandoned_.exchange(true)) return;
  note_problem(why);
  release_everything();
}

void GatherBase::note_problem(const std::string& why) {
  const std::lock_guard lock(mutex_);
  if (problem_.empty()) problem_ = why;
}

GatherBase::Stats GatherBase::stats() const {
  Stats stats;
  stats.pages_compared = pages_compared_;
  for (const auto& bitmap : held_) stats.memory_bytes += 2 * bitmap->capacity() / 8;
  const std::uint64_t piece = wire::max_payload(gather_.config_.page_size);
  const std::lock_guard lock(mutex_);
  stats.memory_bytes += (kMostChecks + 1) * piece;
  stats.problem = problem_;
  return stats;
}

void GatherBase::shut_down() {
  closing_ = true;
  if (thread_.started()) thread_.request_stop();
  changed_.notify_all();
}

void GatherBase::close() {
  shut_down();
  thread_.stop();
  for (std::size_t i = 0; i < ready_.size(); ++i) drop(static_cast<std::uint8_t>(i));
}

}  // namespace memferry
