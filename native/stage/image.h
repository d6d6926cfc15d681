// One guest's memory as a server knows it: for every page of every region who holds it and its hash, and where its
// content lies if it is held here. Index server (the whole map) and content server (some of the pages) in one.
//
// The index lies in slots of the slab itself, taken for the whole capacity when the image is made; memory behind
// them comes with the first entry that is written. An entry of zeros is a page that nobody has told of.
//
// Threads: any. A mutex is held for at most kEntriesAtOnce entries, never over a system call on a socket. Content
// slots are pinned for those who read them, so whoever reads slowly holds nobody up.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "page/range.h"
#include "stage/content_domain.h"
#include "stage/held_state.h"
#include "stage/slab.h"
#include "stage/stage.h"
#include "wire/frame.h"

namespace memferry {

class Image {
 public:
  static constexpr std::size_t kMostRegions = 64;
  static constexpr std::uint64_t kEntriesAtOnce = 1024;

  // A run of pages as they are here, in order. Pins the content until it is cleared.
  class Reading {
   public:
    enum class Kind { kContent, kZero, kAbsent };
    struct Piece {
      Kind kind;
      PageRun run;
    };
    explicit Reading(std::shared_ptr<Slab> slab) : slab_(std::move(slab)) {}
    ~Reading() { clear(); }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;
    void clear();
    [[nodiscard]] std::span<const Piece> pieces() const { return pieces_; }
    // One of each a page of content, in order.
    [[nodiscard]] std::span<const Slab::Slot> slots() const { return slots_; }
    [[nodiscard]] std::span<const std::uint64_t> hashes() const { return hashes_; }

   private:
    friend class Image;
    std::shared_ptr<Slab> slab_;
    std::vector<Piece> pieces_;
    std::vector<Slab::Slot> slots_;
    std::vector<std::uint64_t> hashes_;
  };

  // Pages that the map knows the same of.
  struct MapRun {
    std::uint32_t region = 0;
    PageRun run;
    wire::Holders holders;
    bool zero = false;
    bool final = false;                 // told after the guest had left its source
    std::vector<std::uint64_t> hashes;  // one a page; none for zeros and for pages that the destination holds
  };
  struct Cursor {
    std::uint32_t region = 0;
    std::uint64_t page = 0;
  };

  // nullptr when the index finds no room; throws std::invalid_argument when a bound is exceeded.
  // `domain`: nullptr where it shares nothing.
  static std::shared_ptr<Image> create(std::shared_ptr<Slab> slab, const ImageConfig& config,
                                       std::shared_ptr<ContentDomain> domain = nullptr);
  ~Image() { drop(); }
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;

  [[nodiscard]] const ImageId& id() const { return id_; }
  [[nodiscard]] std::uint8_t ordinal() const { return ordinal_; }
  [[nodiscard]] const std::shared_ptr<Slab>& slab() const { return slab_; }
  [[nodiscard]] ContentDomain* domain() const { return domain_.get(); }
  [[nodiscard]] bool inside(std::uint32_t region, std::uint64_t first_page, std::uint64_t page_count) const;

  // The way of what a source sends: the server that is sent it, which may be another one that passes it on, and the
  // epoch of the source's connection to that.
  struct Chain {
    std::uint8_t ordinal = 0;
    std::uint32_t epoch = 0;
    bool operator==(const Chain&) const = default;
  };
  // From its return on nothing that comes by it, or by an earlier one of that server, changes anything here.
  void end_chain(Chain chain);
  // One a server.
  [[nodiscard]] std::vector<Chain> ended_chains() const;

