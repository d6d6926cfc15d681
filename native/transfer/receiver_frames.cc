// What a connection says to the receiver. Every field is checked before it is used, whatever the peer: it has
// shown that it knows the secret, not that it is right.
#include <algorithm>
#include <cstring>

#include "os/sys_error.h"
#include "page/hash.h"
#include "transfer/receiver_impl.h"
#include "wire/socket.h"

namespace memferry {
namespace {

// Answers of the demand channel, a page and its header, are taken in one system call.
constexpr std::size_t kDemandBufferBytes = 16 * 1024;
// Far less than a source waits for an answer, and still nothing beside the pages.
constexpr std::chrono::seconds kTellTaken{1};

template <typename T>
std::span<std::byte> bytes_of(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

}  // namespace

wire::IoResult FrameReader::read(std::span<std::byte> into) {
  bytes_ += into.size();
  while (!into.empty()) {
    if (begin_ == end_ && into.size() >= buffer_.size()) {
      const wire::IoResult io = stream_.recv_exact(into);
      if (io.done()) received_.fetch_add(into.size(), std::memory_order_relaxed);
      return io;
    }
    if (begin_ == end_) {
      std::size_t got = 0;
      const wire::IoResult io = stream_.recv_some(buffer_, got);
      if (!io.done()) return io;
      received_.fetch_add(got, std::memory_order_relaxed);
      begin_ = 0;
      end_ = got;
    }
    const std::size_t take = std::min(into.size(), end_ - begin_);
    std::memcpy(into.data(), buffer_.data() + begin_, take);
    begin_ += take;
    into = into.subspan(take);
  }
  return {};
}

namespace {

bool is_same_host(const wire::Stream& stream) {
  try {
    return wire::is_same_host(stream.fd());
  } catch (const SystemError&) {
    return false;  // cut already; reading will say so
  }
}

}  // namespace

ChannelEnd Receiver::Impl::serve(Channel& channel, wire::Stream& stream) {
  try {
    return serve_frames(channel, stream);
  } catch (const std::exception& error) {
    return {ChannelEnd::Kind::kFatal, "SYSTEM", error.what()};
  }
}

ChannelEnd Receiver::Impl::serve_frames(Channel& channel, wire::Stream& stream) {
  const bool shares_cpus = !channel.demand && is_same_host(stream);
  CpuCourtesy courtesy(wire::shared_key(config.migration));
  Conversation with{
      channel, stream, FrameReader(stream, channel.demand ? kDemandBufferBytes : 0, bytes_received), {}};
  begin_telling(with);
  for (;;) {
    if (!tell_taken(with) || !tell_known(with)) return with.end;
    // On one host the push and the faults compete for CPUs: who waits for a page goes first.
    if (shares_cpus) courtesy.follow(state == State::kPaging && pager->faulted_lately());
    wire::FrameHeader header;
    if (!with.read(bytes_of(header))) return with.end;
    // What a socket holds can be read after its shutdown too.
    if (closing) return with.end;
    if (const char* wrong = wire::malformed(header, page_size)) {
      with.bad(wrong);
      return with.end;
    }
    bool going_on = false;
    switch (static_cast<wire::FrameType>(header.type)) {
      case wire::FrameType::kPages:
        going_on = on_pages(with, header);
        break;
      case wire::FrameType::kZero:
        going_on = on_zeros(with, header);
        break;
      case wire::FrameType::kDiscard:
        going_on = on_discard(with, header);
        break;
      case wire::FrameType::kSwitch:
        going_on = on_switch(with, header);
        break;
      case wire::FrameType::kBarrier:
        going_on = on_barrier(with, header);
        break;
      case wire::FrameType::kMap:
        going_on = on_map(with, header);
        break;
      case wire::FrameType::kElsewhere:
        going_on = on_elsewhere(with, header);
        break;
      case wire::FrameType::kTreeRequest:
        going_on = on_tree_request(with, header);
        break;
      case wire::FrameType::kSame:
        going_on = on_same(with, header);
        break;
      case wire::FrameType::kBaseEnd:
        going_on = on_base_end(with, header);
        break;
      case wire::FrameType::kLinkProbe:
        going_on = on_probe(with, header);
        break;
      case wire::FrameType::kKnownReference:
        going_on = on_reference(with, header);
        break;
      case wire::FrameType::kGoodbye:
        if (with.check_no_payload(header)) with.end = {ChannelEnd::Kind::kGoodbye, "", ""};
        break;
      default:
        with.bad("a frame that only the destination sends");
    }
    if (!going_on) return with.end;
  }
}

// The answer to a barrier is behind all that the sockets hold, which under memory pressure takes a while.
bool Receiver::Impl::tell_taken(Conversation& with) {
  const auto now = Clock::now();
  if (with.channel.demand || now - with.told_taken_at < kTellTaken) return true;
  with.told_taken_at = now;
  wire::FrameHeader taken = wire::make_header(wire::FrameType::kTaken, 0, {}, with.reader.bytes());
  wire::seal(taken);
  const wire::IoResult io = with.stream.send_all(std::as_bytes(std::span(&taken, 1)));
  return io.done() || with.lost(io);
}

bool Receiver::Impl::on_pages(Conversation& with, const wire::FrameHeader& header) {
  if (base_awaited) return with.bad("pages before the base is there");
  if (header.region >= maps.size()) return with.bad("no such region");
  ArrivalMap& map = *maps[header.region];
  if (!wire::run_inside(header.first_page, header.page_count, map.pages()))
    return with.bad("pages outside the region");
  if ((wire::encoding_of(header) & ~config.encodings) != 0)
    return with.bad("an encoding that was not agreed on");
  const PageRun run{PageNumber{header.first_page}, header.page_count};
  if (!with.channel.demand && !intake.wait_and_debit(header.payload_bytes, with.channel.thread)) return false;

  {
    FillingHold hold(filling_frames, map, run);
    if (state == State::kFilling) {
      forget_locations(header.region, run);
      return fill_pages(with, header, map, hold);
    }
  }
  if (state == State::kSwitching) return with.bad("pages while switching to post-copy");

  std::vector<std::byte>& staging = with.channel.staging;
  if (staging.size() < header.payload_bytes) staging.resize(wire::max_payload(page_size));
  std::span<std::byte> payload(staging.data(), header.payload_bytes);
  if (!with.read(payload)) return false;
  if (wire::encoding_of(header) != 0 && !decode_staged(with, header, payload)) return false;
  std::vector<std::uint64_t>& hashes = with.channel.hashes;
  hashes.resize(run.count);
  hash_pages(payload, page_size, hashes.data());
  if (wire::pages_checksum(header, hashes) != header.checksum)
    return with.bad("checksum of pages", "CHECKSUM");
  // Everything is here already, or lost: nothing may be overwritten.
  if (state != State::kPaging) return true;
  // Before the pages are claimed, so that a complete region has a complete digest. A page that is here
  // already came with the same content: the source sends each page once after its last change.
  for (std::uint64_t i = 0; i < run.count; ++i) {
    const PageNumber page{run.first.value + i};
    if (!map.received.test(page)) map.keep_hashes({page, 1}, std::span(&hashes[i], 1));
  }
  const Pager::Installed installed = pager->install(header.region, run, payload.data());
  pages_received.fetch_add(installed.pages, std::memory_order_relaxed);
  // Somebody waits for what the demand channel brings: it never waits for a thread of low priority.
  if (known && !with.channel.demand) known->arrived(header.region, run);
  account(installed.pages);
  return true;
}

// The guest may run here: what a delta is against is no longer what the source has sent.
bool Receiver::Impl::decode_staged(Conversation& with, const wire::FrameHeader& header,
                                   std::span<std::byte>& payload) {
  if (wire::encoding_of(header) == wire::kFlagDelta) return with.bad("a delta after the switch");
  std::vector<std::byte>& decoded = with.channel.decoded;
  decoded.resize(static_cast<std::size_t>(wire::max_payload(page_size)));
  const std::span<std::byte> pages =
      std::span(decoded).first(static_cast<std::size_t>(header.page_count * page_size));
  if (!with.channel.decoder.decode(wire::encoding_of(header), payload, pages))
    return with.bad("pages that cannot be decoded", "CHECKSUM");
  payload = pages;
  return true;
}

bool Receiver::Impl::fill_pages(Conversation& with, const wire::FrameHeader& header, ArrivalMap& map,
                                FillingHold& hold) {
  if (!hold.take()) return with.bad("pages that another channel is sending");
  bool verified = false;
  const auto read = [&with](std::span<std::byte> into) { return with.reader.read(into); };
  const wire::IoResult io = with.channel.filler->pages(read, header, map, verified);
  if (!io.done()) return with.lost(io);
  if (!verified) return true;
  pages_received.fetch_add(header.page_count, std::memory_order_relaxed);
  if (known && !with.channel.demand)
    known->arrived(header.region, {PageNumber{header.first_page}, header.page_count});
  return true;
}

bool Receiver::Impl::on_zeros(Conversation& with, const wire::FrameHeader& header) {
  if (base_awaited) return with.bad("zeros before the base is there");
  if (header.region >= maps.size()) return with.bad("no such region");
  ArrivalMap& map = *maps[header.region];
  if (!wire::run_inside(header.first_page, header.page_count, map.pages()))
    return with.bad("pages outside the region");
  if (!with.check_no_payload(header)) return false;
  const PageRun run{PageNumber{header.first_page}, header.page_count};

  {
    FillingHold hold(filling_frames, map, run);
    if (state == State::kFilling) {
      forget_locations(header.region, run);
      if (!hold.take()) return with.bad("zeros for pages that another channel is sending");
      with.channel.filler->zeros(header.region, map, run);
      pages_zero.fetch_add(run.count, std::memory_order_relaxed);
      return true;
    }
  }
  if (state == State::kSwitching) return with.bad("zeros while switching to post-copy");
  if (state != State::kPaging) return true;
  for (PageNumber from = run.first;;) {
    const auto unclaimed = map.received.next_clear(from, run.end(), run.count);
    if (!unclaimed) break;
    map.keep_zero_hashes(*unclaimed);
    from = unclaimed->end();
  }
  const Pager::Installed zeros = pager->install_zeros(header.region, run);
  pages_zero.fetch_add(zeros.pages, std::memory_order_relaxed);
  account(zeros.pages);
  return true;
}

void Receiver::Impl::account(std::uint64_t settled_pages) {
  if (settled_pages == 0) return;
  settled.fetch_add(settled_pages, std::memory_order_acq_rel);
  check_complete();
}

bool Receiver::Impl::on_discard(Conversation& with, const wire::FrameHeader& header) {
  if (with.channel.index != 0) return with.bad("discards come on channel 0");
  if (base_awaited) return with.bad("discards before the base is there");
  if (header.region >= maps.size()) return with.bad("no such region");
  if (switched || (state != State::kFilling && state != State::kPaging))
    return with.bad("discards after the switch");
  std::vector<std::byte>& staging = with.channel.staging;
  if (!with.read_checked_payload(header, staging)) return false;
  ArrivalMap& map = *maps[header.region];
  const std::size_t count = staging.size() / sizeof(wire::WireRun);
  const auto run_at = [&staging](std::size_t index) {
    wire::WireRun run;
    std::memcpy(&run, staging.data() + index * sizeof run, sizeof run);
    return run;
  };
  std::uint64_t behind_former = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const wire::WireRun run = run_at(i);
    if (!wire::run_inside(run.first_page, run.page_count, map.pages()))
      return with.bad("discards outside the region");
    if (run.first_page < behind_former) return with.bad("discards out of order");
    behind_former = run.first_page + run.page_count;
    if (map.arriving.count({PageNumber{run.first_page}, run.page_count}) > 0) {
      return with.bad("discards of pages that another channel is sending");
    }
  }
  std::unique_lock<std::mutex> filling;
  if (gather) filling = std::unique_lock(gather->filling());
  const auto nobody_reads = unread();
  if (known && state == State::kFilling) {
    // A page that is read after this has memory again, and would be taken for one that is here after the switch.
    known->stop_hashing();
    for (std::size_t i = 0; i < count; ++i) {
      const wire::WireRun run = run_at(i);
      known->wait_for_hash(header.region, {PageNumber{run.first_page}, run.page_count});
    }
  }
  Filler& filler = *with.channel.filler;
  std::uint64_t dropped = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const wire::WireRun run = run_at(i);
    const PageRun pages{PageNumber{run.first_page}, run.page_count};
    if (gather) gather->forget(header.region, pages);
    if (state == State::kPaging) pager->forget(header.region, pages);
    dropped += filler.discard(header.region, map, pages);
  }
  filler.sweep();
  if (state == State::kPaging) settled.fetch_sub(dropped, std::memory_order_acq_rel);
  return true;
}

