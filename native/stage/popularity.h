// How many guests have a content, and the content itself where enough of them do: what a directory server knows of the
// pages of its domains. A table in slots of the slab, like a HintTable, with a bit for each guest that has reported a
// name in this period and another for the one before; a period is the time in which what nobody reports any more fades.
// What fewest have leaves first.
//
// Contents lie in slots of their own, at most `most_contents`, and only in room that nobody else needs: relieve() gives
// them up, and none is taken in while the slab is nearly full.
//
// Names come masked by their domain (popular_pages.h). Threads: any; a mutex is held for at most one frame's names, or
// for kEntriesAtOnce entries.
#pragma once

#include <bitset>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "stage/slab.h"
#include "wire/frame.h"

namespace memferry {

struct PopularityConfig {
  std::uint64_t most_tables = 1;    // slots of the slab, for counts
  std::uint64_t most_contents = 0;  // slots of the slab, for pages
  std::uint64_t period_ms = 600'000;
};

struct PopularityStats {
  std::uint64_t names = 0;     // that are counted
  std::uint64_t contents = 0;  // pages that are held
  std::uint64_t tables = 0;    // slots of the slab
};

class Popularity {
 public:
  static constexpr std::size_t kWays = 8;
  static constexpr unsigned kSeats = 64;  // guests that are told apart
  static constexpr unsigned kPopularFrom = 2;
  static constexpr std::size_t kEntriesAtOnce = 65536;
  // A page that a guest was asked for, and that has not come after so long, is asked of another one.
  static constexpr std::uint64_t kPatienceMs = 10'000;
  // Of the slab, which stays free: contents are for room that is not needed.
  static constexpr std::uint64_t kFreeShare = 16;

  Popularity(std::shared_ptr<Slab> slab, PopularityConfig config);
  ~Popularity();
  Popularity(const Popularity&) = delete;
  Popularity& operator=(const Popularity&) = delete;

  // The guest in this seat has these. `wanted`: a bit for each whose page is to be sent; it has wanted_words().
  void report(std::uint16_t domain, std::span<const wire::ContentName> names, unsigned seat,
              std::uint64_t now_ms, std::span<std::uint64_t> wanted);
  // The page of a name. False: it is not wanted (any more), or there is no room.
  bool give(std::uint16_t domain, const wire::ContentName& name, std::span<const std::byte> page,
            std::uint64_t now_ms);
  // Names whose pages are held, of at least this score, from the cursor on and at most `most`. The cursor is 0 at the
  // beginning and becomes 0 again at the end; between there may be calls that give none.
  void list(std::uint16_t domain, std::uint64_t& cursor, std::uint32_t least_score, std::size_t most,
            std::uint64_t now_ms, std::vector<wire::PopularName>& into);
  // Where its page lies, with a count for the caller.
  std::optional<Slab::Slot> pin(std::uint16_t domain, const wire::ContentName& name, std::uint64_t now_ms);
  // Guests, and how long already; 0: not known.
  [[nodiscard]] std::uint32_t score(std::uint16_t domain, const wire::ContentName& name,
                                    std::uint64_t now_ms);

  // Gives up pages, the least useful first, until so many slots are free again, or none is left. For whoever needs the
  // room now: it may be a good deal more, so that the next one need not ask.
  void relieve(std::uint64_t slots);
  // Now and then, also when nobody reports: what has faded gives its page back.
  void tend(std::uint64_t now_ms);
  // Nobody is in this domain any more: what is counted of it is gone, though the places are freed by and by.
  void forget(std::uint16_t domain);
  // Whether they all are: until then the number is nobody else's.
  [[nodiscard]] bool forgotten(std::uint16_t domain) const;
  [[nodiscard]] PopularityStats stats() const;
  [[nodiscard]] const std::shared_ptr<Slab>& slab() const { return slab_; }

 private:
  struct Entry {
    wire::ContentName name;
    std::uint64_t now;     // seats, in `period`
    std::uint64_t before;  // and in the one before
    std::uint32_t period;
    std::uint32_t since;    // the period in which it came
    Slab::Slot slot;        // one above where the page lies; 0: it is not held
    std::uint16_t domain;   // 0: the place is free
    std::uint16_t asked_s;  // when somebody was asked for the page, in seconds; 0: nobody
  };
  static_assert(sizeof(Entry) == 48);

  [[nodiscard]] std::uint32_t period_at(std::uint64_t now_ms) const;
  [[nodiscard]] std::uint64_t entries() const { return blocks_.size() * entries_a_block_; }
  // With the mutex held:
  Entry* at(std::uint64_t index);
  Entry* find(std::uint16_t domain, const wire::ContentName& name, std::uint32_t period);
  Entry* make(std::uint16_t domain, const wire::ContentName& name, std::uint32_t period);
  // Brings it to this period; false when nothing is left of it, and its place is free.
  bool alive(Entry& entry, std::uint32_t period);
  void clear(Entry& entry);
  void give_up_page(Entry& entry);
  bool wants(const Entry& entry, std::uint64_t now_ms);
  void sweep(std::uint32_t period);
  // Gives up the least useful of some pages, if it is of less use than this.
  bool make_room_for(std::uint32_t score, std::uint32_t period);
  static std::uint32_t score_of(const Entry& entry, std::uint32_t period);

  const std::shared_ptr<Slab> slab_;
  const PopularityConfig config_;
  const std::uint64_t sets_a_block_;
  const std::uint64_t entries_a_block_;
  mutable std::mutex mutex_;        // guards the rest
  std::vector<Slab::Slot> blocks_;  // one above the slot; 0: none yet
  std::uint64_t tables_ = 0;
  std::uint64_t names_ = 0;
  std::uint64_t contents_ = 0;
  std::uint64_t hand_ = 0;       // of the sweep
  std::uint64_t swept_ = 0;      // entries, ever
  std::bitset<1U << 16U> gone_;  // domains whose entries count for nothing
  struct Going {
    std::uint16_t domain;
    std::uint64_t swept;  // by then the hand has been everywhere since
  };
  std::deque<Going> going_;
  std::uint64_t clock_ = 0;  // of the search for the least useful page
  std::uint32_t period_ = 0;
  std::uint32_t turn_ = 0;   // who leaves where all are alike
  std::uint32_t floor_ = 0;  // the score of the page that was given up last, in this period
};

}  // namespace memferry
