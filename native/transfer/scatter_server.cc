// The connections to the servers of a scatter: dialling and dialling again, what they answer, and giving one up.
#include <algorithm>
#include <utility>

#include "transfer/scatter_dedup.h"
#include "transfer/stage_dial.h"

namespace memferry {
namespace {

constexpr std::chrono::milliseconds kFirstBackoff{10};
constexpr std::chrono::milliseconds kLongestBackoff{500};
// Frames of a push that a server could not verify. Nothing writes those pages: it is its memory, or the way there, and
// pages that only go there again and again never arrive.
constexpr std::size_t kTornForgiven = 16;

}  // namespace

// No thread, no descriptor, no memory for it: that server's part, not the process. But pages that were being laid out
// are in nobody's list, so with those this side cannot go on.
void Scatter::serve(Server& server) {
  std::string why;
  try {
    return serve_until_failed(server);
  } catch (const std::exception& error) {
    why = "server " + server.address.name + ": " + error.what();
  }
  bool in_hand = false;
  {
    const std::lock_guard lock(mutex_);
    if (const std::shared_ptr<Way> way = std::move(server.way)) {
      in_hand = way->in_hand;
      way->open = false;
      put_back_locked(take_back_locked(*way));
      attach_pacer_locked();
    }
    fail_server_locked(server, why);
  }
  check_drained();
  if (in_hand) shared_.broken("SYSTEM", why);
}

void Scatter::serve_until_failed(Server& server) {
  auto deadline = Clock::now() + config_.connect_timeout;
  auto backoff = kFirstBackoff;
  for (;;) {
    auto [stream, why, for_good] = dial_stage(server.address, shared_.migration, wire::StageRole::kScatter,
                                              server.attempt, deadline, shared_.cancel_fd);
    if (stream) {
      auto way = std::make_shared<Way>();
      way->name = "server " + server.address.name;
      way->server = server.ordinal;
      way->listener = server.ordinal;  // the others are told of the copies that they may drop
      way->epoch = std::uint32_t{server.address.session} << 16U | (server.attempt - 1);
      way->stream = stream;
      way->chunks = std::make_unique<ChunkGatherer>(
          shared_.queue, Towards::kServer, link_pacer_, page_size_,
          PageEncoder::create(config_.encoding, Towards::kServer, page_size_));
      {
        const std::lock_guard lock(mutex_);
        if (closing_ || !server.failed.empty()) return;
        server.way = way;
        server.tried = true;
        attach_pacer_locked();
        changed_.notify_all();
      }
      WorkerThread reader("mf-stored-" + std::to_string(server.ordinal),
                          [&](WorkerThread&) { read(server, way); });
      // Before the reader is joined, however this ends.
      const struct Shutdown {
        wire::Stream& stream;
        ~Shutdown() { stream.shutdown(); }
      } shutdown{*way->stream};
      run(
          *way, [] { return false; }, why);
      stream->shutdown();
      reader.stop();
      {
        const std::lock_guard lock(mutex_);
        way->open = false;
        server.way.reset();
        attach_pacer_locked();
        if (closing_ || shared_.gate.closed()) return;
        put_back_locked(take_back_locked(*way));
        if (dedup_) dedup_->give_back_locked(server.ordinal);
        if (server.failed.empty() && server.broken_chain) {
          Server& replica = *servers_[*server.broken_chain];
          fail_server_locked(replica, "cannot be reached by " + server.address.name);
        }
        server.broken_chain.reset();
        // Records that were on their way may not have arrived.
        if (way->listener >= 0 && server.ordinal < where_.index_servers()) where_.tell_again(server.ordinal);
        if (why.empty()) why = way->name + ": connection lost";
      }
      check_drained();
      deadline = Clock::now() + config_.stall_timeout;
      backoff = kFirstBackoff;
    }
    {
      std::unique_lock lock(mutex_);
      if (closing_ || !server.failed.empty()) return;
      if (for_good || Clock::now() >= deadline) {
        fail_server_locked(server, why);
        return;
      }
      changed_.wait_for(lock, backoff, [&] { return closing_ || !server.failed.empty(); });
      if (closing_ || !server.failed.empty()) return;
    }
    backoff = std::min(2 * backoff, kLongestBackoff);
  }
}

// What a server says on the connection that it is written by.
void Scatter::read(Server& server, const std::shared_ptr<Way>& way) {
  std::string wrong;
  try {
    wrong = read_answers(server, way);
  } catch (const std::exception& error) {
    wrong = error.what();
  }
  const std::lock_guard lock(mutex_);
  way->open = false;
  way->stream->shutdown();
  if (!wrong.empty()) fail_server_locked(server, "server " + server.address.name + ": " + wrong);
  changed_.notify_all();
}

// Until the connection ends; gives what the server did wrong, if anything.
std::string Scatter::read_answers(Server& server, const std::shared_ptr<Way>& way) {
  wire::FrameHeader header{};
  std::string wrong;
  while (wrong.empty()) {
    const wire::IoResult result = way->stream->recv_exact(std::as_writable_bytes(std::span(&header, 1)));
    if (!result.done()) break;
    if (const char* malformed = wire::malformed(header, page_size_)) {
      wrong = malformed;
      break;
    }
    if (header.payload_bytes > 0 || wire::payload_checksum(header, {}) != header.checksum) {
      wrong = "a frame that a server does not send";
      break;
    }
    switch (static_cast<wire::FrameType>(header.type)) {
      case wire::FrameType::kBarrierAck:
        wrong = acknowledged(*way, header.tag);
        break;
      case wire::FrameType::kTaken: {
        const std::lock_guard lock(mutex_);
        if (!way->lane.worked(header.tag, Clock::now())) wrong = "less is worked off than before";
        break;
      }
      case wire::FrameType::kRefused: {
        const std::lock_guard lock(mutex_);
        if (header.region >= shared_.queue.regions() ||
            !wire::run_inside(header.first_page, header.page_count,
                              shared_.queue.known_pages(header.region)) ||
            header.tag >= servers_.size() ||
            (header.tag != server.ordinal &&
             !way->lane.passes_on_to(static_cast<std::uint8_t>(header.tag))) ||
            !way->lane.refused(header.region, {PageNumber{header.first_page}, header.page_count},
                               (header.flags & (wire::kFlagTorn | wire::kFlagReference)) == 0)) {
          wrong = "pages refused that it was not sent";
          break;
        }
        const bool no_room = (header.flags & (wire::kFlagTorn | wire::kFlagReference)) == 0;
        // For want of room it forgets nothing that is as what came, but where it could not unpack that.
        if (!no_room || encodes()) {
          where_.drop_spares(header.region, {PageNumber{header.first_page}, header.page_count},
                             std::bitset<256>().set(static_cast<std::size_t>(header.tag)), released_);
        }
        if ((header.flags & wire::kFlagReference) != 0 && dedup_) {
          dedup_->refused_locked(header.region, {PageNumber{header.first_page}, header.page_count});
          break;
        }
        // It, or the server that it passes replicas on to.
        Server& refuser = *servers_[static_cast<std::size_t>(header.tag)];
        if (no_room) {
          refuser.full = true;
          look_at_copies_locked();
          // Whoever waited for it to be there again.
          changed_.notify_all();
        } else if (kind_ == Kind::kPush && ++refuser.torn > kTornForgiven) {
          fail_server_locked(refuser,
                             "server " + refuser.address.name + " does not get what it is sent intact");
        }
        break;
      }
      case wire::FrameType::kChainBroken: {
        const std::lock_guard lock(mutex_);
        if (header.tag >= servers_.size() || header.tag == server.ordinal ||
            !way->replicas[static_cast<std::size_t>(header.tag)]) {
          wrong = "an unknown server is said to be broken";
        } else if (way->lane.passes_on_to(static_cast<std::uint8_t>(header.tag))) {
          server.broken_chain = static_cast<std::uint8_t>(header.tag);
        }
        // With nothing on its way there, what is held there is for this side's own connection to find out.
        break;
      }
      default:
        wrong = "a frame that a server does not send";
    }
  }
  return wrong;
}

// The connection has ended: whatever it had not acknowledged.
std::vector<RegionRun> Scatter::take_back_locked(Way& way) {
  std::vector<RegionRun> runs = way.lane.take_back(true);
  if (config_.replicas < 2) return runs;
  chains_over_[static_cast<std::uint8_t>(way.server)] = way.epoch;
  // They may have refused any of them, and forgotten it: that answer has not come.
  std::bitset<256> perhaps = way.replicas;
  perhaps.set(static_cast<std::size_t>(way.server));
  for (const RegionRun& each : runs) where_.drop_spares(each.region, each.run, perhaps, released_);
  return runs;
}

// For this migration, and for good.
void Scatter::fail_server_locked(Server& server, std::string why) {
  if (!server.failed.empty()) return;
  server.failed = why.empty() ? "server " + server.address.name + " is gone" : std::move(why);
  server.tried = true;
  where_.silence(server.ordinal);
  std::vector<RegionRun> again;
  if (server.way) {
    server.way->open = false;
    server.way->stream->shutdown();
    const auto unacknowledged = take_back_locked(*server.way);
    again.insert(again.end(), unacknowledged.begin(), unacknowledged.end());
  }
  const Whereabouts::Lost lost = where_.lose(server.ordinal, &released_);
  if (kind_ == Kind::kRound) {
    // Their records are on the way to the destination: sent again now, such a record could come after the page.
    for (const RegionRun& each : lost.nowhere) suspects_[each.region]->set_run(each.run);
  } else {
    again.insert(again.end(), lost.nowhere.begin(), lost.nowhere.end());
  }
  look_at_copies_locked();
  want_second_locked(lost.single, again);
  put_back_locked(again);
  changed_.notify_all();
  if (dedup_) dedup_->server_failed_locked(server.ordinal);
}

void Scatter::give_up(std::size_t ordinal, std::string why) {
  {
    const std::lock_guard lock(mutex_);
    fail_server_locked(*servers_.at(ordinal), std::move(why));
  }
  check_drained();
}

void Scatter::attach_pacer_locked() {
  std::vector<int> fds;
  bool same_host = false;
  for (const auto& server : servers_) {
    if (!server->way) continue;
    fds.push_back(server->way->stream->fd());
    try {
      same_host = wire::is_same_host(fds.back());
    } catch (const std::exception&) {
      // Cut already.
    }
  }
  std::vector<int> direct;
  for (const auto& way : direct_) direct.push_back(way->stream->fd());
  link_pacer_.attach(std::move(fds), same_host, std::move(direct));
}

}  // namespace memferry