bool Receiver::Impl::on_switch(Conversation& with, const wire::FrameHeader& header) {
  if (with.channel.index != 0) return with.bad("the switch comes on channel 0");
  if (base_awaited) return with.bad("a switch before the base is there");
  if (!with.check_no_payload(header)) return false;
  if (!pager) return with.bad("a switch to post-copy that was not agreed on");
  if (!switched) {
    if (state == State::kFilling) {
      {
        const std::lock_guard lock(mutex);
        if (state != State::kFilling) return with.bad("a switch too late");
        state = State::kSwitching;
      }
      // Nothing is gathered into memory any more from here on.
      if (gather) const std::lock_guard filling(gather->filling());
      // The source has had every round's barrier answered; pages in flight now would be received into memory
      // that is being registered.
      if (filling_frames != 0) return with.bad("a switch while pages are in flight");
      const auto nobody_reads = unread();
      if (known) {
        known->stop_hashing();
        known->wait_for_hash_of_missing();
      }
      std::uint64_t here = 0;
      for (std::uint32_t region = 0; region < maps.size(); ++region) {
        with.channel.filler->discard_unreceived(region, *maps[region], known != nullptr);
        here += maps[region]->received.count();
      }
      settled = here;
      pager->serve();
      if (known) known->resume_hashing();
    } else if (state != State::kPaging) {
      return with.bad("a switch too late");
    }
    const std::lock_guard lock(mutex);
    if (closing || (state != State::kSwitching && state != State::kPaging))
      return with.bad("a switch too late");
    state = State::kPaging;
    switched = true;
    pager->set_online(demand_attached);
    EngineEvent event{};
    event.kind = EngineEventKind::kSwitched;
    push(std::move(event));
  }
  // Again after a cut, the answer may have been lost.
  wire::FrameHeader ack = wire::make_header(wire::FrameType::kSwitchAck);
  wire::seal(ack);
  const wire::IoResult io = with.stream.send_all(std::as_bytes(std::span(&ack, 1)));
  if (!io.done()) return with.lost(io);
  check_complete();
  return true;
}

