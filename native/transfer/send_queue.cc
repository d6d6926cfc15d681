#include "transfer/send_queue.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace memferry {

SendQueue::Entry::Entry(std::shared_ptr<Region> r)
    : region(std::move(r)),
      pending(region->capacity_pages()),
      untouched(region->capacity_pages()),
      first(region->capacity_pages()),
      at_destination(region->capacity_pages()),
      ever_sent(region->capacity_pages()) {}

SendQueue::SendQueue(std::vector<std::shared_ptr<Region>> regions) {
  if (regions.size() >= (1U << (64 - kRegionShift))) throw std::invalid_argument("too many regions");
  for (auto& region : regions) {
    if (!region) throw std::invalid_argument("a region is missing");
    (void)region->check_not_missing("migrating");
    region->check_not_lost("migrating");
    if (region->capacity_pages() >> kRegionShift != 0) throw std::invalid_argument("region too large");
    entries_.push_back(std::make_unique<Entry>(std::move(region)));
  }
}

// It may grow at any moment.
std::uint64_t SendQueue::Entry::pages() const {
  return std::min(region->pages(), room.load(std::memory_order_acquire));
}

void SendQueue::set_room(std::uint32_t region, std::uint64_t pages) {
  entries_.at(region)->room.store(pages, std::memory_order_release);
}

std::uint64_t SendQueue::known_pages(std::uint32_t index) const {
  return entries_[index]->known_pages.load(std::memory_order_acquire);
}

std::optional<SendQueue::Chunk> SendQueue::take_between(std::uint32_t region, PageNumber from, PageNumber end,
                                                        std::uint64_t max_pages) {
  Entry& entry = *entries_[region];
  end = std::min(end, PageNumber{entry.known_pages.load(std::memory_order_acquire)});
  while (from < end) {
    const std::optional<PageRun> next = entry.pending.next_set(from, end, max_pages);
    if (!next) return std::nullopt;
    const bool untouched = entry.untouched.test(next->first);
    // One kind of page in a chunk. Untouched runs have no limit: they cost one small frame.
    const std::optional<PageRun> kind =
        untouched ? entry.untouched.next_set(next->first, end, end.value) : std::nullopt;
    std::uint64_t limit = untouched ? kind->count : next->count;
    if (!untouched) {
      const auto border = entry.untouched.next_set(next->first, next->end(), 1);
      if (border) limit = border->first.value - next->first.value;
    }
    // Other takers may have been here since: take_run gives what is still there, perhaps further on.
    const std::optional<PageRun> taken =
        entry.pending.take_run(next->first, PageNumber{next->first.value + limit}, limit);
    if (taken) return Chunk{region, *taken, untouched, untouched && entry.tracked};
    from = PageNumber{next->first.value + limit};
  }
  return std::nullopt;
}

std::pair<std::uint32_t, PageNumber> SendQueue::server_cursor() const {
  const std::uint64_t seen = server_cursor_.load(std::memory_order_relaxed);
  return {static_cast<std::uint32_t>(seen >> kRegionShift), PageNumber{seen & ((1ULL << kRegionShift) - 1)}};
}

void SendQueue::begin_servers_at(std::uint64_t page_of_all) {
  for (std::uint32_t region = 0; region < regions(); ++region) {
    const std::uint64_t pages = known_pages(region);
    if (page_of_all < pages) {
      server_cursor_.store((std::uint64_t{region} << kRegionShift) | page_of_all, std::memory_order_relaxed);
      return;
    }
    page_of_all -= pages;
  }
}

void SendQueue::put_first(std::uint32_t region, PageNumber page) {
  if (!entries_[region]->first.set(page)) first_marks_.fetch_add(1, std::memory_order_relaxed);
}

void SendQueue::forget_first(std::uint32_t region, PageRun run) {
  if (first_marks_.load(std::memory_order_relaxed) == 0) return;
  const std::uint64_t pages = entries_[region]->first.clear_run(run);
  first_marks_.fetch_sub(static_cast<std::int64_t>(pages), std::memory_order_relaxed);
}

