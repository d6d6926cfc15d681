// What an image's pages are, by hash under the session's key: a destination that has pages of its own finds out which of
// them need not come. What is hashed is the slot's bytes at this moment, whatever anybody has said of them.
#include "stage/stage_connection.h"

namespace memferry {

namespace {

// What a page that is hashed counts for in what is sent: a question is small, and its answer too, but not the work.
constexpr std::uint64_t kHashedForOneSent = 8;

}  // namespace

static_assert(std::is_same_v<KeyedHash, wire::TreeHash> && std::is_same_v<KeyedHashKey, wire::TreeKey>);

bool ReadingConnection::on_hash_request(const wire::FrameHeader& header) {
  if (demand_ || !place_.hash_key || !inside(header)) return false;
  if (!await_turn(place_.common->out, 0)) return false;
  if (!hasher_) hasher_.emplace(*place_.hash_key);
  place_.image->read(header.region, {PageNumber{header.first_page}, header.page_count}, reading_);
  const auto page_size = static_cast<std::size_t>(page_size_);
  page_hashes_.resize(reading_.slots().size());
  for (std::size_t i = 0; i < page_hashes_.size(); ++i) {
    const std::byte* const page = place_.common->slab->data(reading_.slots()[i]);
    hasher_->pages({page, page_size}, page_size_, &page_hashes_[i]);
  }
  using Kind = Image::Reading::Kind;
  headers_.clear();
  buffers_.clear();
  std::size_t content = 0;
  for (const Image::Reading::Piece& piece : reading_.pieces()) {
    const wire::FrameType type = piece.kind == Kind::kContent ? wire::FrameType::kHashes
                                 : piece.kind == Kind::kZero  ? wire::FrameType::kZero
                                                              : wire::FrameType::kAbsent;
    wire::FrameHeader& answer =
        headers_.emplace_back(wire::make_header(type, header.region, piece.run, header.tag));
    buffers_.push_back({&answer, sizeof answer});
    std::span<wire::TreeHash> hashes;
    if (piece.kind == Kind::kContent) {
      hashes = std::span(page_hashes_).subspan(content, static_cast<std::size_t>(piece.run.count));
      content += hashes.size();
      buffers_.push_back({hashes.data(), hashes.size_bytes()});
    }
    wire::seal(answer, std::as_bytes(hashes));
  }
  reading_.clear();
  place_.common->out.debit(page_hashes_.size() * page_size_ / kHashedForOneSent);
  return send(buffers_);
}

}  // namespace memferry
