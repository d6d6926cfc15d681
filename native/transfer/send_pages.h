// From pages in memory to frames on a stream: zero pages become kZero runs, the others are hashed once, while
// they are in the cache, and leave straight from the guest's memory, encoded (PageEncoder), or as references to what the
// destination has (PageReferrer).
//
// Threads: one a PageFrames object; each sending thread has its own.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "page/racy_read.h"
#include "page/range.h"
#include "page/region_reader.h"
#include "transfer/events.h"
#include "transfer/page_encoder.h"
#include "transfer/page_referrer.h"
#include "wire/frame.h"
#include "wire/stream.h"

namespace memferry {

// A batch: pieces are added until it is full(), then sent at once. Scattered dirty pages share a system call.
class PageFrames {
 public:
  using OnHash = std::function<void(PageNumber page, std::uint64_t xxh3, bool zero)>;

  // `encoder` nullptr: every page as it is. `referrer` nullptr: none as a reference.
  explicit PageFrames(std::uint64_t page_size, std::unique_ptr<PageEncoder> encoder = nullptr,
                      std::unique_ptr<PageReferrer> referrer = nullptr);

  // `bytes` are the pages of the region from `first` on, contiguous in memory, at most room() of them; they
  // must stay where they are until send(). `flags` goes into every frame. `on_hash`, if any, sees every page.
  void add(std::uint32_t region, PageNumber first, std::span<const std::byte> bytes, std::uint16_t flags,
           const OnHash& on_hash);
  // The same of `memory`, for the pages of `run` that are contiguous there; gives those. Throws SystemError, OwnerGone.
  PageRun add(std::uint32_t region, const Region& memory, PageRun run, std::uint16_t flags,
              const OnHash& on_hash);
  // One kZero frame of any length, for pages that were never touched.
  void add_zeros(std::uint32_t region, PageRun run, const OnHash& on_hash);

  // Who is to hold the pages, from the next batch on. A VMD server is told, by every frame's tag.
  void set_holders(wire::Holders holders) {
    tag_ = holders.first == wire::Holders::kDestination ? 0 : holders.tag();
    if (encoder_) encoder_->set_receiver(holders);
  }
  // Whether pages may go as references, from the next batch on.
  void allow_references(bool allowed) { references_allowed_ = allowed; }

  // Pages that may still be added.
  [[nodiscard]] std::uint64_t room() const { return sent_ ? hashes_.size() : hashes_.size() - used_; }
  [[nodiscard]] bool empty() const { return sent_ || headers_.empty(); }

  struct Sent {
    wire::IoResult result;
    std::uint64_t bytes = 0;
    std::uint64_t content_pages = 0;
    std::uint64_t zero_pages = 0;
    std::uint64_t referred_pages = 0;
    std::span<const RegionRun> runs;  // valid until the next call
  };
  // What the batch holds now.
  [[nodiscard]] std::span<const RegionRun> runs() const { return runs_; }
  [[nodiscard]] std::uint64_t bytes() const;
  [[nodiscard]] std::uint64_t content_pages() const { return content_pages_; }
  // Writes the batch; then it is empty, whatever the outcome.
  Sent send(wire::Stream& stream);
  // For the encoder's measuring: the sender was held up for the connection's sake; it has nothing to send for a while.
  void waited(std::chrono::steady_clock::duration duration) {
    if (encoder_) encoder_->waited(duration);
    if (referrer_) referrer_->waited(duration);
  }
  void rest() {
    if (encoder_) encoder_->rest();
    if (referrer_) referrer_->rest();
  }

  [[nodiscard]] std::uint64_t memory_bytes() const;

 private:
  void start_batch();
  void put_header(wire::FrameType type, std::uint32_t region, PageRun run, std::uint16_t flags);
  std::span<const std::byte> steady(std::span<const std::byte> bytes, bool& held);
  void add_content(std::uint32_t region, PageRun run, std::span<const std::byte> bytes, bool held,
                   std::uint16_t flags, std::span<const std::uint64_t> hashes);
  void add_plain(std::uint32_t region, PageRun run, std::span<const std::byte> bytes, bool held,
                 std::uint16_t flags, std::span<const std::uint64_t> hashes);
  void add_references(std::uint32_t region, PageRun run, std::span<const ContentDigest> digests);
  void put_content(std::uint32_t region, PageRun run, std::uint16_t flags, const PageEncoder::Piece& piece,
                   std::span<const std::uint64_t> hashes);

  const std::uint64_t page_size_;
  const std::uint64_t zero_hash_;
  const std::unique_ptr<PageEncoder> encoder_;
  const std::unique_ptr<PageReferrer> referrer_;
  bool references_allowed_ = true;
  std::vector<std::uint64_t> hashes_;  // of the pages of the batch
  std::uint64_t tag_ = 0;
  std::size_t used_ = 0;  // of hashes_; a zero run counts as one page
  bool sent_ = true;      // the next add() begins a new batch
  std::deque<RacyView> views_;
  RegionReader reader_;
  std::vector<wire::FrameHeader> headers_;
  std::vector<iovec> buffers_;
  std::vector<RegionRun> runs_;
  std::vector<ContentDigest> digests_;  // of the batch's references
  std::size_t digests_used_ = 0;
  std::uint64_t content_pages_ = 0;
  std::uint64_t zero_pages_ = 0;
  std::uint64_t referred_pages_ = 0;
  std::uint64_t plain_on_wire_ = 0;
};

}  // namespace memferry
