// Pages that the destination has already go as references: what it has told (KnownNames), and for each connection
// whether and which of its pages are looked up (PageReferrer). The destination's answers, too.
//
// What is hashed stands still: a batch that is looked at is first copied out of the guest's memory, so the reference,
// the page's XXH3 (which a tracker that compares content is told) and what goes plainly are of the same bytes. Otherwise
// a tracker would be told of one state of the page while the destination has got another.
//
// A reference may come to nothing: the destination says so before it answers the barrier. Such a page is pending again
// at once, and never goes as a reference any more.
//
// Threads: References any; a PageReferrer is of one connection's sending thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "page/bitmap.h"
#include "page/content_hash.h"
#include "page/range.h"
#include "transfer/dedup_stats.h"
#include "transfer/known_names.h"
#include "transfer/reference_pace.h"
#include "transfer/send_queue.h"
#include "wire/link_meter.h"

namespace memferry {

// Of one sender.
class References {
 public:
  References(const ContentKey& key, const SendQueue& queue);

  // A kKnown frame.
  void told(std::span<const std::byte> names) { names_.add(names_in(names)); }
  // A kUnresolved frame, well-formed, its run inside the region. Empty, or what the destination did wrong; the pages are
  // the caller's to queue again.
  std::string unresolved(std::uint32_t region, PageRun run, std::span<const std::byte> names);
  [[nodiscard]] DedupStats stats() const;
  // Of the bitmaps, and of what was told.
  [[nodiscard]] std::uint64_t memory_bytes() const;
  [[nodiscard]] std::uint64_t names_bytes() const { return names_.memory_bytes(); }

 private:
  friend class PageReferrer;
  struct Pages {
    explicit Pages(std::uint64_t capacity) : referred(capacity), plain(capacity) {}
    AtomicBitmap referred;  // went as references, and were not refused
    AtomicBitmap plain;     // were refused: they go as they are
  };
  [[nodiscard]] static std::span<const wire::KnownName> names_in(std::span<const std::byte> payload);

  const ContentHasher hasher_;
  KnownNames names_;
  std::vector<std::unique_ptr<Pages>> regions_;
  std::atomic<std::uint64_t> pages_{0};
  std::atomic<std::uint64_t> refused_{0};
  std::atomic<std::uint64_t> refused_lately_{0};  // no connection's pace knows of these yet
  std::atomic<std::uint64_t> examined_{0};
  std::atomic<std::uint64_t> overhead_bytes_{0};
  std::atomic<std::uint64_t> hash_ns_{0};
  std::atomic<double> link_rate_{0};  // bytes/s, of all connections that have been full
};

class PageReferrer {
 public:
  using Clock = std::chrono::steady_clock;

  PageReferrer(References& shared, std::uint64_t page_size);
  ~PageReferrer();
  PageReferrer(const PageReferrer&) = delete;
  PageReferrer& operator=(const PageReferrer&) = delete;

  // A new batch. `allowed` false: nothing is looked at.
  void begin(bool allowed);
  // Whether this batch is looked at: its pages are to be copied (hold()) first.
  [[nodiscard]] bool looks() const { return looks_; }
  [[nodiscard]] std::span<const std::byte> hold(std::span<const std::byte> guest_bytes);
  // known()[i]: page i of these, which are not zeros, goes as a reference to digests()[i]. Valid until the next call.
  void look(std::uint32_t region, PageNumber first, std::span<const std::byte> bytes);
  [[nodiscard]] const std::vector<bool>& known() const { return known_; }
  [[nodiscard]] std::span<const ContentDigest> digests() const { return digests_; }
  // Of a batch that is not looked at: hashes a few of these pages now and then.
  void sample(std::span<const std::byte> bytes);
  // These go as references.
  void refer(std::uint32_t region, PageRun run, std::uint64_t frame_bytes);

  // The batch has been handed to the socket: pages by reference and plainly, and what the latter became.
  void sent(int fd, std::uint64_t referred_bytes, std::uint64_t plain_bytes, std::uint64_t plain_on_wire);
  void waited(std::chrono::steady_clock::duration duration) { meter_.waited(duration); }
  void rest() { meter_.rest(); }
  // What one comes to.
  [[nodiscard]] static std::uint64_t most_memory_bytes(std::uint64_t page_size) {
    return wire::max_payload(page_size) + 2 * wire::max_run_pages(page_size) * sizeof(ContentDigest);
  }
  [[nodiscard]] std::uint64_t memory_bytes() const {
    return held_.capacity() + digests_.capacity() * sizeof(ContentDigest);
  }

 private:
  void hash(std::span<const std::byte> bytes, std::size_t page);
  void link_takes(double rate);

  References& shared_;
  const std::size_t page_size_;
  ReferencePace pace_;
  wire::LinkMeter meter_;
  bool looks_ = false;
  std::uint64_t sample_ = 0;  // pages of this batch
  std::vector<std::byte> held_;
  std::size_t held_used_ = 0;
  std::vector<ContentDigest> digests_;
  std::vector<wire::KnownName> names_;
  std::vector<bool> known_;
  // Since the last window.
  std::uint64_t window_plain_ = 0;
  std::uint64_t window_on_wire_ = 0;
  double plain_ratio_ = 1;
  double link_rate_ = 0;  // its part of the shared one
};

}  // namespace memferry
