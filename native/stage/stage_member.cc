// Connections of members (popular_pages.h): a guest's reporter tells names and gives pages that were asked for, a host
// asks what is popular and fetches it.
#include <algorithm>
#include <array>
#include <bit>

#include "os/steady_ms.h"
#include "stage/stage_connection.h"

namespace memferry {

MemberConnection::MemberConnection(Place place, UniqueFd fd)
    : StageConnection(std::move(place), std::move(fd)) {}

MemberConnection::~MemberConnection() { join(); }

void MemberConnection::serve() {
  if (!place_.member) return;
  wire::FrameHeader header;
  while (read_header(header) && serve_frame(header)) {
  }
}

bool MemberConnection::serve_frame(const wire::FrameHeader& header) {
  switch (static_cast<wire::FrameType>(header.type)) {
    case wire::FrameType::kReport:
      return on_report(header);
    case wire::FrameType::kPopularContent:
      return on_content(header);
    case wire::FrameType::kPopularAsk:
      return on_ask(header);
    case wire::FrameType::kPopularRead:
      return on_read(header);
    default:  // kGoodbye among them
      return false;
  }
}

bool MemberConnection::read_names(const wire::FrameHeader& header) {
  if (!place_.common->in.wait_and_debit(sizeof header + header.payload_bytes, thread_)) return false;
  names_.resize(static_cast<std::size_t>(header.page_count));
  const std::span<std::byte> payload = std::as_writable_bytes(std::span(names_));
  if (!read(payload)) return false;
  count_in(payload.size());
  return wire::payload_checksum(header, payload) == header.checksum;
}

bool MemberConnection::answer(wire::FrameHeader header, std::span<const std::byte> payload) {
  wire::seal(header, payload);
  if (!place_.common->out.wait_and_debit(sizeof header + payload.size(), thread_)) return false;
  std::array<iovec, 2> buffers{iovec{&header, sizeof header},
                               iovec{const_cast<std::byte*>(payload.data()), payload.size()}};
  return send(std::span(buffers).first(payload.empty() ? 1 : 2));
}

bool MemberConnection::on_report(const wire::FrameHeader& header) {
  const Member& member = *place_.member;
  if (!member.seat || !read_names(header)) return false;
  wanted_.resize(static_cast<std::size_t>(wire::wanted_words(header.page_count)));
  member.domain->report(names_, *member.seat, steady_ms(), wanted_);
  // What was asked for before and has not come by now is not owed any more.
  wanted_pages_ = 0;
  for (const std::uint64_t word : wanted_) wanted_pages_ += static_cast<unsigned>(std::popcount(word));
  return answer(
      wire::make_header(wire::FrameType::kReported, 0, {PageNumber{0}, header.page_count}, header.tag),
      std::as_bytes(std::span(wanted_)));
}

// What a page is called is found out here. One that nobody wants any more is no fault of the member's.
bool MemberConnection::on_content(const wire::FrameHeader& header) {
  if (header.page_count > wanted_pages_) return false;
  wanted_pages_ -= header.page_count;
  if (!place_.common->in.wait_and_debit(sizeof header + header.payload_bytes, thread_)) return false;
  pages_.resize(header.payload_bytes);
  if (!read(pages_)) return false;
  count_in(pages_.size());
  if (wire::payload_checksum(header, pages_) != header.checksum) return false;
  const std::uint64_t now = steady_ms();
  const auto page_size = static_cast<std::size_t>(page_size_);
  for (std::size_t at = 0; at < pages_.size(); at += page_size) {
    (void)place_.member->domain->give(std::span(pages_).subspan(at, page_size), now);
  }
  pages_ = {};
  return true;
}

bool MemberConnection::on_ask(const wire::FrameHeader& header) {
  if (!bare_checksum_fits(header)) return false;
  place_.common->in.debit(sizeof header);
  std::uint64_t cursor = header.first_page;
  popular_.clear();
  place_.member->domain->list(cursor, header.region, static_cast<std::size_t>(header.page_count), steady_ms(),
                              popular_);
  return answer(
      wire::make_header(wire::FrameType::kPopularNames, 0, {PageNumber{cursor}, popular_.size()}, header.tag),
      std::as_bytes(std::span(popular_)));
}

bool MemberConnection::on_read(const wire::FrameHeader& header) {
  if (!read_names(header)) return false;
  const auto page_size = static_cast<std::size_t>(page_size_);
  Slab& slab = *place_.common->slab;
  const std::uint64_t now = steady_ms();
  std::uint64_t found = 0;
  pages_.clear();
  for (std::size_t i = 0; i < names_.size(); ++i) {
    const auto slot = place_.member->domain->pin(names_[i], now);
    if (!slot) continue;
    found |= std::uint64_t{1} << i;
    const std::byte* const page = slab.data(*slot);
    pages_.insert(pages_.end(), page, page + page_size);
    slab.release(std::span(&*slot, 1));
  }
  const PageRun run{PageNumber{found}, static_cast<std::uint64_t>(std::popcount(found))};
  const bool sent = answer(wire::make_header(wire::FrameType::kPopularPages, 0, run, header.tag), pages_);
  pages_ = {};
  return sent;
}

}  // namespace memferry