std::optional<SendQueue::Chunk> SendQueue::take_first(std::uint32_t region, PageNumber from, PageNumber end,
                                                      std::uint64_t max_pages) {
  Entry& entry = *entries_[region];
  while (from < end) {
    const std::optional<PageRun> next = entry.first.take_run(from, end, max_pages);
    if (!next) return std::nullopt;
    const auto taken = entry.pending.take_run(next->first, next->end(), next->count);
    std::uint64_t kept = 0;
    if (taken && taken->end() < next->end())
      kept = entry.first.set_run({taken->end(), next->end().value - taken->end().value});
    first_marks_.fetch_sub(static_cast<std::int64_t>(next->count - kept), std::memory_order_relaxed);
    if (taken) return Chunk{region, *taken};
    from = next->end();
  }
  return std::nullopt;
}

template <typename TakeBetween>
std::optional<SendQueue::Chunk> SendQueue::take_from(std::atomic<std::uint64_t>& cursor,
                                                     TakeBetween take_between) {
  const std::uint64_t seen = cursor.load(std::memory_order_relaxed);
  const auto start_region = static_cast<std::uint32_t>(seen >> kRegionShift);
  const PageNumber start_page{seen & ((1ULL << kRegionShift) - 1)};
  const auto count = static_cast<std::uint32_t>(entries_.size());
  // From the cursor to the end of its region, the other regions in order, and at last what lies before it.
  for (std::uint32_t step = 0; step <= count; ++step) {
    const std::uint32_t region = (start_region + step) % count;
    const PageNumber from = step == 0 ? start_page : PageNumber{0};
    const PageNumber end = step == count ? start_page : PageNumber{known_pages(region)};
    if (auto chunk = take_between(region, from, end)) {
      // Fails when somebody has moved the cursor meanwhile, a fault perhaps: theirs is the better place.
      std::uint64_t expected = seen;
      cursor.compare_exchange_strong(expected,
                                     (std::uint64_t{region} << kRegionShift) | chunk->run.end().value,
                                     std::memory_order_relaxed);
      return chunk;
    }
  }
  return std::nullopt;
}

std::optional<SendQueue::Chunk> SendQueue::take(std::uint64_t max_pages, Towards towards) {
  if (towards == Towards::kServer && first_marks_.load(std::memory_order_relaxed) > 0) {
    auto chunk = take_from(server_cursor_, [&](std::uint32_t region, PageNumber from, PageNumber end) {
      return take_first(region, from, end, max_pages);
    });
    if (chunk) return chunk;
  }
  return take_from(towards == Towards::kDestination ? destination_cursor_ : server_cursor_,
                   [&](std::uint32_t region, PageNumber from, PageNumber end) {
                     return take_between(region, from, end, max_pages);
                   });
}

void SendQueue::put_back(const Chunk& chunk) {
  Entry& entry = *entries_[chunk.region];
  if (!chunk.untouched) entry.untouched.clear_run(chunk.run);
  entry.pending.set_run(chunk.run);
}

SendQueue::FaultTake SendQueue::take_for_fault(std::uint32_t region, PageNumber page,
                                               std::uint64_t max_following) {
  Entry& entry = *entries_[region];
  const bool pending = entry.pending.clear(page);
  PageRun run{page, 1};
  const std::uint64_t known = entry.known_pages.load(std::memory_order_acquire);
  const PageNumber end{std::min(known, page.value + 1 + std::min(max_following, known))};
  while (run.end() < end && entry.pending.clear(run.end())) ++run.count;
  destination_cursor_.store((std::uint64_t{region} << kRegionShift) | run.end().value,
                            std::memory_order_relaxed);
  return {run, pending};
}

std::uint64_t SendQueue::note_sent(std::uint32_t region, PageRun run) {
  Entry& entry = *entries_[region];
  entry.at_destination.set_run(run);
  return run.count - entry.ever_sent.set_run(run);
}

void SendQueue::note_same(std::uint32_t region, PageRun run) {
  Entry& entry = *entries_[region];
  entry.at_destination.set_run(run);
  entry.pending.clear_run(run);
}

void SendQueue::mark_all(std::uint32_t region) {
  Entry& entry = *entries_[region];
  const std::uint64_t pages = entry.pages();
  forget_untouched(region);
  entry.pending.set_run(PageRun{PageNumber{0}, pages});
  entry.known_pages.store(pages, std::memory_order_release);
}

