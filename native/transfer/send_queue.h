// What the source has still to send: a `pending` bitmap for each region and two cursors that all channels
// share. Which page next is decided here and nowhere else: the next pending one at the cursor. What goes to the
// destination is taken at one that a fault moves behind the page that it asked for, so that the push goes on where the
// guest is working. What goes to servers is of no use to the guest sooner than the rest, and is taken at one that goes
// straight on: whoever looks ahead of it (deduplication) looks at what is sent next, and puts first what is best sent.
//
// Threads: take(), take_for_fault(), put_first() and the counters from any thread, without a lock (the demand server
// must never wait for a push thread of lower priority). Everything else that marks pages, only while nobody takes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "page/bitmap.h"
#include "page/contents.h"
#include "page/region.h"
#include "transfer/events.h"
#include "wire/frame.h"

namespace memferry {

class SendQueue {
 public:
  explicit SendQueue(std::vector<std::shared_ptr<Region>> regions);

  [[nodiscard]] std::size_t regions() const { return entries_.size(); }
  [[nodiscard]] const std::shared_ptr<Region>& region(std::uint32_t index) const {
    return entries_[index]->region;
  }
  // Whoever is to hold it has room for so many pages of a region: what it grows by is not known beyond that. All of it,
  // until it is called.
  void set_room(std::uint32_t region, std::uint64_t pages);
  // Pages that the queue knows of: the region's, or fewer when it has grown since the last mark.
  [[nodiscard]] std::uint64_t known_pages(std::uint32_t index) const;

  struct Chunk {
    std::uint32_t region = 0;
    PageRun run;
    // Never touched when it was queued, so most probably zeros; unless a tracker sees what is written since,
    // the pagemap must be asked again.
    bool untouched = false;
    bool tracked = false;
  };
  // Takes the next pending run: at most `max_pages`, any length when untouched. nullopt: nothing is pending.
  [[nodiscard]] std::optional<Chunk> take(std::uint64_t max_pages, Towards towards);
  // Pending again, by whoever took it; with `untouched` false what was taken as untouched goes with content.
  void put_back(const Chunk& chunk);

  // A fault takes its page whether it is pending or not, and up to `max_following` pending pages directly
  // behind it; the destination's cursor moves behind them. Gives the run from `page` on; its first page is
  // always there, though a channel may have taken it before (`first_was_pending` false).
  struct FaultTake {
    PageRun run;
    bool first_was_pending = false;
  };
  [[nodiscard]] FaultTake take_for_fault(std::uint32_t region, PageNumber page, std::uint64_t max_following);

  // The destination will hold this run. Gives how many of its pages had been sent before.
  std::uint64_t note_sent(std::uint32_t region, PageRun run);

  // The destination has this run already, as it is here: nothing of it goes in the first round.
  void note_same(std::uint32_t region, PageRun run);
  [[nodiscard]] const AtomicBitmap& untouched(std::uint32_t region) const {
    return entries_[region]->untouched;
  }

  // Every page pending, none known to be untouched.
  void mark_all(std::uint32_t region);
  // Which pages were never touched, and nothing else.
  void mark_untouched(std::uint32_t region, Contents& contents);
  // The same as an armed tracker knows it; good until what it has seen is collected: forget_untouched().
  void mark_untouched_outside(std::uint32_t region, const AtomicBitmap& populated);
  void forget_untouched(std::uint32_t region);
  // Pages that the region has gained since the last mark.
  void mark_growth(std::uint32_t region);
  // Pending, and untouched no more.
  void mark_written(std::uint32_t region, const AtomicBitmap& written);
  // The next one for a server is the first pending one of all pages from this on, counted through the regions.
  void begin_servers_at(std::uint64_t page_of_all);
  // Servers are given this one, while it is pending, before any that is not marked so. For pages with content.
  void put_first(std::uint32_t region, PageNumber page);
  void forget_first(std::uint32_t region, PageRun run);
  // Where the next one for a server is taken.
  [[nodiscard]] std::pair<std::uint32_t, PageNumber> server_cursor() const;
  // Of 64 pages those that are pending and have content to look at.
  [[nodiscard]] std::uint64_t content_word(std::uint32_t region, std::uint64_t index) const {
    return entries_[region]->pending.word(index) & ~entries_[region]->untouched.word(index);
  }
  // For a tracker to collect into.
  [[nodiscard]] AtomicBitmap& pending(std::uint32_t region) { return entries_[region]->pending; }
  // Pending becomes everything that is not in `have`.
  void mark_lacking(std::uint32_t region, const AtomicBitmap& have);

  // Pages the destination holds a copy of that will be sent again: what it must forget. Each is given once.
  void take_discards(std::uint32_t region, std::vector<wire::WireRun>& discards);

  [[nodiscard]] std::uint64_t pending_pages() const;
  [[nodiscard]] std::uint64_t content_pages() const;  // pending, and not untouched
  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  struct Entry {
    explicit Entry(std::shared_ptr<Region> r);
    std::shared_ptr<Region> region;
    AtomicBitmap pending;
    AtomicBitmap untouched;
    std::atomic<bool> tracked{false};  // a tracker vouches for `untouched`
    AtomicBitmap first;                // put_first()
    AtomicBitmap at_destination;       // sent and not discarded since
    AtomicBitmap ever_sent;
    std::atomic<std::uint64_t> known_pages{0};
    std::atomic<std::uint64_t> room{~std::uint64_t{0}};
    [[nodiscard]] std::uint64_t pages() const;
  };
  // A cursor in one word, so that it is read and moved without a lock: region in the upper 16 bits.
  static constexpr unsigned kRegionShift = 48;
  std::optional<Chunk> take_between(std::uint32_t region, PageNumber from, PageNumber end,
                                    std::uint64_t max_pages);
  std::optional<Chunk> take_first(std::uint32_t region, PageNumber from, PageNumber end,
                                  std::uint64_t max_pages);
  // In order from the cursor on, each region once but for the first, whose beginning comes last.
  template <typename TakeBetween>
  std::optional<Chunk> take_from(std::atomic<std::uint64_t>& cursor, TakeBetween take_between);

  std::vector<std::unique_ptr<Entry>> entries_;
  std::atomic<std::uint64_t> destination_cursor_{0};
  std::atomic<std::uint64_t> server_cursor_{0};
  // Marks in all regions, so that nobody looks for what is not there; for moments behind or ahead of them.
  std::atomic<std::int64_t> first_marks_{0};
};

}  // namespace memferry
