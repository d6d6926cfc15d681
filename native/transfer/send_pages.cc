#include "transfer/send_pages.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "page/hash.h"
#include "page/zero.h"

namespace memferry {
namespace {

std::uint64_t hash_of_zeros(std::uint64_t page_size) {
  return xxh3_64(std::vector<std::byte>(static_cast<std::size_t>(page_size)));
}

}  // namespace

PageFrames::PageFrames(std::uint64_t page_size, std::unique_ptr<PageEncoder> encoder,
                       std::unique_ptr<PageReferrer> referrer)
    : page_size_(page_size),
      zero_hash_(hash_of_zeros(page_size)),
      encoder_(std::move(encoder)),
      referrer_(std::move(referrer)) {
  const auto pages = static_cast<std::size_t>(wire::max_run_pages(page_size));
  if (referrer_) digests_.resize(pages);  // they stay where they are until send()
  hashes_.resize(pages);
  // Every page a frame of its own at worst: reserved, since buffers_ points into headers_.
  headers_.reserve(pages);
  buffers_.reserve(2 * pages);
  runs_.reserve(pages);
}

std::uint64_t PageFrames::memory_bytes() const {
  return hashes_.size() * sizeof hashes_[0] + headers_.capacity() * sizeof(wire::FrameHeader) +
         buffers_.capacity() * sizeof(iovec) + runs_.capacity() * sizeof(RegionRun) +
         digests_.capacity() * sizeof(ContentDigest) + reader_.memory_bytes() +
         (encoder_ ? encoder_->memory_bytes() : 0) + (referrer_ ? referrer_->memory_bytes() : 0);
}

void PageFrames::start_batch() {
  sent_ = false;
  used_ = 0;
  content_pages_ = zero_pages_ = referred_pages_ = plain_on_wire_ = 0;
  digests_used_ = 0;
  views_.clear();
  reader_.reset();
  headers_.clear();
  buffers_.clear();
  runs_.clear();
  if (encoder_) encoder_->begin();
  if (referrer_) referrer_->begin(references_allowed_);
}

void PageFrames::put_header(wire::FrameType type, std::uint32_t region, PageRun run, std::uint16_t flags) {
  wire::FrameHeader& header = headers_.emplace_back(wire::make_header(type, region, run, tag_));
  header.flags = flags;
  buffers_.push_back({&header, sizeof header});
}

void PageFrames::put_content(std::uint32_t region, PageRun run, std::uint16_t flags,
                             const PageEncoder::Piece& piece, std::span<const std::uint64_t> hashes) {
  put_header(wire::FrameType::kPages, region, run, flags);
  if (piece.encoding == 0) {
    wire::seal_pages(headers_.back(), page_size_, hashes);
  } else {
    wire::seal_encoded(headers_.back(), piece.encoding, piece.payload.size(), hashes);
  }
  buffers_.push_back({const_cast<std::byte*>(piece.payload.data()), piece.payload.size()});
  content_pages_ += run.count;
  plain_on_wire_ += piece.payload.size();
}

// As whoever looks at more than the hash may see them: a copy, or the guest's own memory.
std::span<const std::byte> PageFrames::steady(std::span<const std::byte> bytes, bool& held) {
  held = true;
  if (encoder_) {
    if (const auto copy = encoder_->hold(bytes)) return *copy;
  }
  if (referrer_ && referrer_->looks()) {
    bytes = referrer_->hold(bytes);
    // Copied for no codec: to those it is as if it lay in the guest's memory.
    held = false;
    return bytes;
  }
  held = false;
  return views_.emplace_back(bytes).bytes();
}

void PageFrames::add_content(std::uint32_t region, PageRun run, std::span<const std::byte> bytes, bool held,
                             std::uint16_t flags, std::span<const std::uint64_t> hashes) {
  if (!referrer_ || !referrer_->looks()) {
    if (referrer_) referrer_->sample(bytes);
    return add_plain(region, run, bytes, held, flags, hashes);
  }
  referrer_->look(region, run.first, bytes);
  const std::vector<bool>& known = referrer_->known();
  const auto size = static_cast<std::size_t>(page_size_);
  const auto pages = static_cast<std::size_t>(run.count);
  for (std::size_t page = 0; page < pages;) {
    std::size_t end = page + 1;
    while (end < pages && known[end] == known[page]) ++end;
    const PageRun part{PageNumber{run.first.value + page}, end - page};
    if (known[page]) {
      add_references(region, part, referrer_->digests().subspan(page, end - page));
      if (encoder_) encoder_->elsewhere(region, part);
    } else {
      add_plain(region, part, bytes.subspan(page * size, (end - page) * size), held, flags,
                hashes.subspan(page, end - page));
    }
    page = end;
  }
}

void PageFrames::add_plain(std::uint32_t region, PageRun run, std::span<const std::byte> bytes, bool held,
                           std::uint16_t flags, std::span<const std::uint64_t> hashes) {
  if (!encoder_) return put_content(region, run, flags, {run.count, 0, bytes}, hashes);
  std::size_t at = 0;
  encoder_->encode(region, run.first, bytes, held, [&](const PageEncoder::Piece& piece) {
    const auto count = static_cast<std::size_t>(piece.pages);
    put_content(region, {PageNumber{run.first.value + at}, piece.pages}, flags, piece,
                hashes.subspan(at, count));
    at += count;
  });
}

void PageFrames::add_references(std::uint32_t region, PageRun run, std::span<const ContentDigest> digests) {
  const std::span<ContentDigest> kept = std::span(digests_).subspan(digests_used_, digests.size());
  std::copy(digests.begin(), digests.end(), kept.begin());
  digests_used_ += digests.size();
  put_header(wire::FrameType::kKnownReference, region, run, 0);
  wire::seal(headers_.back(), std::as_bytes(kept));
  buffers_.push_back({kept.data(), kept.size_bytes()});
  referred_pages_ += run.count;
  referrer_->refer(region, run, sizeof(wire::FrameHeader) + kept.size_bytes());
}

// Hashed first and compared with zeros only where the hash says so: most pages are not zeros, and looking at
// each before hashing it costs a cache miss a page. A page that a guest writes between the two fails its
// checksum at the destination, like every torn copy.
PageRun PageFrames::add(std::uint32_t region, const Region& memory, PageRun run, std::uint16_t flags,
                        const OnHash& on_hash) {
  if (sent_) start_batch();
  const std::span<const std::byte> bytes = reader_.read(memory, run);
  add(region, run.first, bytes, flags, on_hash);
  return {run.first, bytes.size() / page_size_};
}

void PageFrames::add(std::uint32_t region, PageNumber first, std::span<const std::byte> bytes,
                     std::uint16_t flags, const OnHash& on_hash) {
  if (sent_) start_batch();
  const std::size_t size = static_cast<std::size_t>(page_size_);
  const std::size_t pages = bytes.size() / size;
  if (pages == 0 || pages > room()) throw std::logic_error("a batch of pages that is too long");
  bool held = false;
  bytes = steady(bytes, held);
  const std::span<std::uint64_t> hashes(&hashes_[used_], pages);
  hash_pages(bytes, page_size_, hashes.data());
  used_ += pages;
  const auto zero = [&](std::size_t page) {
    return hashes[page] == zero_hash_ && is_zero(bytes.subspan(page * size, size));
  };
  runs_.push_back({region, {first, pages}});
  for (std::size_t page = 0; page < pages;) {
    const bool zeros = zero(page);
    std::size_t end = page + 1;
    while (end < pages && zero(end) == zeros) ++end;
    const PageRun run{PageNumber{first.value + page}, end - page};
    if (on_hash) {
      for (std::size_t i = page; i < end; ++i) on_hash(PageNumber{first.value + i}, hashes[i], zeros);
    }
    if (zeros) {
      put_header(wire::FrameType::kZero, region, run, flags);
      wire::seal(headers_.back());
      zero_pages_ += run.count;
      if (encoder_) encoder_->elsewhere(region, run);
    } else {
      add_content(region, run, bytes.subspan(page * size, (end - page) * size), held, flags,
                  hashes.subspan(page, end - page));
    }
    page = end;
  }
}

void PageFrames::add_zeros(std::uint32_t region, PageRun run, const OnHash& on_hash) {
  if (sent_) start_batch();
  if (room() == 0) throw std::logic_error("a batch of pages that is too long");
  if (on_hash) {
    for (PageNumber page = run.first; page < run.end(); ++page.value) on_hash(page, zero_hash_, true);
  }
  ++used_;
  if (encoder_) encoder_->elsewhere(region, run);
  put_header(wire::FrameType::kZero, region, run, 0);
  wire::seal(headers_.back());
  runs_.push_back({region, run});
  zero_pages_ += run.count;
}

std::uint64_t PageFrames::bytes() const {
  std::uint64_t bytes = 0;
  for (const iovec& buffer : buffers_) bytes += buffer.iov_len;
  return bytes;
}

PageFrames::Sent PageFrames::send(wire::Stream& stream) {
  Sent sent{{}, bytes(), content_pages_, zero_pages_, referred_pages_, runs_};
  sent.result = stream.send_all(buffers_);
  sent_ = true;
  if (encoder_) encoder_->sent(stream.fd(), content_pages_ * page_size_);
  if (referrer_) {
    referrer_->sent(stream.fd(), referred_pages_ * page_size_, content_pages_ * page_size_, plain_on_wire_);
  }
  return sent;
}

}  // namespace memferry
