// Connections of members (popular_pages.h): a guest's reporter tells names and gives pages that were asked for, a host
// asks what is popular and fetches it.
#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <array>
#include <bit>

#include "os/steady_ms.h"
#include "stage/stage_connection.h"

namespace memferry {
namespace {

// A whole frame or answer: so many times what it may stand still.
constexpr std::uint64_t kFrameTimeouts = 3;
constexpr std::size_t kPieceBytes = 16 * 1024;

// `ms` 0: for ever.
void limit_waits(int fd, int option, std::uint64_t ms) {
  const timeval limit{.tv_sec = static_cast<time_t>(ms / 1000),
                      .tv_usec = static_cast<suseconds_t>(ms % 1000 * 1000)};
  (void)::setsockopt(fd, SOL_SOCKET, option, &limit, sizeof limit);
}

}  // namespace

MemberConnection::MemberConnection(Place place, UniqueFd fd)
    : StageConnection(std::move(place), std::move(fd)) {}

MemberConnection::~MemberConnection() { join(); }

void MemberConnection::serve() {
  if (!place_.member) return;
  limit_waits(fd(), SO_SNDTIMEO, place_.common->member_timeout_ms);
  wire::FrameHeader header;
  for (;;) {
    // Between frames it may be quiet for as long as it likes: nothing is held for it.
    limit_waits(fd(), SO_RCVTIMEO, 0);
    if (!read_header(header)) return;
    if (!await_turn(place_.common->in, header.payload_bytes)) return;
    const MemberDesks::Seat desk = place_.common->desks.take(thread_);
    if (!desk) return;
    limit_waits(fd(), SO_RCVTIMEO, place_.common->member_timeout_ms);
    if (!serve_frame(header, *desk)) return;
  }
}

bool MemberConnection::serve_frame(const wire::FrameHeader& header, Desk& desk) {
  switch (static_cast<wire::FrameType>(header.type)) {
    case wire::FrameType::kReport:
      return on_report(header, desk);
    case wire::FrameType::kPopularContent:
      return on_content(header, desk);
    case wire::FrameType::kPopularAsk:
      return on_ask(header, desk);
    case wire::FrameType::kPopularRead:
      return on_read(header, desk);
    default:  // kGoodbye among them
      return false;
  }
}

bool MemberConnection::read_payload(std::span<std::byte> into) {
  if (!read_until(steady_ms() + kFrameTimeouts * place_.common->member_timeout_ms, into)) return false;
  count_in(into.size());
  return true;
}

bool MemberConnection::read_names(const wire::FrameHeader& header, Desk& desk) {
  desk.names.resize(static_cast<std::size_t>(header.page_count));
  const std::span<std::byte> payload = std::as_writable_bytes(std::span(desk.names));
  return read_payload(payload) && wire::payload_checksum(header, payload) == header.checksum;
}

// In pieces: the peer has to take each in time, and all of them.
bool MemberConnection::answer(wire::FrameHeader header, std::span<const std::byte> payload) {
  wire::seal(header, payload);
  if (!await_turn(place_.common->out, 0)) return false;
  const std::uint64_t deadline = steady_ms() + kFrameTimeouts * place_.common->member_timeout_ms;
  iovec head{&header, sizeof header};
  do {
    const auto piece = payload.first(std::min(payload.size(), kPieceBytes));
    payload = payload.subspan(piece.size());
    std::array<iovec, 2> buffers{head, iovec{const_cast<std::byte*>(piece.data()), piece.size()}};
    head.iov_len = 0;
    if (!send(buffers)) return false;
  } while (!payload.empty() && steady_ms() < deadline);
  return payload.empty();
}

bool MemberConnection::on_report(const wire::FrameHeader& header, Desk& desk) {
  const Member& member = *place_.member;
  if (!member.seat || !read_names(header, desk)) return false;
  desk.wanted.resize(static_cast<std::size_t>(wire::wanted_words(header.page_count)));
  member.domain->report(desk.names, *member.seat, steady_ms(), desk.wanted);
  // What was asked for before and has not come by now is not owed any more.
  wanted_pages_ = 0;
  for (const std::uint64_t word : desk.wanted) wanted_pages_ += static_cast<unsigned>(std::popcount(word));
  return answer(
      wire::make_header(wire::FrameType::kReported, 0, {PageNumber{0}, header.page_count}, header.tag),
      std::as_bytes(std::span(desk.wanted)));
}

// What a page is called is found out here. One that nobody wants any more is no fault of the member's.
bool MemberConnection::on_content(const wire::FrameHeader& header, Desk& desk) {
  if (header.page_count > wanted_pages_) return false;
  wanted_pages_ -= header.page_count;
  desk.pages.resize(header.payload_bytes);
  if (!read_payload(desk.pages)) return false;
  if (wire::payload_checksum(header, desk.pages) != header.checksum) return false;
  const std::uint64_t now = steady_ms();
  const auto page_size = static_cast<std::size_t>(page_size_);
  for (std::size_t at = 0; at < desk.pages.size(); at += page_size) {
    (void)place_.member->domain->give(std::span(desk.pages).subspan(at, page_size), now);
  }
  return true;
}

bool MemberConnection::on_ask(const wire::FrameHeader& header, Desk& desk) {
  if (!bare_checksum_fits(header)) return false;
  std::uint64_t cursor = header.first_page;
  desk.popular.clear();
  place_.member->domain->list(cursor, header.region, static_cast<std::size_t>(header.page_count), steady_ms(),
                              desk.popular);
  return answer(wire::make_header(wire::FrameType::kPopularNames, 0,
                                  {PageNumber{cursor}, desk.popular.size()}, header.tag),
                std::as_bytes(std::span(desk.popular)));
}

bool MemberConnection::on_read(const wire::FrameHeader& header, Desk& desk) {
  if (!read_names(header, desk)) return false;
  const auto page_size = static_cast<std::size_t>(page_size_);
  Slab& slab = *place_.common->slab;
  const std::uint64_t now = steady_ms();
  std::uint64_t found = 0;
  desk.pages.clear();
  for (std::size_t i = 0; i < desk.names.size(); ++i) {
    const auto slot = place_.member->domain->pin(desk.names[i], now);
    if (!slot) continue;
    found |= std::uint64_t{1} << i;
    const std::byte* const page = slab.data(*slot);
    desk.pages.insert(desk.pages.end(), page, page + page_size);
    slab.release(std::span(&*slot, 1));
  }
  const PageRun run{PageNumber{found}, static_cast<std::uint64_t>(std::popcount(found))};
  return answer(wire::make_header(wire::FrameType::kPopularPages, 0, run, header.tag), desk.pages);
}

}  // namespace memferry