void SendQueue::mark_untouched(std::uint32_t region, Contents& contents) {
  Entry& entry = *entries_[region];
  const PageRun all{PageNumber{0}, entry.pages()};
  forget_untouched(region);
  entry.untouched.set_run(all);
  contents.visit(*entry.region, all, [&](PageRun run) { entry.untouched.clear_run(run); });
}

void SendQueue::mark_untouched_outside(std::uint32_t region, const AtomicBitmap& populated) {
  Entry& entry = *entries_[region];
  const std::uint64_t pages = entry.pages();
  PageNumber at{0};
  while (const auto run = populated.next_set(at, PageNumber{pages}, pages)) {
    entry.untouched.set_run(PageRun{at, run->first.value - at.value});
    at = run->end();
  }
  entry.untouched.set_run(PageRun{at, pages - at.value});
  entry.tracked = true;
}

void SendQueue::forget_untouched(std::uint32_t region) {
  Entry& entry = *entries_[region];
  entry.untouched.clear_run(PageRun{PageNumber{0}, entry.untouched.capacity()});
  entry.tracked = false;
}

void SendQueue::mark_written(std::uint32_t region, const AtomicBitmap& written) {
  Entry& entry = *entries_[region];
  const PageNumber end{written.capacity()};
  PageNumber at{0};
  while (const auto run = written.next_set(at, end, written.capacity())) {
    entry.untouched.clear_run(*run);
    entry.pending.set_run(*run);
    at = run->end();
  }
}

void SendQueue::mark_growth(std::uint32_t region) {
  Entry& entry = *entries_[region];
  const std::uint64_t known = entry.known_pages.load(std::memory_order_relaxed);
  const std::uint64_t pages = entry.pages();
  if (pages > known) entry.pending.set_run(PageRun{PageNumber{known}, pages - known});
  entry.known_pages.store(pages, std::memory_order_release);
}

void SendQueue::mark_lacking(std::uint32_t region, const AtomicBitmap& have) {
  Entry& entry = *entries_[region];
  const std::uint64_t known = known_pages(region);
  entry.pending.clear_run(PageRun{PageNumber{0}, entry.pending.capacity()});
  PageNumber at{0};
  while (const auto lacking = have.next_clear(at, PageNumber{known}, known)) {
    entry.pending.set_run(*lacking);
    at = lacking->end();
  }
}

void SendQueue::take_discards(std::uint32_t region, std::vector<wire::WireRun>& discards) {
  Entry& entry = *entries_[region];
  // Word by word, since both bitmaps are mostly empty by now: this is on the way of a switchover.
  std::uint64_t first = 0;
  std::uint64_t count = 0;
  for (std::uint64_t index = 0; index < entry.pending.words(); ++index) {
    std::uint64_t bits = entry.pending.word(index) & entry.at_destination.word(index);
    while (bits != 0) {
      const auto bit = static_cast<unsigned>(std::countr_zero(bits));
      const auto length = static_cast<unsigned>(std::countr_one(bits >> bit));
      const std::uint64_t page = index * 64 + bit;
      entry.at_destination.clear_run(PageRun{PageNumber{page}, length});
      if (count > 0 && first + count == page) {
        count += length;
      } else {
        if (count > 0) discards.push_back({first, count});
        first = page;
        count = length;
      }
      bits = bit + length >= 64 ? 0 : bits & (~0ULL << (bit + length));
    }
  }
  if (count > 0) discards.push_back({first, count});
}

std::uint64_t SendQueue::pending_pages() const {
  std::uint64_t pages = 0;
  for (const auto& entry : entries_) pages += entry->pending.count();
  return pages;
}

std::uint64_t SendQueue::content_pages() const {
  std::uint64_t pages = 0;
  for (std::uint32_t region = 0; region < regions(); ++region) {
    for (std::uint64_t word = 0; word < entries_[region]->pending.words(); ++word) {
      pages += static_cast<std::uint64_t>(std::popcount(content_word(region, word)));
    }
  }
  return pages;
}

std::uint64_t SendQueue::memory_bytes() const {
  std::uint64_t bytes = 0;
  for (const auto& entry : entries_) bytes += 5 * entry->pending.words() * sizeof(std::uint64_t);
  return bytes;
}

}  // namespace memferry
