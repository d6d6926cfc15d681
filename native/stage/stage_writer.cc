// Connections that write: pages, zeros and barriers from a source or from another server, the map from a source.
//
// A page that does not get here, for want of room or because its checksum does not fit, is told to the writer
// (kRefused), and what was held of it before is forgotten: it is out of date, and must never be read again. But for what
// the map says for good, or what is here already: such a page comes late, when its source counts on what is here or
// elsewhere.
#include <algorithm>
#include <cstring>

#include "page/hash.h"
#include "stage/stage_connection.h"

namespace memferry {
namespace {

// Received and hashed before it leaves the cache.
constexpr std::size_t kLargestPiece = 64 * 1024;
constexpr std::size_t kLeastPiece = 4 * 1024;
// What takes longer comes in smaller pieces, so that the source hears often enough that it comes.
constexpr std::chrono::milliseconds kSlowPiece{250};
// A longer list of hashes is rare: its memory is not kept.
constexpr std::size_t kHashesKept = 4096;

std::uint8_t chain_ordinal(std::uint16_t session) {
  return static_cast<std::uint8_t>(session - wire::kFirstChainSession);
}

}  // namespace

WritingConnection::WritingConnection(Place place, UniqueFd fd)
    : StageConnection(std::move(place), std::move(fd)),
      source_(place_.role == wire::StageRole::kScatter),
      by_(source_ ? Image::Chain{place_.image->ordinal(), place_.epoch}
                  : Image::Chain{chain_ordinal(place_.session), 0}),
      answers_([this](wire::FrameHeader header) {
        iovec buffer{&header, sizeof header};
        return send(std::span(&buffer, 1));
      }),
      chains_(
          place_.image, place_.epoch, place_.chains, answers_, thread_, [this] { interrupt(); },
          place_.common->chain_timeouts),
      base_(place_.common->slab) {
  slots_.reserve(static_cast<std::size_t>(wire::max_run_pages(page_size_)));
}

WritingConnection::~WritingConnection() { join(); }

void WritingConnection::serve() {
  bool goodbye = false;
  try {
    wire::FrameHeader header;
    while (read_header(header) && serve_frame(header, goodbye) && !goodbye) {
    }
  } catch (...) {
    chains_.close();
    throw;
  }
  if (goodbye) chains_.goodbye();
  chains_.close();
}

bool WritingConnection::serve_frame(const wire::FrameHeader& header, bool& goodbye) {
  switch (static_cast<wire::FrameType>(header.type)) {
    case wire::FrameType::kPages:
      return on_pages(header);
    case wire::FrameType::kZero:
      return on_zeros(header);
    case wire::FrameType::kMap:
      return source_ && on_map(header);
    case wire::FrameType::kBarrier:
      return on_barrier(header);
    case wire::FrameType::kReference:
      return on_reference(header);
    case wire::FrameType::kChainOf:
      return on_chain_of(header);
    case wire::FrameType::kChainOver:
      return on_chain_over(header);
    case wire::FrameType::kGoodbye:
      goodbye = bare_checksum_fits(header);
      return goodbye;
    default:
      return false;
  }
}

bool WritingConnection::meant_for_us(wire::Holders holders, std::uint64_t tag) const {
  using wire::Holders;
  if (holders.tag() != tag || holders.first == holders.second) return false;
  const std::uint8_t us = place_.image->ordinal();
  const std::uint8_t ours = source_ ? holders.first : holders.second;
  const std::uint8_t other = source_ ? holders.second : holders.first;
  return ours == us && (other < Holders::kMostServers || (source_ && other == Holders::kNobody));
}

bool WritingConnection::on_pages(const wire::FrameHeader& header) {
  const wire::Holders holders = wire::Holders::of(header.tag);
  if (!inside(header) || !meant_for_us(holders, header.tag)) return false;
  if (!await_turn(place_.common->in, header.payload_bytes)) return false;
  if (wire::encoding_of(header) != 0) return on_encoded(header);

  const PageRun run = run_of(header);
  // What is left in hand at the end: everything when nothing was stored, else the counts for passing it on.
  Slab& slab = *place_.common->slab;
  const SlotsInHand in_hand(slab, slots_);
  auto here = static_cast<std::size_t>(slab.take(run.count, slots_));
  hashes_.resize(static_cast<std::size_t>(run.count));
  if (!receive_pages(hashes_)) return false;
  if (wire::pages_checksum(header, hashes_) != header.checksum) return refuse_torn(header);
  make_room(header.region, run);
  const auto page_size = static_cast<std::size_t>(page_size_);
  for (const std::byte* page = scratch_.data(); here < slots_.size(); ++here, page += page_size)
    std::memcpy(slab.data(slots_[here]), page, page_size);
  return store(header) && (!passes_on(header) || pass_on(header));
}

// For what is not in slots_ yet of the pages whose hashes are in hashes_; into slots_, as many as there are. What these
// pages were before is out of date, and may be the room that is missing.
void WritingConnection::make_room(std::uint32_t region, PageRun run) {
  const std::uint64_t here = slots_.size();
  if (here == run.count) return;
  const PageRun rest{PageNumber{run.first.value + here}, run.count - here};
  place_.image->forget(region, rest, by_, std::span(hashes_).subspan(static_cast<std::size_t>(here)));
  place_.common->slab->take(rest.count, slots_);
}

bool WritingConnection::refuse_torn(const wire::FrameHeader& header) {
  return place_.image->forget(header.region, run_of(header), by_) &&
         answers_.refused(header.region, run_of(header), place_.image->ordinal(), wire::kFlagTorn);
}

// What is in slots_ and hashes_ is the image's from now on; the rest of the run is refused, see make_room().
bool WritingConnection::store(const wire::FrameHeader& header) {
  Slab& slab = *place_.common->slab;
  Image& image = *place_.image;
  const PageRun run = run_of(header);
  const std::uint64_t here = slots_.size();
  if (here > 0) {
    // One count is the image's from now on, the other ours: a page may be replaced while it is passed on.
    for (const Slab::Slot slot : slots_) slab.pin(slot);
    if (image.domain() != nullptr) slab.settle(slots_, image.domain()->number());
    const auto hashes = std::span(hashes_).first(static_cast<std::size_t>(here));
    if (!image.store(header.region, {run.first, here}, slots_, hashes, wire::Holders::of(header.tag), false,
                     by_)) {
      return false;
    }
  }
  if (here == run.count) return true;
  const PageRun rest{PageNumber{run.first.value + here}, run.count - here};
  return answers_.refused(header.region, rest, image.ordinal(), 0);
}

bool WritingConnection::passes_on(const wire::FrameHeader& header) const {
  return source_ && wire::Holders::of(header.tag).second != wire::Holders::kNobody && !slots_.empty();
}

// Into slots_ as far as they go, the rest into scratch_.
bool WritingConnection::receive_pages(std::span<std::uint64_t> hashes) {
  const Slab& slab = *place_.common->slab;
  const auto page_size = static_cast<std::size_t>(page_size_);
  for (std::size_t at = 0; at < slots_.size();) {
    const std::size_t pages = std::min(pages_a_piece(), slots_.size() - at);
    buffers_.clear();
    append_slots(slab, std::span(slots_).subspan(at, pages), buffers_);
    if (!read_piece(buffers_, pages * page_size)) return false;
    // Receiving has changed them.
    buffers_.clear();
    append_slots(slab, std::span(slots_).subspan(at, pages), buffers_);
    for (const iovec& piece : buffers_) {
      hash_pages({static_cast<const std::byte*>(piece.iov_base), piece.iov_len}, page_size, &hashes[at]);
      at += piece.iov_len / page_size;
    }
  }
  const auto rest = hashes.subspan(slots_.size());
  scratch_.resize(rest.size() * page_size);
  if (rest.empty()) return true;
  if (!read_payload(scratch_)) return false;
  hash_pages(scratch_, page_size, rest.data());
  return true;
}

std::size_t WritingConnection::pages_a_piece() const {
  return std::max<std::size_t>(1, piece_ / static_cast<std::size_t>(page_size_));
}

bool WritingConnection::read_piece(std::span<iovec> into, std::size_t bytes) {
  const auto began = std::chrono::steady_clock::now();
  if (!read_scattered(into)) return false;
  const auto took = std::chrono::steady_clock::now() - began;
  if (took > kSlowPiece) {
    piece_ = std::max(piece_ / 2, kLeastPiece);
  } else if (took < kSlowPiece / 4) {
    piece_ = std::min(2 * piece_, kLargestPiece);
  }
  count_in(bytes);
  return answers_.worked(bytes);
}

bool WritingConnection::read_payload(std::span<std::byte> into) {
  while (!into.empty()) {
    const std::size_t bytes = std::min(piece_, into.size());
    iovec piece{into.data(), bytes};
    if (!read_piece(std::span(&piece, 1), bytes)) return false;
    into = into.subspan(bytes);
  }
  return true;
}

// What is held of it here, as it is.
bool WritingConnection::pass_on(const wire::FrameHeader& header) {
  wire::FrameHeader onward = header;
  onward.flags &= static_cast<std::uint16_t>(~wire::kEncodings);
  onward.page_count = slots_.size();
  wire::seal_pages(onward, page_size_, std::span(hashes_).first(slots_.size()));
  buffers_.clear();
  buffers_.push_back({&onward, sizeof onward});
  append_slots(*place_.common->slab, slots_, buffers_);
  return forward(wire::Holders::of(onward.tag).second, buffers_);
}

bool WritingConnection::forward(std::uint8_t ordinal, std::span<iovec> buffers) {
  const std::uint64_t bytes = bytes_of(buffers);
  if (!await_turn(place_.common->out, bytes)) return false;
  count_out(bytes);
  return chains_.forward(ordinal, buffers);
}

bool WritingConnection::on_zeros(const wire::FrameHeader& header) {
  const wire::Holders holders = wire::Holders::of(header.tag);
  if (!inside(header) || !meant_for_us(holders, header.tag) || !bare_checksum_fits(header)) return false;
  if (!place_.image->store_zeros(header.region, run_of(header), holders, by_)) return false;
  if (!source_ || holders.second == wire::Holders::kNobody) return true;
  wire::FrameHeader onward = header;
  iovec buffer{&onward, sizeof onward};
  return forward(holders.second, std::span(&buffer, 1));
}

bool WritingConnection::on_map(const wire::FrameHeader& header) {
  using wire::Holders;
  const Holders holders = Holders::of(header.tag);
  const auto server = [](std::uint8_t holder) { return holder < Holders::kMostServers; };
  const bool first_is_one =
      server(holders.first) || holders.first == Holders::kDestination || holders.first == Holders::kNobody;
  const bool second_is_one =
      holders.second == Holders::kNobody ||
      (server(holders.second) && holders.first != Holders::kNobody && holders.second != holders.first);
  if (!inside(header) || holders.tag() != header.tag || !first_is_one || !second_is_one) return false;

  hashes_.resize(header.payload_bytes / sizeof(std::uint64_t));
  const std::span<std::byte> payload = std::as_writable_bytes(std::span(hashes_));
  if (!payload.empty() && !await_turn(place_.common->in, payload.size())) return false;
  if (!read_payload(payload)) return false;
  if (wire::payload_checksum(header, payload) != header.checksum) return false;
  const bool applied =
      place_.image->apply_map(header.region, run_of(header), holders, (header.flags & wire::kFlagZero) != 0,
                              (header.flags & wire::kFlagFinal) != 0, hashes_, by_);
  if (hashes_.capacity() > kHashesKept) hashes_ = {};
  return applied;
}

bool WritingConnection::on_chain_of(const wire::FrameHeader& header) {
  if (source_ || by_.epoch != 0 || !bare_checksum_fits(header) || header.tag > UINT32_MAX) return false;
  by_.epoch = static_cast<std::uint32_t>(header.tag);
  return true;
}

// In its place among the pages, here and at whoever they are passed on to: what comes behind it may be newer than what
// that chain still carries.
bool WritingConnection::on_chain_over(const wire::FrameHeader& header) {
  if (header.region >= wire::Holders::kMostServers || !bare_checksum_fits(header) || header.tag > UINT32_MAX)
    return false;
  const Image::Chain chain{static_cast<std::uint8_t>(header.region), static_cast<std::uint32_t>(header.tag)};
  place_.image->end_chain(chain);
  return chains_.over(chain);
}

bool WritingConnection::on_barrier(const wire::FrameHeader& header) {
  return bare_checksum_fits(header) && chains_.barrier(header);
}

}  // namespace memferry
