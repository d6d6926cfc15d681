// The kinds of connections: those that write pages (sources, other servers), those that read them (destinations), those
// that ask, and those of members. Each is served by its own thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "page/keyed_hash.h"
#include "stage/stage_chain.h"
#include "stage/stage_impl.h"
#include "wire/run_compressor.h"

namespace memferry {

[[nodiscard]] inline PageRun run_of(const wire::FrameHeader& header) {
  return {PageNumber{header.first_page}, header.page_count};
}

// Counts of slots that go away unless somebody takes them over.
class SlotsInHand {
 public:
  SlotsInHand(Slab& slab, std::vector<Slab::Slot>& slots) : slab_(slab), slots_(slots) {}
  ~SlotsInHand() { let_go(); }
  SlotsInHand(const SlotsInHand&) = delete;
  SlotsInHand& operator=(const SlotsInHand&) = delete;
  void let_go() {
    slab_.release(slots_);
    slots_.clear();
  }

 private:
  Slab& slab_;
  std::vector<Slab::Slot>& slots_;
};

// kScatter and kChain. What a peer may write depends on the role; anything else ends the connection.
class WritingConnection final : public StageConnection {
 public:
  WritingConnection(Place place, UniqueFd fd);
  ~WritingConnection() override;

 protected:
  void serve() override;
  void interrupt_more() override { chains_.interrupt(); }
  bool tell_waiting() override { return answers_.worked(0); }

 private:
  // Each gives false when the connection is over.
  bool serve_frame(const wire::FrameHeader& header, bool& goodbye);
  bool on_pages(const wire::FrameHeader& header);
  bool on_zeros(const wire::FrameHeader& header);
  bool on_map(const wire::FrameHeader& header);
  bool on_barrier(const wire::FrameHeader& header);
  bool on_chain_of(const wire::FrameHeader& header);
  bool on_chain_over(const wire::FrameHeader& header);
  bool on_reference(const wire::FrameHeader& header);  // stage_reference.cc
  bool receive_pages(std::span<std::uint64_t> hashes);
  // A payload comes in pieces, of which each counts and is told of.
  [[nodiscard]] std::size_t pages_a_piece() const;
  bool read_piece(std::span<iovec> into, std::size_t bytes);
  bool read_payload(std::span<std::byte> into);
  void make_room(std::uint32_t region, PageRun run);
  bool store(const wire::FrameHeader& header);
  bool refuse_torn(const wire::FrameHeader& header);
  [[nodiscard]] bool passes_on(const wire::FrameHeader& header) const;
  bool pass_on(const wire::FrameHeader& header);
  // To the replica's server: what is passed on is sent as well.
  bool forward(std::uint8_t ordinal, std::span<iovec> buffers);
  // stage_encoded.cc
  bool on_encoded(const wire::FrameHeader& header);
  bool receive_packed(const wire::FrameHeader& header, bool& room);
  bool unpack(const wire::FrameHeader& header, SlotsInHand& packed);
  bool decode(const wire::FrameHeader& header, CodecSeats::Equipment& with);
  bool copy_base(const wire::FrameHeader& header, std::span<std::byte> pages);
  bool pass_on_packed(const wire::FrameHeader& header);
  [[nodiscard]] bool meant_for_us(wire::Holders holders, std::uint64_t tag) const;

  const bool source_;  // kScatter
  Image::Chain by_;    // the way of what comes here
  ScatterAnswers answers_;
  ReplicaChains chains_;
  // The thread's own:
  std::vector<Slab::Slot> slots_;  // one count of each is ours
  std::vector<std::uint64_t> hashes_;
  std::vector<iovec> buffers_;
  std::size_t piece_ = std::size_t{8} << 10U;  // bytes that come in a moment
  std::vector<std::byte> scratch_;             // for pages of one frame that there is no room for yet
  Image::Reading base_;                        // of a delta
  std::vector<Slab::Slot> packed_slots_;       // an encoded payload as it came lies in these; all ours
};

// kGather and kDemand.
class ReadingConnection final : public StageConnection {
 public:
  ReadingConnection(Place place, UniqueFd fd);
  ~ReadingConnection() override;

 protected:
  void serve() override;
  bool tell_waiting() override;

 private:
  bool on_read(const wire::FrameHeader& header);
  bool on_map_request(const wire::FrameHeader& header);
  bool on_hash_request(const wire::FrameHeader& header);  // stage_hashes.cc

  void note_gap();
  std::span<const std::byte> together(std::span<const Slab::Slot> slots, CodecSeats::Equipment& with) const;
  bool append_packed(wire::FrameHeader& answer, std::span<const Slab::Slot> slots,
                     std::span<const std::uint64_t> hashes, std::uint16_t allowed,
                     CodecSeats::Equipment& with);

  const bool demand_;
  Image::Reading reading_;
  std::optional<wire::RunCompressor> compressor_;  // once a read allows it, for what that one allows
  std::chrono::steady_clock::time_point answered_{};
  std::vector<Slab::Slot> packed_slots_;  // of answers that are packed, until they are sent
  std::vector<wire::FrameHeader> headers_;
  std::vector<iovec> buffers_;
  std::optional<KeyedHasher> hasher_;  // once hashes are asked for
  std::vector<wire::TreeHash> page_hashes_;
};

// kProbe: a source asks what is held already, and tells what is by now. stage_prober.cc.
class ProbingConnection final : public StageConnection {
 public:
  ProbingConnection(Place place, UniqueFd fd);
  ~ProbingConnection() override;

 protected:
  void serve() override;

 private:
  // Each gives false when the connection is over.
  bool serve_frame(const wire::FrameHeader& header);
  bool on_probe(const wire::FrameHeader& header);
  bool on_held(const wire::FrameHeader& header);
  bool on_names(const wire::FrameHeader& header);
  bool read_payload(const wire::FrameHeader& header);

  const std::uint32_t asker_;
  // What the frame that was read last carries; kHeld has its holders before the names.
  std::vector<wire::ContentName> names_;
  std::vector<wire::KnownHolders> answers_;
  std::vector<Image::Place> places_;
};

// kPopular: what a member's guest has, and what many guests have. stage_member.cc.
class MemberConnection final : public StageConnection {
 public:
  MemberConnection(Place place, UniqueFd fd);
  ~MemberConnection() override;

 protected:
  void serve() override;
  void interrupt_more() override { place_.common->desks.wake(); }

 private:
  using Desk = MemberDesks::Desk;
  // Each gives false when the connection is over.
  bool serve_frame(const wire::FrameHeader& header, Desk& desk);
  bool on_report(const wire::FrameHeader& header, Desk& desk);
  bool on_content(const wire::FrameHeader& header, Desk& desk);
  bool on_ask(const wire::FrameHeader& header, Desk& desk);
  bool on_read(const wire::FrameHeader& header, Desk& desk);
  bool read_payload(std::span<std::byte> into);
  bool read_names(const wire::FrameHeader& header, Desk& desk);
  bool answer(wire::FrameHeader header, std::span<const std::byte> payload);

  std::uint64_t wanted_pages_ = 0;  // that were asked for and have not come: nothing else may
};

[[nodiscard]] std::uint64_t bytes_of(std::span<const iovec> buffers);
// Slots as they lie in memory: neighbours in one piece.
void append_slots(const Slab& slab, std::span<const Slab::Slot> slots, std::vector<iovec>& to);
// The first `bytes` of them, which end in the last slot.
void append_slots(const Slab& slab, std::span<const Slab::Slot> slots, std::size_t bytes,
                  std::vector<iovec>& to);

}  // namespace memferry
