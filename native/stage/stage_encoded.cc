// Encoded pages from a source or another server: they are held decoded, one a slot, and passed on as they came.
//
// A payload lies in slots of the slab while it comes, and while it is passed on: so it counts against the cap, and a
// peer that stops in the middle of it holds up nobody's seat at the codecs.
#include <algorithm>
#include <array>
#include <cstring>

#include "page/hash.h"
#include "stage/stage_connection.h"

namespace memferry {

bool WritingConnection::on_encoded(const wire::FrameHeader& header) {
  Slab& slab = *place_.common->slab;
  SlotsInHand packed(slab, packed_slots_);
  const SlotsInHand in_hand(slab, slots_);
  bool room = true;
  if (!receive_packed(header, room)) return false;
  if (!room) {
    return place_.image->forget(header.region, run_of(header), by_) &&
           answers_.refused(header.region, run_of(header), place_.image->ordinal(), 0);
  }
  if (!unpack(header, packed)) return refuse_torn(header);
  if (!store(header)) return false;
  if (!passes_on(header)) return true;
  return packed_slots_.empty() ? pass_on(header) : pass_on_packed(header);
}

// From packed_slots_ into slots_, as many as there are. False: it is not what the header says.
bool WritingConnection::unpack(const wire::FrameHeader& header, SlotsInHand& packed) {
  // Held while this thread computes: nobody's socket is waited for.
  const CodecSeats::Seat seat = place_.common->codecs.take();
  // Before anything is forgotten for want of room: it may be a delta's base.
  if (!decode(header, *seat)) return false;
  Slab& slab = *place_.common->slab;
  slab.take(header.page_count, slots_);
  make_room(header.region, run_of(header));
  if (slots_.size() < header.page_count) {
    // Rather the pages than what they came as.
    packed.let_go();
    slab.take(header.page_count - slots_.size(), slots_);
  }
  const auto page_size = static_cast<std::size_t>(page_size_);
  for (std::size_t i = 0; i < slots_.size(); ++i)
    std::memcpy(slab.data(slots_[i]), seat->pages.data() + i * page_size, page_size);
  return true;
}

// Into packed_slots_; `room` false: there are not so many, and it went nowhere.
bool WritingConnection::receive_packed(const wire::FrameHeader& header, bool& room) {
  Slab& slab = *place_.common->slab;
  const std::uint64_t wanted = (header.payload_bytes + page_size_ - 1) / page_size_;
  room = slab.take_all(wanted, packed_slots_);
  if (!room && wire::encoding_of(header) != wire::kFlagDelta) {
    // As for pages that come as they are. A delta is against what would be forgotten.
    place_.image->forget(header.region, run_of(header), by_);
    room = slab.take_all(wanted, packed_slots_);
  }
  std::span<const Slab::Slot> slots = packed_slots_;
  const auto page_size = static_cast<std::size_t>(page_size_);
  std::array<std::byte, 4096> nowhere;
  for (std::size_t left = header.payload_bytes; left > 0;) {
    std::size_t part = std::min(left, nowhere.size());
    buffers_.clear();
    if (room) {
      const std::size_t count = std::min(pages_a_piece(), slots.size());
      part = std::min(left, count * page_size);
      append_slots(slab, slots.first(count), part, buffers_);
      slots = slots.subspan(count);
    } else {
      buffers_.push_back({nowhere.data(), part});
    }
    if (!read_piece(buffers_, part)) return false;
    left -= part;
  }
  return true;
}

// What is in packed_slots_, into the seat's pages, and their hashes. False: it is not what the header says.
bool WritingConnection::decode(const wire::FrameHeader& header, CodecSeats::Equipment& with) {
  const Slab& slab = *place_.common->slab;
  const auto page_size = static_cast<std::size_t>(page_size_);
  const std::size_t length = header.payload_bytes;
  with.packed.resize(static_cast<std::size_t>(wire::max_payload(page_size_)));
  with.pages.resize(static_cast<std::size_t>(wire::max_payload(page_size_)));
  for (std::size_t i = 0, at = 0; at < length; ++i, at += page_size)
    std::memcpy(with.packed.data() + at, slab.data(packed_slots_[i]), std::min(page_size, length - at));
  const std::uint16_t encoding = wire::encoding_of(header);
  const auto pages = std::span(with.pages).first(static_cast<std::size_t>(header.page_count) * page_size);
  if (encoding == wire::kFlagDelta && !copy_base(header, pages)) return false;
  if (!with.decoder.decode(encoding, std::span(with.packed).first(length), pages)) return false;
  hashes_.resize(static_cast<std::size_t>(header.page_count));
  hash_pages(pages, page_size_, hashes_.data());
  return wire::pages_checksum(header, hashes_) == header.checksum;
}

// What a delta is against: this image's pages as they are here. False where one of them has no content here. What it
// comes to is never written over them, since others may have them or be reading them; and whether they are the bytes
// that were meant, the frame's checksum says.
bool WritingConnection::copy_base(const wire::FrameHeader& header, std::span<std::byte> pages) {
  const auto page_size = static_cast<std::size_t>(page_size_);
  base_.clear();
  place_.image->read(header.region, run_of(header), base_);
  const bool whole = base_.slots().size() == header.page_count;
  for (std::size_t i = 0; whole && i < base_.slots().size(); ++i)
    std::memcpy(pages.data() + i * page_size, place_.common->slab->data(base_.slots()[i]), page_size);
  base_.clear();
  return whole;
}

// As it came: nothing is packed a second time, and a delta is against what the replica got the same way.
bool WritingConnection::pass_on_packed(const wire::FrameHeader& header) {
  wire::FrameHeader same = header;
  buffers_.clear();
  buffers_.push_back({&same, sizeof same});
  append_slots(*place_.common->slab, packed_slots_, header.payload_bytes, buffers_);
  return forward(wire::Holders::of(header.tag).second, buffers_);
}

}  // namespace memferry
