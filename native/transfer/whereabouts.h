// Where each page of a guest that is being scattered has gone, as its source knows it: who holds it, with which hash,
// and whom that has still to be told. What is safe here is what the source may lose.
//
// A page is *safe* when a receiver whose memory holds its current content has acknowledged it: the destination, or
// every server that is to hold it. Whoever is to know of it (the destination, the index servers) has a bitmap of pages
// whose record has not been sent to it yet, so what waits to be told is bounded however slow a listener is.
//
// A page that goes out again because one of its two holders failed is not safe meanwhile, but has a *spare*: the other
// one's copy, which counts again where nobody takes a second one (restore()).
//
// Threads: any. A page's record changes in one of two ways at a time: the lane that sends it notes its hash, and
// after that the acknowledgement notes its holders; both are single atomic words. settle(), forget(), lose() and what
// is about spares keep the counts; they take the mutex.
#pragma once

#include <array>
#include <atomic>
#include <bitset>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "page/bitmap.h"
#include "transfer/events.h"
#include "wire/frame.h"

namespace memferry {

class Whereabouts {
 public:
  // `capacities`: of the regions, in pages. `listeners`: how many are told; the first `servers` of them are the
  // servers by ordinal, the last one is the destination.
  Whereabouts(std::span<const std::uint64_t> capacities, unsigned servers, unsigned index_servers);

  // A lane is sending these: their hashes as they leave, one a page.
  void note_hash(std::uint32_t region, PageNumber page, std::uint64_t xxh3, bool zero);

  // Acknowledged by all of `holders`. Gives how many of them became safe by it.
  std::uint64_t settle(std::uint32_t region, PageRun run, wire::Holders holders);
  // Written by the guest since, or wanted again: not safe any more, until they are settled anew.
  void forget(std::uint32_t region, PageRun run);
  struct Lost {
    std::vector<RegionRun> nowhere;  // not safe any more
    std::vector<RegionRun> single;   // another one holds them too: still safe, and told anew
  };
  // A server failed. Gives what it held, but for pages that the source has let go of (`gone`).
  Lost lose(std::uint8_t ordinal, const std::vector<std::unique_ptr<AtomicBitmap>>* gone);

  // Single ones that go out for another copy, their content as it is: not safe until they are settled anew or restored.
  void make_spare(std::uint32_t region, PageRun run);
  // One of these may have let go of its copy.
  void drop_spares(std::uint32_t region, PageRun run, const std::bitset<256>& holders,
                   const std::vector<std::unique_ptr<AtomicBitmap>>& gone);
  // All spares count again: safe, and told anew. Gives their pages.
  std::vector<RegionRun> restore();

  [[nodiscard]] bool safe(std::uint32_t region, PageNumber page) const { return safe_[region]->test(page); }
  [[nodiscard]] bool zero(std::uint32_t region, PageNumber page) const { return zero_[region]->test(page); }
  [[nodiscard]] std::uint64_t safe_count() const { return safe_count_.load(std::memory_order_acquire); }
  [[nodiscard]] wire::Holders holders(std::uint32_t region, PageNumber page) const;
  // Of the content that left last.
  [[nodiscard]] std::uint64_t hash(std::uint32_t region, PageNumber page) const;
  [[nodiscard]] std::span<const std::uint64_t> hashes(std::uint32_t region) const;

  // One record to tell: a run of equal holders, all zeros or none. Takes it off the listener's list.
  struct Record {
    std::uint32_t region = 0;
    PageRun run;
    wire::Holders holders;
    bool zero = false;
    std::span<const std::uint64_t> hashes;  // of the run; empty where the frame carries none
  };
  [[nodiscard]] bool next_untold(unsigned listener, std::uint64_t max_pages, Record& record);
  [[nodiscard]] bool anything_untold(unsigned listener) const;
  // A listener came back and may have missed some: everything that servers hold.
  void tell_again(unsigned listener);
  // Nothing is told any more.
  void silence(unsigned listener);

  [[nodiscard]] unsigned destination() const { return servers_; }  // as a listener
  [[nodiscard]] unsigned index_servers() const { return index_servers_; }
  [[nodiscard]] std::uint64_t pages_at(std::uint8_t holder) const;  // first holders only
  [[nodiscard]] std::uint64_t pages_single() const;                 // safe at one server and nowhere else
  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  struct Listener {
    std::vector<std::unique_ptr<AtomicBitmap>> untold;  // one a region
    std::atomic<std::uint64_t> count{0};
    std::atomic<bool> silent{false};
    // Where next_untold() goes on; its caller's alone.
    std::uint32_t region = 0;
    PageNumber at{0};
  };
  void mark_untold(unsigned listener, std::uint32_t region, PageRun run);
  bool unsettle_locked(std::uint32_t region, PageNumber page);
  void count_locked(wire::Holders holders, std::uint64_t by);

  const unsigned servers_;
  const unsigned index_servers_;
  std::vector<std::uint64_t> capacities_;
  std::vector<std::unique_ptr<std::uint64_t[]>> hashes_;  // by atomic_ref
  // first | second << 8; of a page that is not safe, who held it before
  std::vector<std::unique_ptr<std::atomic<std::uint16_t>[]>> holders_;
  std::vector<std::unique_ptr<AtomicBitmap>> zero_;
  std::vector<std::unique_ptr<AtomicBitmap>> safe_;
  std::vector<std::unique_ptr<AtomicBitmap>> spare_;  // not safe, and its holder has it as it is
  std::vector<std::unique_ptr<Listener>> listeners_;
  std::atomic<std::uint64_t> safe_count_{0};
  mutable std::mutex mutex_;             // one change at a time of what is safe; guards at_
  std::array<std::uint64_t, 256> at_{};  // safe pages by first holder
  std::uint64_t single_ = 0;             // likewise: that one server holds
};

}  // namespace memferry
