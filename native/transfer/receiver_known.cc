// References: the source is told what is known here, and says of pages that they are such content. Each is looked for
// and hashed at that moment; what is not there is said at once, and comes as it is.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "page/hash.h"
#include "transfer/receiver_impl.h"

namespace memferry {
namespace {

// Answers to barriers share the connection with names: so many bytes of these may be in front of one.
constexpr int kMostUnsentBytes = 16 * 1024;
// Frames of names before one that has come is read.
constexpr unsigned kMostAtOnce = 64;
constexpr int kShareLookMs = 1;

}  // namespace

// By the last data channel alone: switches and discards are answered on the first.
void Receiver::Impl::begin_telling(Conversation& with) {
  if (!known || with.channel.demand || with.channel.index + 1 != config.channels) return;
  // Then poll() finds the socket writable only while that few are unsent.
  ::setsockopt(with.stream.fd(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &kMostUnsentBytes, sizeof kMostUnsentBytes);
}

// Before each frame that is read, as far as the connection has room, which costs a memory copy: what is told early is
// not sent. On the channel's own thread, so that nothing else writes in between.
bool Receiver::Impl::tell_known(Conversation& with) {
  if (!known || with.channel.demand || with.channel.index + 1 != config.channels) return true;
  std::vector<wire::KnownName>& names = with.names;
  for (unsigned told = 0;;) {
    if (names.empty()) names = known->next_names(wire::kMostKnownNames);
    if (names.empty() && !known->awaits_share()) return true;
    // The share's index is being read: nothing is told yet, and nothing may have come.
    const bool waits = names.empty();
    pollfd socket{with.stream.fd(), static_cast<short>(waits ? POLLIN : POLLIN | POLLOUT), 0};
    if (::poll(&socket, 1, waits ? kShareLookMs : -1) < 0) {
      if (errno == EINTR) continue;
      return true;  // reading will say what is wrong
    }
    if ((socket.revents & POLLOUT) != 0 && (socket.revents & (POLLERR | POLLHUP)) == 0) {
      const auto payload = std::as_bytes(std::span(names));
      wire::FrameHeader header = wire::make_header(wire::FrameType::kKnown, 0, {PageNumber{0}, names.size()});
      wire::seal(header, payload);
      std::array<iovec, 2> buffers{iovec{&header, sizeof header}, iovec{names.data(), payload.size()}};
      const wire::IoResult io = with.stream.send_all(buffers);
      if (!io.done()) return with.lost(io);
      names.clear();
      ++told;
      if ((socket.revents & POLLIN) == 0 || told < kMostAtOnce) continue;
    }
    if ((socket.revents & ~POLLOUT) != 0) return true;
  }
}

bool Receiver::Impl::on_reference(Conversation& with, const wire::FrameHeader& header) {
  if (!known) return with.bad("references that were not agreed on");
  if (with.channel.demand) return with.bad("references come on data channels");
  if (base_awaited) return with.bad("references before the base is there");
  if (header.region >= maps.size()) return with.bad("no such region");
  ArrivalMap& map = *maps[header.region];
  if (!wire::run_inside(header.first_page, header.page_count, map.pages()))
    return with.bad("references outside the region");
  const PageRun run{PageNumber{header.first_page}, header.page_count};
  if (!intake.wait_and_debit(header.payload_bytes, with.channel.thread)) return false;
  if (!with.read_checked_payload(header, with.channel.staging)) return false;
  std::vector<wire::ContentHash> hashes(static_cast<std::size_t>(run.count));
  std::memcpy(hashes.data(), with.channel.staging.data(), header.payload_bytes);

  std::optional<FillingHold> hold(std::in_place, filling_frames, map, run);
  const bool filling = state == State::kFilling;
  if (filling && !hold->take()) return with.bad("references to pages that another channel is sending");
  if (state == State::kSwitching) return with.bad("references while switching to post-copy");
  if (!filling && state != State::kPaging) return true;
  std::vector<std::byte>& pages = with.channel.decoded;
  pages.resize(static_cast<std::size_t>(wire::max_payload(page_size)));
  const auto size = static_cast<std::size_t>(page_size);
  // While paging, what is here already came otherwise, with the same content, and is not overwritten.
  enum class Found : std::uint8_t { kKnown, kNowhere, kHereAlready };
  std::vector<Found> found(hashes.size());
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    if (!filling && map.received.test(PageNumber{run.first.value + i})) {
      found[i] = Found::kHereAlready;
    } else {
      const bool known_here = known->resolve(hashes[i], std::span(pages).subspan(i * size, size));
      found[i] = known_here ? Found::kKnown : Found::kNowhere;
    }
  }
  std::vector<PageRun> refused;
  for (std::size_t i = 0; i < found.size();) {
    std::size_t end = i + 1;
    while (end < found.size() && found[end] == found[i]) ++end;
    const PageRun part{PageNumber{run.first.value + i}, end - i};
    const auto bytes = std::span<const std::byte>(pages).subspan(i * size, (end - i) * size);
    if (found[i] == Found::kNowhere) {
      refuse(header.region, part);
      refused.push_back(part);
    } else if (found[i] == Found::kKnown) {
      if (filling) {
        if (!fill_known(with, header.region, part, bytes)) return false;
      } else {
        install_known(with, header.region, part, bytes);
      }
    }
    i = end;
  }
  // Only now: the source may send them at once, and on another channel.
  hold.reset();
  for (const PageRun part : refused) {
    const auto at = static_cast<std::size_t>(part.first.value - run.first.value);
    const auto of_part = std::span(hashes).subspan(at, static_cast<std::size_t>(part.count));
    if (!tell_refused(with, header.region, part, of_part)) return false;
  }
  return true;
}

// As if the pages had come from the source.
bool Receiver::Impl::fill_known(Conversation& with, std::uint32_t region, PageRun run,
                                std::span<const std::byte> pages) {
  std::vector<std::uint64_t>& hashes = with.channel.hashes;
  hashes.resize(static_cast<std::size_t>(run.count));
  hash_pages(pages, page_size, hashes.data());
  wire::FrameHeader header = wire::make_header(wire::FrameType::kPages, region, run);
  wire::seal_pages(header, page_size, hashes);
  bool verified = false;
  const auto read = [&pages](std::span<std::byte> into) -> wire::IoResult {
    std::memcpy(into.data(), pages.data(), into.size());
    pages = pages.subspan(into.size());
    return {};
  };
  const wire::IoResult io = with.channel.filler->pages(read, header, *maps[region], verified);
  if (!io.done()) return with.lost(io);
  pages_known.fetch_add(run.count, std::memory_order_relaxed);
  return true;
}

void Receiver::Impl::install_known(Conversation& with, std::uint32_t region, PageRun run,
                                   std::span<const std::byte> pages) {
  if (state != State::kPaging) return;
  ArrivalMap& map = *maps[region];
  std::vector<std::uint64_t>& hashes = with.channel.hashes;
  hashes.resize(static_cast<std::size_t>(run.count));
  hash_pages(pages, page_size, hashes.data());
  // Before the pages are claimed, so that a complete region has a complete digest.
  for (std::uint64_t i = 0; i < run.count; ++i) {
    const PageNumber page{run.first.value + i};
    if (!map.received.test(page)) map.keep_hashes({page, 1}, std::span(&hashes[i], 1));
  }
  const Pager::Installed installed = pager->install(region, run, pages.data());
  pages_known.fetch_add(installed.pages, std::memory_order_relaxed);
  account(installed.pages);
}

// An older copy is none: the page is not here until it comes.
void Receiver::Impl::refuse(std::uint32_t region, PageRun run) {
  ArrivalMap& map = *maps[region];
  if (state == State::kFilling) {
    map.received.clear_run(run);
    map.zero.clear_run(run);
    map.suspect.set_run(run);
  }
  pages_unresolved.fetch_add(run.count, std::memory_order_relaxed);
}

bool Receiver::Impl::tell_refused(Conversation& with, std::uint32_t region, PageRun run,
                                  std::span<const wire::ContentHash> hashes) {
  std::vector<wire::KnownName> names;
  for (const wire::ContentHash& hash : hashes) names.push_back(PageShareReader::name_of(hash));
  const auto payload = std::as_bytes(std::span(names));
  wire::FrameHeader header = wire::make_header(wire::FrameType::kUnresolved, region, run);
  wire::seal(header, payload);
  std::array<iovec, 2> buffers{iovec{&header, sizeof header}, iovec{names.data(), payload.size()}};
  const wire::IoResult io = with.stream.send_all(buffers);
  return io.done() || with.lost(io);
}

}  // namespace memferry
