// The connections on which a source asks what its domain's servers hold, and tells them what they hold by now. One
// that fails or is slow is given up: nothing there is asked for any more, and pages go plainly.
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "transfer/directory_range.h"
#include "transfer/scatter_dedup.h"
#include "transfer/stage_dial.h"
#include "wire/hello.h"

namespace memferry {
namespace {

// What a writable socket takes without blocking.
constexpr std::size_t kPiece = 4096;
// Told of in one go, at most (twice that where runs have parts that are out of date): each has its answer within the
// patience.
constexpr std::size_t kMostTold = 2048;

bool wait_writable(int fd, std::chrono::steady_clock::time_point deadline) {
  for (;;) {
    const auto left =
        std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    pollfd waiting{fd, POLLOUT, 0};
    const int ready = ::poll(&waiting, 1, static_cast<int>(std::max<std::int64_t>(left.count(), 0)));
    if (ready >= 0 || errno != EINTR) return ready > 0;
  }
}

void append(std::vector<std::byte>& to, wire::FrameHeader header, std::span<const std::byte> payload) {
  wire::seal(header, payload);
  const auto* head = reinterpret_cast<const std::byte*>(&header);
  to.insert(to.end(), head, head + sizeof header);
  to.insert(to.end(), payload.begin(), payload.end());
}

}  // namespace

void Scatter::Dedup::dial() {
  for (std::size_t i = 0; i < directories_.size(); ++i) {
    const StageServer& address = scatter_.config_.servers[i];
    if (address.identity == 0) continue;
    {
      const std::lock_guard lock(scatter_.mutex_);
      if (scatter_.closing_) return;
      if (!scatter_.servers_[i]->failed.empty()) continue;
    }
    Directory& directory = directories_[i];
    auto dialled =
        dial_stage(address, scatter_.shared_.migration, wire::StageRole::kProbe, directory.attempt,
                   Clock::now() + scatter_.config_.directory_dial_timeout, scatter_.shared_.cancel_fd);
    if (!dialled.stream) continue;
    const auto most = scatter_.config_.directory_patience.count();
    const timeval patience{most / 1000, most % 1000 * 1000};
    ::setsockopt(dialled.stream->fd(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    const std::lock_guard lock(scatter_.mutex_);
    if (scatter_.closing_) return;
    if (!scatter_.servers_[i]->failed.empty()) continue;
    directory.stream = std::move(dialled.stream);
    identities_[i] = address.identity;
  }
}

void Scatter::Dedup::lose_directory(std::size_t server) {
  directories_[server].stream->shutdown();
  identities_[server] = 0;
}

bool Scatter::Dedup::send(std::size_t server, std::vector<std::byte>& bytes, Clock::time_point deadline) {
  if (bytes.empty()) return true;
  scatter_.shared_.count_bytes(bytes.size());
  scatter_.shared_.pacer.debit_limit(bytes.size());
  count_overhead(bytes.size());
  wire::Stream& stream = *directories_[server].stream;
  bool sent = true;
  for (std::span<const std::byte> left(bytes); sent && !left.empty();) {
    const auto piece = left.first(std::min(left.size(), kPiece));
    sent = wait_writable(stream.fd(), deadline) && stream.send_all(piece).done();
    left = left.subspan(piece.size());
  }
  bytes.clear();
  if (!sent) lose_directory(server);
  return sent;
}

bool Scatter::Dedup::receive(std::size_t server, wire::FrameType type, std::uint64_t tag,
                             std::span<std::byte> payload, Clock::time_point deadline) {
  const auto read = [&](std::span<std::byte> into) {
    return wire::receive_until(*directories_[server].stream, into, deadline, scatter_.shared_.cancel_fd)
        .done();
  };
  wire::FrameHeader header{};
  const bool came = read(std::as_writable_bytes(std::span(&header, 1))) &&
                    wire::malformed(header, scatter_.page_size_) == nullptr &&
                    header.type == static_cast<std::uint16_t>(type) && header.tag == tag &&
                    header.payload_bytes == payload.size() && read(payload) &&
                    wire::payload_checksum(header, payload) == header.checksum;
  if (!came) lose_directory(server);
  return came;
}

// All questions first, then the answers: the servers work side by side.
void Scatter::Dedup::probe(std::vector<wire::KnownHolders>& answers) {
  answers.assign(names_to_ask_.size(), {});
  std::vector<std::vector<std::size_t>> asked(directories_.size());
  for (std::size_t i = 0; i < names_to_ask_.size(); ++i) {
    if (const auto directory = directory_of(names_to_ask_[i], identities_)) asked[*directory].push_back(i);
  }
  const std::uint64_t tag = next_tag_++;
  const auto deadline = Clock::now() + scatter_.config_.directory_patience;
  std::vector<wire::ContentName> names;
  std::vector<std::byte> bytes;
  for (std::size_t server = 0; server < asked.size(); ++server) {
    if (asked[server].empty()) continue;
    names.clear();
    for (const std::size_t each : asked[server]) names.push_back(names_to_ask_[each]);
    append(bytes, wire::make_header(wire::FrameType::kProbe, 0, {PageNumber{0}, names.size()}, tag),
           std::as_bytes(std::span(names)));
    if (!send(server, bytes, deadline)) asked[server].clear();
    probes_ += asked[server].size();
  }
  std::vector<wire::KnownHolders> said;
  for (std::size_t server = 0; server < asked.size(); ++server) {
    if (asked[server].empty()) continue;
    said.resize(asked[server].size());
    if (!receive(server, wire::FrameType::kProbed, tag, std::as_writable_bytes(std::span(said)), deadline))
      continue;
    for (std::size_t i = 0; i < said.size(); ++i) answers[asked[server][i]] = said[i];
  }
}

// Of what was acknowledged, the pages that went as they were looked at, and have not been written since as far as is
// known. A name that is wrong all the same costs whoever believes it a reference that is refused.
std::vector<Scatter::Dedup::Settled> Scatter::Dedup::still_known(std::span<const Settled> settled) const {
  std::vector<Settled> known;
  for (const Settled& each : settled) {
    const Region& region = *regions_[each.region];
    for (PageNumber page = each.run.first; page < each.run.end(); ++page.value) {
      const bool same = region.named.test(page) && scatter_.where_.safe(each.region, page) &&
                        scatter_.where_.hash(each.region, page) == region.seen[page.value];
      if (!same) continue;
      const bool joins = !known.empty() && known.back().region == each.region &&
                         known.back().run.end() == page && known.back().holders == each.holders;
      if (joins) {
        ++known.back().run.count;
      } else if (known.size() == 2 * kMostTold) {
        return known;
      } else {
        known.push_back({each.region, {page, 1}, each.holders});
      }
    }
  }
  return known;
}

// What is safe by now: to its holders by which names it goes, and once they know that, to the directories who holds
// it. In this order, so that whoever hears of it finds it.
bool Scatter::Dedup::tell() {
  std::vector<Settled> acknowledged;
  std::uint64_t round = 0;
  {
    const std::lock_guard lock(scatter_.mutex_);
    round = round_;
    if (settled_.size() <= kMostTold) {
      acknowledged.swap(settled_);
    } else {
      const auto end = settled_.begin() + static_cast<std::ptrdiff_t>(kMostTold);
      acknowledged.assign(settled_.begin(), end);
      settled_.erase(settled_.begin(), end);
    }
  }
  if (acknowledged.empty()) return false;
  const std::vector<Settled> settled = still_known(acknowledged);
  const auto deadline = Clock::now() + scatter_.config_.directory_patience;
  const std::size_t servers = directories_.size();
  std::vector<std::vector<std::byte>> to_holders(servers);
  std::vector<std::map<std::pair<std::uint64_t, std::uint64_t>, std::vector<wire::ContentName>>> held(
      servers);
  const auto identity = [&](std::uint8_t ordinal) {
    return ordinal < servers ? identities_[ordinal] : wire::KnownHolders::kNobody;
  };
  std::vector<wire::ContentName> names;
  // Each has its answer: so many bytes of them wait in no socket.
  std::vector<std::pair<std::size_t, std::uint64_t>> questions;
  for (const Settled& each : settled) {
    Region& region = *regions_[each.region];
    for (PageRun left = each.run; left.count > 0;) {
      const PageRun part{left.first, std::min(left.count, wire::kMostNames)};
      left = {part.end(), left.count - part.count};
      names.clear();
      for (PageNumber page = part.first; page < part.end(); ++page.value) {
        names.push_back(region.names[page.value]);
        region.to_tell.clear(page);
      }
      for (const std::uint8_t holder : {each.holders.first, each.holders.second}) {
        if (identity(holder) == wire::KnownHolders::kNobody) continue;
        const std::uint64_t tag = next_tag_++;
        append(to_holders[holder], wire::make_header(wire::FrameType::kNames, each.region, part, tag),
               std::as_bytes(std::span(names)));
        questions.emplace_back(holder, tag);
      }
      const std::pair known{identity(each.holders.first), identity(each.holders.second)};
      for (const wire::ContentName& name : names) {
        if (const auto directory = directory_of(name, identities_)) held[*directory][known].push_back(name);
      }
    }
  }
  for (std::size_t server = 0; server < servers; ++server) {
    if (!to_holders[server].empty()) (void)send(server, to_holders[server], deadline);
  }
  for (const auto& [server, tag] : questions) {
    if (identities_[server] != 0) (void)receive(server, wire::FrameType::kNamed, tag, {}, deadline);
  }
  {
    const std::lock_guard lock(scatter_.mutex_);
    for (const Settled& each : settled) {
      // What was written since has begin() in between.
      if (round_ == round && identity(each.holders.first) != wire::KnownHolders::kNobody)
        regions_[each.region]->told.set_run(each.run);
    }
  }
  std::vector<std::byte> bytes;
  for (std::size_t server = 0; server < servers; ++server) {
    if (identities_[server] == 0) continue;
    bytes.clear();
    for (const auto& [known, of_them] : held[server]) {
      for (std::size_t from = 0; from < of_them.size(); from += wire::kMostNames) {
        // Its holders go before the names.
        names.assign(1, {known.first, known.second});
        const std::size_t end = std::min<std::size_t>(of_them.size(), from + wire::kMostNames);
        names.insert(names.end(), of_them.begin() + static_cast<std::ptrdiff_t>(from),
                     of_them.begin() + static_cast<std::ptrdiff_t>(end));
        append(bytes, wire::make_header(wire::FrameType::kHeld, 0, {PageNumber{0}, end - from}),
               std::as_bytes(std::span(names)));
      }
    }
    (void)send(server, bytes, deadline);
  }
  for (const Settled& each : settled) told_ += each.run.count;
  return true;
}

}  // namespace memferry
