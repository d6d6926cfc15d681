#include "transfer/page_encoder.h"

#include <algorithm>
#include <stdexcept>

#include "os/thread_clock.h"
#include "page/racy_read.h"
#include "wire/delta.h"
#include "wire/frame.h"

namespace memferry {
namespace {

// A page of which more than that has changed goes like any other.
constexpr std::size_t kMostOfPage = 2;

std::uint16_t allowed_for(const Encoding& encoding, Towards towards) {
  return towards == Towards::kDestination ? encoding.destination : encoding.servers;
}

}  // namespace

std::unique_ptr<PageEncoder> PageEncoder::create(const Encoding& encoding, Towards towards,
                                                 std::uint64_t page_size) {
  const std::uint16_t allowed = allowed_for(encoding, towards);
  const bool compress = encoding.compress != wire::Compress::kOff && (allowed & wire::kCompressions) != 0;
  if (!compress && encoding.cache == nullptr) return nullptr;
  return std::unique_ptr<PageEncoder>(new PageEncoder(encoding, towards, page_size));
}

PageEncoder::PageEncoder(const Encoding& encoding, Towards towards, std::uint64_t page_size)
    : page_size_(static_cast<std::size_t>(page_size)),
      delta_((allowed_for(encoding, towards) & wire::kFlagDelta) != 0),
      cache_(encoding.cache),
      delta_counters_(encoding.delta) {
  const std::uint16_t allowed = allowed_for(encoding, towards);
  if (encoding.compress != wire::Compress::kOff && (allowed & wire::kCompressions) != 0) {
    compressor_.emplace(encoding.compress, allowed, *encoding.compression);
  }
}

void PageEncoder::begin() {
  compressing_ = compressor_ && compressor_->begin();
  rounds_ = cache_ != nullptr && cache_->open();
  held_used_ = encoded_used_ = 0;
}

std::optional<std::span<const std::byte>> PageEncoder::hold(std::span<const std::byte> guest_bytes) {
  if (!compressing_ && !makes_deltas()) return std::nullopt;
  const auto most = static_cast<std::size_t>(wire::max_payload(page_size_));
  if (held_.empty()) {
    held_.resize(most);
    encoded_.resize(most);
  }
  if (guest_bytes.size() > most - held_used_) throw std::logic_error("a batch of pages that is too long");
  std::byte* to = held_.data() + held_used_;
  racy_copy(to, guest_bytes.data(), guest_bytes.size());
  held_used_ += guest_bytes.size();
  return std::span<const std::byte>(to, guest_bytes.size());
}

void PageEncoder::encode(std::uint32_t region, PageNumber first, std::span<const std::byte> bytes, bool held,
                         const std::function<void(const Piece&)>& piece) {
  const std::size_t pages = bytes.size() / page_size_;
  if (compressor_ && compressor_->tries_out()) {
    std::span<const std::byte> part = bytes.first(std::min(bytes.size(), wire::RunCompressor::kTryBytes));
    if (!held) {
      bases_.resize(std::max(bases_.size(), part.size()));
      racy_copy(bases_.data(), part.data(), part.size());
      part = std::span<const std::byte>(bases_).first(part.size());
    }
    scratch_.resize(wire::RunCompressor::kTryBytes);
    compressor_->try_out(codec_, part, scratch_);
  }
  const bool deltas = held && makes_deltas();
  if (deltas) {
    find_bases(region, first, pages);
  } else if (rounds_) {
    // Held by somebody else from now on, or not as it was.
    cache_->forget(region, {first, pages});
  }
  for (std::size_t at = 0; at < pages;) {
    if (deltas && has_base_[at]) {
      if (const auto made = delta(bytes, at)) {
        piece(*made);
        at += static_cast<std::size_t>(made->pages);
        continue;
      }
      has_base_[at] = false;
    }
    std::size_t end = at + 1;
    while (end < pages && !(deltas && has_base_[end])) ++end;
    const auto part = bytes.subspan(at * page_size_, (end - at) * page_size_);
    piece(held && compressing_ ? compressed(part) : Piece{end - at, 0, part});
    at = end;
  }
  if (!deltas) return;
  const ThreadCpuTimer timer(delta_counters_->cpu_ns);
  for (std::size_t at = 0; at < pages; ++at) {
    cache_->put(region, PageNumber{first.value + at}, receiver_, bytes.subspan(at * page_size_, page_size_));
  }
}

PageEncoder::Piece PageEncoder::compressed(std::span<const std::byte> bytes) {
  const std::uint64_t pages = bytes.size() / page_size_;
  std::uint16_t encoding = 0;
  const std::span<std::byte> out = std::span(encoded_).subspan(encoded_used_);
  const std::size_t length = compressor_->compress(codec_, bytes, pages, out, encoding);
  if (length == 0) return {pages, 0, bytes};
  encoded_used_ += length;
  return {pages, encoding, out.first(length)};
}

void PageEncoder::find_bases(std::uint32_t region, PageNumber first, std::size_t pages) {
  const ThreadCpuTimer timer(delta_counters_->cpu_ns);
  has_base_.resize(std::max(has_base_.size(), pages));
  bases_.resize(std::max(bases_.size(), pages * page_size_));
  for (std::size_t at = 0; at < pages; ++at) {
    has_base_[at] = cache_->get(region, PageNumber{first.value + at}, receiver_,
                                std::span(bases_).subspan(at * page_size_, page_size_));
  }
}

// As many pages from `from` on as have a base that they are close to.
std::optional<PageEncoder::Piece> PageEncoder::delta(std::span<const std::byte> bytes, std::size_t from) {
  const ThreadCpuTimer timer(delta_counters_->cpu_ns);
  const std::size_t pages = bytes.size() / page_size_;
  const std::span<std::byte> out = std::span(encoded_).subspan(encoded_used_);
  wire::DeltaEncoder encoder(out);
  std::size_t end = from;
  while (end < pages && has_base_[end] &&
         encoder.add(std::span(bases_).subspan(end * page_size_, page_size_),
                     bytes.subspan(end * page_size_, page_size_), page_size_ / kMostOfPage)) {
    ++end;
  }
  if (end == from) return std::nullopt;
  const std::size_t length = encoder.finish();
  encoded_used_ += length;
  const std::uint64_t count = end - from;
  delta_counters_->raw_bytes.fetch_add(count * page_size_, std::memory_order_relaxed);
  delta_counters_->encoded_bytes.fetch_add(length, std::memory_order_relaxed);
  delta_counters_->pages.fetch_add(count, std::memory_order_relaxed);
  return Piece{count, wire::kFlagDelta, out.first(length)};
}

void PageEncoder::elsewhere(std::uint32_t region, PageRun run) {
  if (rounds_) cache_->forget(region, run);
}

void PageEncoder::sent(int fd, std::uint64_t raw_bytes) {
  if (compressor_) compressor_->sent(fd, raw_bytes);
}

void PageEncoder::waited(std::chrono::steady_clock::duration duration) {
  if (compressor_) compressor_->waited(duration);
}

void PageEncoder::rest() {
  if (compressor_) compressor_->rest();
}

std::uint64_t PageEncoder::most_memory_bytes(std::uint64_t page_size) {
  // zstd's context at its fastest levels, measured with runs of 256 KiB.
  constexpr std::uint64_t kCodecBytes = 640 * 1024;
  return 3 * wire::max_payload(page_size) + wire::RunCompressor::kTryBytes + kCodecBytes;
}

std::uint64_t PageEncoder::memory_bytes() const {
  return held_.capacity() + encoded_.capacity() + bases_.capacity();
}

}  // namespace memferry
