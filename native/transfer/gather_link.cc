#include "transfer/gather_link.h"

#include <algorithm>

#include "page/hash.h"
#include "transfer/stage_dial.h"
#include "wire/later_tokens.h"
#include "wire/link_meter.h"
#include "wire/socket.h"

namespace memferry {
namespace {

constexpr std::chrono::milliseconds kFirstBackoff{10};
constexpr std::chrono::milliseconds kLongestBackoff{1000};
constexpr std::chrono::milliseconds kDialTimeout{2000};
constexpr std::chrono::milliseconds kShortestDial{100};
// How often a wait for an answer looks whether it has lasted too long.
constexpr std::chrono::milliseconds kLook{100};
constexpr int kDemandThreadNice = -20;

}  // namespace

GatherLink::GatherLink(Gather& gather, Gather::Server& server, wire::StageRole role)
    : gather_(gather),
      server_(server),
      role_(role),
      ahead_(role == wire::StageRole::kGather),
      encodings_(ahead_ ? gather.config_.compressions : std::uint16_t{0}) {}

// Several attempts, silent ones too, fit into the time after which the server counts as failed.
std::chrono::milliseconds GatherLink::dial_timeout() const {
  return std::clamp(gather_.config_.recover_timeout / 8, kShortestDial, kDialTimeout);
}

// Well within the time after which the server counts as failed.
std::chrono::milliseconds GatherLink::longest_backoff() const {
  return std::clamp(gather_.config_.recover_timeout / 16, kFirstBackoff, kLongestBackoff);
}

void GatherLink::start() {
  const std::string name = (ahead_ ? "mf-gather-" : "mf-fetch-") + std::to_string(server_.ordinal);
  thread_.start(name, [this](WorkerThread& self) { main(self); });
  started_ = true;
}

void GatherLink::wake() {
  if (started_) thread_.wake();
}

void GatherLink::want_map() {
  {
    const std::lock_guard lock(mutex_);
    map_wanted_ = true;
  }
  wake();
}

void GatherLink::shut_down() {
  if (started_) thread_.request_stop();
  const std::lock_guard lock(mutex_);
  if (stream_) stream_->shutdown();
}

void GatherLink::stop() {
  shut_down();
  thread_.stop();
}

bool GatherLink::ask(std::uint32_t region, PageRun run) {
  const std::lock_guard lock(mutex_);
  if (!stream_) return false;
  const wire::FrameHeader header = note_read(region, run);
  return stream_->send_all(std::as_bytes(std::span(&header, 1))).done();
}

std::optional<std::chrono::microseconds> GatherLink::round_trip() const {
  const std::lock_guard lock(mutex_);
  return stream_ ? wire::shortest_round_trip(stream_->fd()) : std::nullopt;
}

bool GatherLink::under_way(std::uint32_t region, PageNumber page) const {
  const std::lock_guard lock(mutex_);
  return std::any_of(reads_.begin(), reads_.end(), [&](const Read& read) {
    return !read.check && read.region == region && page.value >= read.run.first.value + read.covered &&
           page < read.run.end();
  });
}

std::string GatherLink::progressed(std::string why) {
  progressed_ = progressed_ || why.empty();
  return why;
}

bool GatherLink::is_asked() const {
  const std::lock_guard lock(mutex_);
  return map_under_way_ || !reads_.empty();
}

// With the mutex held; it is sent before that is let go, or by the only thread that reads the answers.
wire::FrameHeader GatherLink::note_read(std::uint32_t region, PageRun run) {
  run.count = std::min(run.count, wire::max_run_pages(gather_.config_.page_size));
  Read read{next_id_++, region, run, 0, {}, Clock::now(), nullptr};
  for (PageNumber page = run.first; page < run.end(); ++page.value) {
    read.expected.push_back(gather_.where_[region]->hash(page));
  }
  wire::FrameHeader header = wire::make_header(wire::FrameType::kRead, region, run, read.id);
  header.flags |= encodings_;
  wire::seal(header);
  if (reads_.empty()) silent_since_ = read.asked;
  reads_.push_back(std::move(read));
  if (ahead_) gather_.reading_ahead_.fetch_add(1, std::memory_order_relaxed);
  return header;
}

// With the mutex held; appended to asking_.
void GatherLink::note_check(std::unique_ptr<GatherBase::Check> check) {
  Read read{next_id_++, check->region, check->run, 0, {}, Clock::now(), nullptr};
  wire::FrameHeader header = wire::make_header(wire::FrameType::kHashRequest, read.region, read.run, read.id);
  wire::seal(header);
  asking_.push_back(header);
  if (reads_.empty()) silent_since_ = read.asked;
  read.check = std::move(check);
  reads_.push_back(std::move(read));
  gather_.reading_ahead_.fetch_add(1, std::memory_order_relaxed);
}

void GatherLink::main(WorkerThread& self) {
  if (!ahead_) set_this_thread_nice(kDemandThreadNice);
  auto backoff = kFirstBackoff;
  while (!self.stopping() && !server_.failed) {
    std::shared_ptr<wire::Stream> stream;
    std::string why;
    bool for_good = false;
    try {
      run_once(self, stream, why, for_good, backoff);
    } catch (const std::exception& error) {
      // No memory for a page, no descriptor: this server's part of the guest, not the process.
      give_back_reads();
      gather_.fail(server_, "server " + server_.address->name + ": " + error.what());
      break;
    }
    if (self.stopping()) break;
    if (gather_.link_failed(server_, why, for_good)) break;
    // Not shorter for being woken: whoever wakes it wants the connection, and each attempt takes a token.
    for (const auto until = Clock::now() + backoff; Clock::now() < until && !self.stopping();) {
      self.wait(static_cast<int>(std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count()));
    }
    backoff = std::min(2 * backoff, longest_backoff());
  }
}

// Dials, and serves the connection until it is over.
void GatherLink::run_once(WorkerThread& self, std::shared_ptr<wire::Stream>& stream, std::string& why,
                          bool& for_good, std::chrono::milliseconds& backoff) {
  {
    StageDial dialled = dial_stage(*server_.address, gather_.config_.image, role_, attempt_,
                                   Clock::now() + dial_timeout(), self.wake_fd());
    stream = std::move(dialled.stream);
    why = std::move(dialled.why);
    for_good = dialled.for_good;
    if (stream) {
      // In the middle of a frame.
      constexpr timeval kPatience{kAnswerPatience.count() / 1000, kAnswerPatience.count() % 1000 * 1000};
      ::setsockopt(stream->fd(), SOL_SOCKET, SO_RCVTIMEO, &kPatience, sizeof kPatience);
      {
        const std::lock_guard lock(mutex_);
        stream_ = stream;
        silent_since_ = Clock::now();
      }
      // A stop that came before the stream was there found nothing to shut down.
      if (!self.stopping()) {
        gather_.link_up(server_, role_);
        const auto began = Clock::now();
        progressed_ = false;
        why = serve(self, *stream);
        for_good = for_good_;
        if (answered_at_ > began)
          barren_ = 0;
        else if (is_asked())
          ++barren_;
        if (barren_ >= wire::kMostBarrenAttempts && !for_good) {
          for_good = true;
          why = "it answers nothing, however often it is dialled: " + why;
        }
        // One that breaks at once, again and again, is no sign of life, and each takes a token.
        if (Clock::now() - began > kAnswerPatience) backoff = kFirstBackoff;
      }
      {
        const std::lock_guard lock(mutex_);
        stream_.reset();
      }
      stream->shutdown();
      give_back_reads();
      gather_.link_down(server_, role_);
    }
  }
}

void GatherLink::give_back_reads() {
  std::deque<Read> reads;
  {
    const std::lock_guard lock(mutex_);
    reads.swap(reads_);
    map_wanted_ = map_wanted_ || map_under_way_;
  }
  map_under_way_ = false;
  if (!ahead_) return;
  gather_.reading_ahead_.fetch_sub(static_cast<unsigned>(reads.size()), std::memory_order_relaxed);
  const bool checking =
      std::any_of(reads.begin(), reads.end(), [](const Read& read) { return !!read.check; });
  // One that knows no such questions ends the connection at the first.
  if (checking && !server_.told_hashes && !gather_.closing_) gather_.base_->refused(server_.ordinal);
  for (const Read& read : reads) {
    if (read.check) continue;  // lets go of its pages as it goes
    for (PageNumber page = read.run.first; page < read.run.end(); ++page.value)
      gather_.assign(read.region, page);
  }
}

std::string GatherLink::serve(WorkerThread& self, wire::Stream& stream) {
  bool same_host = false;
  try {
    same_host = wire::is_same_host(stream.fd());
  } catch (const std::exception&) {
    // Cut already; reading will say so.
  }
  CpuCourtesy courtesy(wire::shared_key(gather_.config_.image));
  for (;;) {
    if (self.stopping()) return "ended";
    if (ahead_ && same_host) courtesy.follow(gather_.receiver_.strayed_lately());
    std::string why;
    if (ahead_ && !ask_ahead(stream, why)) return why;
    bool waiting = map_under_way_;
    bool too_long = false;
    {
      const std::lock_guard lock(mutex_);
      waiting = waiting || !reads_.empty();
      too_long = waiting && Clock::now() - silent_since_ > kAnswerPatience;
    }
    if (too_long) return "no answer in time";
    if (!waiting && ahead_) {
      const Clock::time_point now = Clock::now();
      const Clock::time_point until =
          std::max(limited_until_,
                   Clock::time_point(Clock::duration(gather_.yield_until_.load(std::memory_order_relaxed))));
      const auto pause = std::chrono::ceil<std::chrono::milliseconds>(until - now);
      self.wait(static_cast<int>(
          std::clamp(pause, std::chrono::milliseconds(until > now ? 1 : kLook.count()), kLook).count()));
      continue;
    }
    const auto now = Clock::now();
    const auto look =
        limited_until_ > now ? std::min<Clock::time_point>(limited_until_, now + kLook) : now + kLook;
    const auto ready = wire::wait_readable(stream.fd(), look, self.wake_fd());
    if (ready == wire::DialResult::Kind::kCancelled) self.drain_wake();
    if (ready != wire::DialResult::Kind::kConnected) continue;
    why = read_frame(stream);
    if (!why.empty()) return why;
    const std::lock_guard lock(mutex_);
    silent_since_ = Clock::now();
  }
}

bool GatherLink::ask_ahead(wire::Stream& stream, std::string& why) {
  gather_.rebalance();
  {
    const std::lock_guard lock(mutex_);
    if (map_wanted_ && !map_under_way_) {
      map_wanted_ = false;
      map_under_way_ = true;
      map_asked_ = Clock::now();
      map_due_ = map_asked_ + kMapPatience;
      map_pages_left_ = 0;
      for (const ArrivalMap* map : gather_.maps_) map_pages_left_ += kMostTold * map->pages();
      silent_since_ = map_asked_;
      wire::FrameHeader header = wire::make_header(wire::FrameType::kMapRequest);
      wire::seal(header);
      const wire::IoResult result = stream.send_all(std::as_bytes(std::span(&header, 1)));
      if (!result.done()) {
        why = result.describe();
        return false;
      }
    }
  }
  asking_.clear();
  choose_ahead();
  if (asking_.empty()) return true;
  const std::lock_guard lock(mutex_);
  const wire::IoResult result = stream.send_all(std::as_bytes(std::span(asking_)));
  if (!result.done()) why = result.describe();
  return result.done();
}

std::string GatherLink::read_frame(wire::Stream& stream) {
  wire::FrameHeader header{};
  frame_due_ = Clock::now() + kAnswerPatience;
  if (std::string cut = read(stream, std::as_writable_bytes(std::span(&header, 1))); !cut.empty()) return cut;
  if (const char* wrong = wire::malformed(header, gather_.config_.page_size)) return wrong;
  server_.bytes.fetch_add(sizeof header + header.payload_bytes, std::memory_order_relaxed);
  switch (static_cast<wire::FrameType>(header.type)) {
    case wire::FrameType::kPages:
    case wire::FrameType::kZero:
    case wire::FrameType::kAbsent:
    case wire::FrameType::kHashes:
      return progressed(on_answer(stream, header));
    case wire::FrameType::kMap:
    case wire::FrameType::kMapEnd:
      if (!map_under_way_) return "a map that was not asked for";
      answered_at_ = Clock::now();
      return progressed(on_map(stream, header));
    case wire::FrameType::kTurn:
      return on_turn(header);
    default:
      return "a frame that a server does not send here";
  }
}

// Another sign of life, unless it is the only one for too long.
std::string GatherLink::on_turn(const wire::FrameHeader& header) {
  if (wire::payload_checksum(header, {}) != header.checksum) return "a wrong checksum";
  const Clock::time_point now = Clock::now();
  Clock::time_point since = std::max(answered_at_, map_under_way_ ? map_asked_ : Clock::time_point{});
  {
    const std::lock_guard lock(mutex_);
    if (reads_.empty() && !map_under_way_) return "an answer to nothing";
    if (!reads_.empty()) since = std::max(since, reads_.front().asked);
    // What it waits is not what it is slow.
    if (map_under_way_) map_due_ += now - silent_since_;
  }
  return now - since > wire::kLongestTurn ? "no answer in time: its turn never comes" : "";
}

// A byte now and then is no sign of life.
std::string GatherLink::read(wire::Stream& stream, std::span<std::byte> into) {
  frame_due_ += time_for(into.size());
  for (std::size_t at = 0; at < into.size();) {
    // What lies here already was not late: this thread was.
    const auto now = Clock::now();
    if (now >= frame_due_ &&
        wire::wait_readable(stream.fd(), now, -1) != wire::DialResult::Kind::kConnected) {
      return "no answer in time: the rest of a frame";
    }
    std::size_t got = 0;
    wire::IoResult result = stream.recv_some(into.subspan(at), got);
    if (at > 0 && result.kind == wire::IoResult::Kind::kEnd) result = {wire::IoResult::Kind::kCut, 0};
    if (!result.done()) return result.describe();
    at += got;
  }
  return {};
}

// Answers come in the order of the reads, and those of a read in the order of its pages.
std::string GatherLink::on_answer(wire::Stream& stream, const wire::FrameHeader& header) {
  const PageRun run{PageNumber{header.first_page}, header.page_count};
  std::uint32_t region = 0;
  GatherBase::Check* check = nullptr;  // this thread alone takes reads away
  {
    const std::lock_guard lock(mutex_);
    if (reads_.empty()) return "an answer to nothing";
    const Read& read = reads_.front();
    if (header.tag != read.id || header.region != read.region ||
        header.first_page != read.run.first.value + read.covered ||
        header.page_count > read.run.count - read.covered) {
      return "an answer to another question";
    }
    region = read.region;
    check = read.check.get();
    if (check == nullptr) {
      expected_.assign(read.expected.begin() + static_cast<std::ptrdiff_t>(read.covered),
                       read.expected.begin() + static_cast<std::ptrdiff_t>(read.covered + run.count));
    }
  }
  answered_at_ = Clock::now();
  const auto type = static_cast<wire::FrameType>(header.type);
  if (type == (check != nullptr ? wire::FrameType::kPages : wire::FrameType::kHashes))
    return "an answer to another question";
  payload_.resize(header.payload_bytes);
  if (std::string cut = read(stream, payload_); !cut.empty()) return cut;
  if (check != nullptr) {
    if (wire::payload_checksum(header, payload_) != header.checksum) return "a wrong checksum";
    server_.told_hashes = true;
    // Of what it does not have, it says so again when it is asked for the page.
    if (type == wire::FrameType::kHashes) gather_.base_->answered(*check, run.first, payload_);
  } else if (type == wire::FrameType::kPages) {
    if (std::string wrong = on_pages(header); !wrong.empty()) return wrong;
    if (!ahead_) gather_.limit_.debit(header.payload_bytes);
    gather_.came(server_, region, run, decoded_, hashes_, expected_);
  } else {
    if (wire::payload_checksum(header, {}) != header.checksum) return "a wrong checksum";
    // Zeros are in the map, and only the source's word counts for them.
    gather_.not_held(server_.ordinal, region, run, expected_);
  }
  Clock::duration took{};
  std::unique_ptr<GatherBase::Check> checked;
  {
    const std::lock_guard lock(mutex_);
    if (reads_.empty()) return {};
    Read& read = reads_.front();
    read.covered += run.count;
    if (read.covered < read.run.count) return {};
    took = Clock::now() - read.asked;
    checked = std::move(read.check);
    reads_.pop_front();
  }
  if (checked) gather_.base_->finish(std::move(checked));
  if (!ahead_) {
    gather_.answered_demand(server_, took);
    return {};
  }
  yield_to_source(stream, took);
  if (gather_.reading_ahead_.fetch_sub(1, std::memory_order_relaxed) == 1 &&
      gather_.receiver_.source_sends()) {
    // Whoever waits for its turn.
    for (const auto& server : gather_.servers_) {
      if (server.get() != &server_) server->ahead->wake();
    }
  }
  return {};
}

// What is in payload_, into decoded_ and its hashes.
std::string GatherLink::on_pages(const wire::FrameHeader& header) {
  const std::uint64_t page_size = gather_.config_.page_size;
  const std::uint16_t encoding = wire::encoding_of(header);
  if ((encoding & ~encodings_) != 0) return "an encoding that was not asked for";
  if (encoding == 0) {
    decoded_.swap(payload_);
  } else {
    decoded_.resize(static_cast<std::size_t>(header.page_count * page_size));
    if (!decoder_.decode(encoding, payload_, decoded_)) return "pages that cannot be decoded";
  }
  hashes_.resize(static_cast<std::size_t>(header.page_count));
  hash_pages(decoded_, page_size, hashes_.data());
  return wire::pages_checksum(header, hashes_) == header.checksum ? "" : "a wrong checksum";
}

}  // namespace memferry
