// Dialling a set of connections, and the bitmap that follows a redial. On the supervisor's thread.
#include <algorithm>
#include <cstring>

#include "os/sys_error.h"
#include "transfer/sender_impl.h"
#include "wire/hello.h"

namespace memferry {

Sender::Impl::DialOutcome Sender::Impl::dial_all(Epoch& of, Clock::time_point deadline) {
  using Kind = DialOutcome::Kind;
  std::vector<std::unique_ptr<wire::Stream>> streams;
  bool said_hello = false;
  try {
    // All hellos before the first answer: one round trip for all of them.
    for (unsigned i = 0; i <= config.channels; ++i) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      wire::DialResult dialled =
          wire::dial(address, std::max(left, std::chrono::milliseconds::zero()), cancel.get());
      const std::string to = "dialling " + address.describe() + ": ";
      switch (dialled.kind) {
        case wire::DialResult::Kind::kConnected:
          break;
        case wire::DialResult::Kind::kCancelled:
          return {Kind::kCancelled, said_hello, to + "cancelled"};
        case wire::DialResult::Kind::kTimedOut:
          return {Kind::kUnreachable, said_hello, to + "no answer in time"};
        case wire::DialResult::Kind::kFailed:
          return {Kind::kUnreachable, said_hello, to + std::generic_category().message(dialled.error)};
      }
      auto stream = std::make_unique<wire::PlainStream>(std::move(dialled.fd));
      wire::Hello hello{};
      hello.preface = wire::kDataPreface;
      hello.migration = config.migration;
      hello.version = wire::kVersion;
      hello.channel = i == config.channels ? wire::kDemandChannel : static_cast<std::uint16_t>(i);
      hello.epoch = of.number;
      hello.token = token(of.number, i).value();
      said_hello = true;
      const wire::IoResult sent = stream->send_all(std::as_bytes(std::span(&hello, 1)));
      if (!sent.done()) return {Kind::kUnreachable, said_hello, to + sent.describe()};
      streams.push_back(std::move(stream));
    }
    bool any_accepted = false;
    bool any_unknown = false;
    DialOutcome outcome{Kind::kUp, false, {}};
    for (const auto& stream : streams) {
      wire::HelloReply reply{};
      const wire::IoResult received =
          wire::receive_until(*stream, std::as_writable_bytes(std::span(&reply, 1)), deadline, cancel.get());
      if (!received.done()) {
        any_unknown = true;
        outcome.kind = received.error == ECANCELED ? Kind::kCancelled : Kind::kUnreachable;
        outcome.why = "no answer to a hello: " + received.describe();
      } else if (reply.magic == wire::kFrameMagic &&
                 reply.status == static_cast<std::uint32_t>(wire::HelloStatus::kAccepted)) {
        any_accepted = true;
      } else if (outcome.kind != Kind::kCancelled) {
        outcome.kind = Kind::kRefused;
        outcome.why = "the destination refused a connection";
      }
      if (outcome.kind == Kind::kCancelled) break;
    }
    // Tokens that were refused are still good: the destination may not have been ready for them.
    outcome.token_used = any_accepted || any_unknown;
    if (outcome.kind != Kind::kUp) return outcome;
  } catch (const SystemError& error) {
    return {Kind::kUnreachable, said_hello, error.what()};
  }
  of.demand = std::move(streams.back());
  streams.pop_back();
  for (unsigned i = 0; i < config.channels; ++i) {
    of.data.push_back(std::make_unique<DataChannel>(i));
    of.data.back()->stream = std::move(streams[i]);
  }
  return {Kind::kUp, true, {}};
}

std::string Sender::Impl::exchange_bitmap(Epoch& of, Clock::time_point deadline, std::string& cut) {
  std::vector<std::unique_ptr<AtomicBitmap>> have;
  std::uint64_t words_allowed = 0;
  for (const auto& region : config.regions) {
    have.push_back(std::make_unique<AtomicBitmap>(region->capacity_pages()));
    words_allowed += have.back()->words();
  }
  std::vector<std::byte> payload;
  for (;;) {
    wire::FrameHeader header{};
    wire::IoResult received = wire::receive_until(*of.demand, std::as_writable_bytes(std::span(&header, 1)),
                                                  deadline, cancel.get());
    if (received.done()) {
      if (const char* wrong = wire::malformed(header, page_size)) return wrong;
      payload.resize(header.payload_bytes);
      received = wire::receive_until(*of.demand, payload, deadline, cancel.get());
    }
    if (!received.done()) {
      cut = "waiting for the bitmap: " + received.describe();
      return {};
    }
    if (wire::payload_checksum(header, payload) != header.checksum) return "bitmap with a wrong checksum";
    if (header.type == static_cast<std::uint16_t>(wire::FrameType::kBitmapEnd)) break;
    if (header.type != static_cast<std::uint16_t>(wire::FrameType::kBitmap)) return "expected a bitmap";
    if (header.region >= have.size()) return "bitmap of an unknown region";
    const std::uint64_t words = payload.size() / sizeof(std::uint64_t);
    AtomicBitmap& bitmap = *have[header.region];
    if (!wire::run_inside(header.first_page / 64, words, bitmap.words())) return "bitmap outside its region";
    // Each word once: the exchange is bounded whatever the peer sends.
    if (words > words_allowed) return "bitmap sent more than once";
    words_allowed -= words;
    for (std::uint64_t i = 0; i < words; ++i) {
      std::uint64_t bits = 0;
      std::memcpy(&bits, payload.data() + i * sizeof bits, sizeof bits);
      bitmap.or_word(header.first_page / 64 + i, bits);
    }
  }
  for (std::uint32_t region = 0; region < have.size(); ++region) {
    if (scatter) {
      scatter->reconcile(region, *have[region]);
    } else {
      queue.mark_lacking(region, *have[region]);
    }
  }
  return {};
}

void Sender::Impl::start_threads(const std::shared_ptr<Epoch>& started) {
  Epoch& of = *started;
  epoch = started;
  task.kind = TaskKind::kNone;
  bool same_host = false;
  std::vector<int> fds;
  for (const auto& channel : of.data) fds.push_back(channel->stream->fd());
  try {
    same_host = wire::is_same_host(of.demand->fd());
  } catch (const SystemError&) {
    // Cut already; the readers will say so.
  }
  pacer.reset();
  pacer.attach(std::move(fds), same_host);
  if (scatter) {
    for (const auto& channel : of.data) {
      channel->way =
          scatter->open_direct(channel->index, channel->stream, "channel " + std::to_string(channel->index));
    }
    of.demand_way = scatter->open_demand();
  }
  of.still_sending = static_cast<unsigned>(of.data.size());
  for (const auto& channel : of.data) {
    const std::string number = std::to_string(channel->index);
    channel->sender.start("mf-send-" + number,
                          [this, &of, &channel](WorkerThread&) { send_loop(of, *channel); });
    channel->reader.start("mf-ack-" + number,
                          [this, &of, &channel](WorkerThread&) { read_loop(of, *channel); });
  }
  of.demand_server.start("mf-demand", [this, &of](WorkerThread&) { serve_demand(of); });
  const bool encodes = encoding.compress != wire::Compress::kOff || encoding.cache != nullptr;
  note_memory(peak_memory + of.data.size() * (PageFrames(page_size).memory_bytes() +
                                              (encodes ? PageEncoder::most_memory_bytes(page_size) : 0) +
                                              (references ? PageReferrer::most_memory_bytes(page_size) : 0)));
}

}  // namespace memferry
