#include "transfer/send_pages.h"

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

PageFrames::PageFrames(std::uint64_t page_size, std::unique_ptr<PageEncoder> encoder)
    : page_size_(page_size), zero_hash_(hash_of_zeros(page_size)), encoder_(std::move(encoder)) {
  const auto pages = static_cast<std::size_t>(wire::max_run_pages(page_size));
  hashes_.resize(pages);
  // Every page a frame of its own at worst: reserved, since buffers_ points into headers_.
  headers_.reserve(pages);
  buffers_.reserve(2 * pages);
  runs_.reserve(pages);
}

std::uint64_t PageFrames::memory_bytes() const {
  return hashes_.size() * sizeof hashes_[0] + headers_.capacity() * sizeof(wire::FrameHeader) +
         buffers_.capacity() * sizeof(iovec) + runs_.capacity() * sizeof(RegionRun) +
         (encoder_ ? encoder_->memory_bytes() : 0);
}

void PageFrames::start_batch() {
  sent_ = false;
  used_ = 0;
  content_pages_ = zero_pages_ = 0;
  views_.clear();
  headers_.clear();
  buffers_.clear();
  runs_.clear();
  if (encoder_) encoder_->begin();
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
}

// Hashed first and compared with zeros only where the hash says so: most pages are not zeros, and looking at
// each before hashing it costs a cache miss a page. A page that a guest writes between the two fails its
// checksum at the destination, like every torn copy.
void PageFrames::add(std::uint32_t region, PageNumber first, std::span<const std::byte> bytes,
                     std::uint16_t flags, const OnHash& on_hash) {
  if (sent_) start_batch();
  const std::size_t size = static_cast<std::size_t>(page_size_);
  const std::size_t pages = bytes.size() / size;
  if (pages == 0 || pages > room()) throw std::logic_error("a batch of pages that is too long");
  const auto held = encoder_ ? encoder_->hold(bytes) : std::nullopt;
  bytes = held ? *held : views_.emplace_back(bytes).bytes();
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
      if (encoder_) encoder_->zeros(region, run);
    } else {
      const auto content = bytes.subspan(page * size, (end - page) * size);
      if (!encoder_) {
        put_content(region, run, flags, {run.count, 0, content}, hashes.subspan(page, end - page));
      } else {
        std::size_t at = page;
        encoder_->encode(region, run.first, content, held.has_value(), [&](const PageEncoder::Piece& piece) {
          const auto count = static_cast<std::size_t>(piece.pages);
          put_content(region, {PageNumber{first.value + at}, piece.pages}, flags, piece,
                      hashes.subspan(at, count));
          at += count;
        });
      }
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
  if (encoder_) encoder_->zeros(region, run);
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
  Sent sent{{}, bytes(), content_pages_, zero_pages_, runs_};
  sent.result = stream.send_all(buffers_);
  sent_ = true;
  if (encoder_) encoder_->sent(stream.fd(), content_pages_ * page_size_);
  return sent;
}

}  // namespace memferry