// Each suspect page is named once, by whichever data channel's barrier comes first after it was found, and each
// answer counts what was named before it on its channel. So when every channel has answered, every page found
// before any of the barriers has been named, and none twice: naming a page again that is already on its way
// would have it sent again for nothing.
bool Receiver::Impl::on_barrier(Conversation& with, const wire::FrameHeader& header) {
  if (!with.check_no_payload(header)) return false;
  std::uint64_t named = 0;
  for (std::uint32_t region = 0; region < maps.size() && !with.channel.demand; ++region) {
    if (!name_suspects(with, region, header.tag, named)) return false;
  }
  wire::FrameHeader ack =
      wire::make_header(wire::FrameType::kBarrierAck, 0, {PageNumber{0}, named}, header.tag);
  wire::seal(ack);
  if (with.channel.demand && pager) {
    // The pager's requests go out on the same stream.
    return pager->writer().send(ack) || with.lost({wire::IoResult::Kind::kCut, 0});
  }
  const wire::IoResult io = with.stream.send_all(std::as_bytes(std::span(&ack, 1)));
  return io.done() || with.lost(io);
}

bool Receiver::Impl::name_suspects(Conversation& with, std::uint32_t region, std::uint64_t tag,
                                   std::uint64_t& named) {
  ArrivalMap& map = *maps[region];
  const PageNumber end{map.pages()};
  const std::size_t most = wire::max_payload(page_size) / sizeof(wire::WireRun);
  PageNumber from{0};
  for (;;) {
    std::vector<wire::WireRun> runs;
    while (runs.size() < most) {
      const auto run = map.unnamed.take_run(from, end, map.pages());
      if (!run) break;
      runs.push_back({run->first.value, run->count});
      named += run->count;
      from = run->end();
    }
    if (runs.empty()) return true;
    const auto payload = std::as_bytes(std::span(runs));
    wire::FrameHeader list = wire::make_header(wire::FrameType::kSuspects, region, {}, tag);
    wire::seal(list, payload);
    std::array<iovec, 2> buffers{iovec{&list, sizeof list}, iovec{runs.data(), payload.size()}};
    const wire::IoResult io = with.stream.send_all(buffers);
    if (!io.done()) return with.lost(io);
  }
}

