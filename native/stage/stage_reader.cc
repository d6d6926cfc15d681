// Connections that read: pages for a destination, ahead of its guest or because somebody waits for them, and the
// map.
#include <linux/sockios.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "stage/stage_connection.h"

namespace memferry {
namespace {

// What they answer lets a guest go on.
constexpr int kDemandThreadNice = -20;

}  // namespace

ReadingConnection::ReadingConnection(Place place, UniqueFd fd)
    : StageConnection(std::move(place), std::move(fd)),
      demand_(place_.role == wire::StageRole::kDemand),
      reading_(place_.common->slab) {
  const auto pages = static_cast<std::size_t>(wire::max_run_pages(page_size_));
  headers_.reserve(pages);  // buffers_ points into it
  buffers_.reserve(2 * pages);
}

ReadingConnection::~ReadingConnection() { join(); }

void ReadingConnection::serve() {
  if (demand_) set_this_thread_nice(kDemandThreadNice);
  wire::FrameHeader header;
  while (read_header(header) && bare_checksum_fits(header)) {
    bool going_on = false;
    switch (static_cast<wire::FrameType>(header.type)) {
      case wire::FrameType::kRead:
        going_on = on_read(header);
        break;
      case wire::FrameType::kMapRequest:
        going_on = on_map_request(header);
        break;
      case wire::FrameType::kHashRequest:
        going_on = on_hash_request(header);
        break;
      default:  // kGoodbye among them
        break;
    }
    if (!going_on) break;
  }
  reading_.clear();
}

bool ReadingConnection::on_read(const wire::FrameHeader& header) {
  if (!inside(header)) return false;
  // Nothing is pinned while it waits.
  wire::BandwidthCap& out = place_.common->out;
  if (!(demand_ ? await_urgent_turn(out) : await_turn(out, 0))) return false;
  place_.image->read(header.region, {PageNumber{header.first_page}, header.page_count}, reading_);

  using Kind = Image::Reading::Kind;
  const std::uint16_t encodings = demand_ ? std::uint16_t{0} : wire::encoding_of(header);
  const SlotsInHand packed(*place_.common->slab, packed_slots_);
  CodecSeats::Seat seat;
  bool packing = false;
  if (encodings != 0) {
    if (!compressor_) compressor_.emplace(wire::Compress::kAuto, encodings, place_.common->packed);
    note_gap();
    packing = compressor_->begin();
    // Where others have them all it goes as it is: somebody is waiting for the answer.
    if (packing || compressor_->tries_out()) seat = place_.common->codecs.try_take();
  }
  headers_.clear();
  buffers_.clear();
  std::size_t content = 0;
  for (const Image::Reading::Piece& piece : reading_.pieces()) {
    const wire::FrameType type = piece.kind == Kind::kContent ? wire::FrameType::kPages
                                 : piece.kind == Kind::kZero  ? wire::FrameType::kZero
                                                              : wire::FrameType::kAbsent;
    wire::FrameHeader& answer =
        headers_.emplace_back(wire::make_header(type, header.region, piece.run, header.tag));
    buffers_.push_back({&answer, sizeof answer});
    if (piece.kind != Kind::kContent) {
      wire::seal(answer);
      continue;
    }
    const auto pages = static_cast<std::size_t>(piece.run.count);
    const auto slots = reading_.slots().subspan(content, pages);
    const auto hashes = reading_.hashes().subspan(content, pages);
    content += pages;
    if (seat && compressor_->tries_out()) {
      const std::size_t most = std::max<std::size_t>(1, wire::RunCompressor::kTryBytes / page_size_);
      seat->scratch.resize(wire::RunCompressor::kTryBytes);
      compressor_->try_out(seat->compressor, together(slots.first(std::min(pages, most)), *seat),
                           seat->scratch);
    }
    if (seat && packing && append_packed(answer, slots, hashes, encodings, *seat)) continue;
    wire::seal_pages(answer, page_size_, hashes);
    append_slots(*place_.common->slab, slots, buffers_);
  }
  seat.give_back();
  const bool sent = send(buffers_);
  if (encodings != 0) compressor_->sent(fd(), content * page_size_);
  answered_ = std::chrono::steady_clock::now();
  reading_.clear();
  return sent;
}

bool ReadingConnection::tell_waiting() {
  wire::FrameHeader turn = wire::make_header(wire::FrameType::kTurn);
  wire::seal(turn);
  iovec buffer{&turn, sizeof turn};
  return send(std::span(&buffer, 1));
}

// What lies between two answers is the link's while it still carries the former one, else the destination's.
void ReadingConnection::note_gap() {
  int on_the_way = 0;
  if (::ioctl(fd(), SIOCOUTQ, &on_the_way) == 0 && on_the_way > 0) {
    compressor_->waited(std::chrono::steady_clock::now() - answered_);
  } else {
    compressor_->rest();
  }
}

// Slots are pinned and never written anew: what a codec sees of them does not change.
std::span<const std::byte> ReadingConnection::together(std::span<const Slab::Slot> slots,
                                                       CodecSeats::Equipment& with) const {
  const auto page_size = static_cast<std::size_t>(page_size_);
  with.pages.resize(static_cast<std::size_t>(wire::max_payload(page_size_)));
  std::byte* to = with.pages.data();
  for (const Slab::Slot slot : slots) {
    std::memcpy(to, place_.common->slab->data(slot), page_size);
    to += page_size;
  }
  return std::span(with.pages).first(slots.size() * page_size);
}

// Into slots of its own, since others get the seat before a slow reader has taken it. False: it goes as it is.
bool ReadingConnection::append_packed(wire::FrameHeader& answer, std::span<const Slab::Slot> slots,
                                      std::span<const std::uint64_t> hashes, std::uint16_t allowed,
                                      CodecSeats::Equipment& with) {
  const auto page_size = static_cast<std::size_t>(page_size_);
  std::uint16_t encoding = 0;
  with.packed.resize(static_cast<std::size_t>(wire::max_payload(page_size_)));
  const std::size_t length =
      compressor_->compress(with.compressor, together(slots, with), slots.size(), with.packed, encoding);
  if (length == 0 || (encoding & ~allowed) != 0) return false;
  Slab& slab = *place_.common->slab;
  const std::size_t before = packed_slots_.size();
  // A server that is full has none.
  if (!slab.take_all((length + page_size - 1) / page_size, packed_slots_)) return false;
  const auto own = std::span(packed_slots_).subspan(before);
  for (std::size_t i = 0, at = 0; at < length; ++i, at += page_size)
    std::memcpy(slab.data(own[i]), with.packed.data() + at, std::min(page_size, length - at));
  wire::seal_encoded(answer, encoding, length, hashes);
  append_slots(slab, own, length, buffers_);
  return true;
}

bool ReadingConnection::on_map_request(const wire::FrameHeader&) {
  // Before the walk: sealed says that nothing is added to what is walked.
  const std::uint64_t sealed = place_.image->sealed() ? 1 : 0;
  const std::uint64_t most_content = wire::max_payload(page_size_) / sizeof(std::uint64_t);
  Image::Cursor cursor;
  Image::MapRun run;
  // Faults wait for what it says, and a frame may be a few bytes: not each asks.
  std::uint64_t since_turn = 0;
  while (place_.image->next_map_run(cursor, most_content, run)) {
    wire::FrameHeader frame =
        wire::make_header(wire::FrameType::kMap, run.region, run.run, run.holders.tag());
    if (run.zero) frame.flags |= wire::kFlagZero;
    if (run.final) frame.flags |= wire::kFlagFinal;
    wire::seal(frame, std::as_bytes(std::span(run.hashes)));
    std::array<iovec, 2> buffers{iovec{&frame, sizeof frame},
                                 iovec{run.hashes.data(), run.hashes.size() * sizeof(std::uint64_t)}};
    if (since_turn >= wire::kRunBytes) {
      if (!await_urgent_turn(place_.common->out)) return false;
      since_turn = 0;
    }
    since_turn += bytes_of(buffers);
    if (!send(buffers)) return false;
    if (thread_.stopping()) return false;
  }
  wire::FrameHeader end = wire::make_header(wire::FrameType::kMapEnd, 0, {}, sealed);
  wire::seal(end);
  iovec buffer{&end, sizeof end};
  return send(std::span(&buffer, 1));
}

}  // namespace memferry