  // All of these replace what was known of the pages; a run must lie inside its region. False when `by` has
  // ended: then only a part was changed, or nothing.
  // What the map says for good (see apply_map()) stands until the map itself says otherwise: what still comes of such a
  // page is the same once more, late or because a holder was lost.
  // Takes over one count of each slot, whatever it gives.
  // `shared`: they came by a reference.
  bool store(std::uint32_t region, PageRun run, std::span<const Slab::Slot> slots,
             std::span<const std::uint64_t> hashes, wire::Holders holders, bool shared = false,
             const std::optional<Chain>& by = {});
  bool store_zeros(std::uint32_t region, PageRun run, wire::Holders holders,
                   const std::optional<Chain>& by = {});
  // What was known is out of date, and what is newer is not here. What is known for good is not out of date, and stays;
  // so does content with the hash of what was to come, where these are given.
  bool forget(std::uint32_t region, PageRun run, const std::optional<Chain>& by = {},
              std::span<const std::uint64_t> to_come = {});
  // What the source says. Content stays only where this server is among the holders and it is the content meant.
  // `final`: it is what the guest left its source with; nothing will be said of these pages that is newer.
  bool apply_map(std::uint32_t region, PageRun run, wire::Holders holders, bool zero, bool final,
                 std::span<const std::uint64_t> hashes, const std::optional<Chain>& by = {});

  void read(std::uint32_t region, PageRun run, Reading& into);
  // Pages of the run that have content here, by position in it, and where that lies now.
  struct Place {
    std::uint64_t at;
    Slab::Slot slot;
  };
  void places(std::uint32_t region, PageRun run, std::vector<Place>& into);
  // The next maximal run at or after the cursor, which then stands behind it; content in at most `most_content`
  // pages. False at the end.
  bool next_map_run(Cursor& cursor, std::uint64_t most_content, MapRun& into);
  [[nodiscard]] bool whole(std::span<const std::uint64_t> region_pages);

  // Replaces the former one, which whoever reads it keeps. False: the image is gone.
  bool put_state(std::shared_ptr<const HeldState> state);
  // nullptr: it has none.
  [[nodiscard]] std::shared_ptr<const HeldState> state() const;
  void seal() { sealed_ = true; }
  [[nodiscard]] bool sealed() const { return sealed_; }

  [[nodiscard]] ImageStats stats() const;
  std::atomic<std::uint64_t> bytes_in{0};
  std::atomic<std::uint64_t> bytes_out{0};

  // It is about to be dropped: a run of zeros or of the map that is being taken in is left as far as it has come.
  void give_up() { given_up_.store(true, std::memory_order_relaxed); }
  // Gives all memory back to the system, index included. Nobody may use the image any more but for stats().
  void drop();

 private:
  struct Entry;

  Image(std::shared_ptr<Slab> slab, const ImageConfig& config, std::shared_ptr<ContentDomain> domain);
  // With the mutex held:
  [[nodiscard]] Entry& entry(std::uint32_t region, std::uint64_t page) const;
  // Changes the entry and the counts. True when `freed` is a slot that the image has let go of.
  bool set(Entry& entry, const Entry& to, Slab::Slot& freed);

  // to_of(position in the run, entry) gives what each becomes. `all`: even if the image was given up. Gives how many
  // were changed: fewer only when the image was given up, or `by` has ended.
  template <typename Change>
  std::uint64_t change(std::uint32_t region, PageRun run, bool all, const std::optional<Chain>& by,
                       const Change& to_of);

  const ImageId id_;
  const std::uint8_t ordinal_;
  const std::shared_ptr<Slab> slab_;
  const std::shared_ptr<ContentDomain> domain_;
  const std::uint64_t entries_a_slot_;
  std::atomic<bool> sealed_{false};
  std::atomic<bool> given_up_{false};

  const std::vector<std::uint64_t> region_pages_;

  mutable std::mutex mutex_;                    // guards what follows and every entry
  std::vector<std::vector<Slab::Slot>> index_;  // by region; empty after drop()
  std::uint64_t held_ = 0;
  std::uint64_t shared_ = 0;
  std::uint64_t zero_ = 0;
  std::uint64_t known_ = 0;
  std::shared_ptr<const HeldState> state_;
  std::map<std::uint8_t, std::uint32_t> ended_chains_;  // by ordinal, the epoch
};

}  // namespace memferry