bool Receiver::Impl::send_bitmaps(wire::Stream& stream) {
  const std::uint64_t most = wire::max_payload(page_size) / sizeof(std::uint64_t);
  std::vector<std::uint64_t> words;
  for (std::uint32_t region = 0; region < maps.size(); ++region) {
    const ArrivalMap& map = *maps[region];
    const std::uint64_t all = (map.pages() + 63) / 64;
    for (std::uint64_t first = 0; first < all; first += most) {
      const std::uint64_t count = std::min(most, all - first);
      words.resize(count);
      for (std::uint64_t i = 0; i < count; ++i) words[i] = map.received.word(first + i);
      const std::uint64_t pages = std::min(count * 64, map.pages() - first * 64);
      wire::FrameHeader header =
          wire::make_header(wire::FrameType::kBitmap, region, {PageNumber{first * 64}, pages});
      const auto payload = std::as_bytes(std::span(words));
      wire::seal(header, payload);
      std::array<iovec, 2> buffers{iovec{&header, sizeof header}, iovec{words.data(), payload.size()}};
      if (!stream.send_all(buffers).done()) return false;
    }
  }
  wire::FrameHeader last = wire::make_header(wire::FrameType::kBitmapEnd);
  wire::seal(last);
  return stream.send_all(std::as_bytes(std::span(&last, 1))).done();
}

}  // namespace memferry
