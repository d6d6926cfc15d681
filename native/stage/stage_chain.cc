#include "stage/stage_chain.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "os/sys_error.h"
#include "wire/hello.h"

namespace memferry {
namespace {

wire::FrameHeader over_frame(Image::Chain chain) {
  wire::FrameHeader header = wire::make_header(wire::FrameType::kChainOver, chain.ordinal, {}, chain.epoch);
  wire::seal(header);
  return header;
}

}  // namespace

void ChainTargets::set(std::uint8_t ordinal, const std::string& host, std::uint16_t port,
                       std::vector<wire::Token> tokens) {
  const wire::SocketAddress address = wire::SocketAddress::parse(host, port);
  const std::lock_guard lock(mutex_);
  Known& known = known_[ordinal];
  known.address = address;
  known.tokens = std::move(tokens);
}

std::optional<ChainTargets::Target> ChainTargets::next(std::uint8_t ordinal) {
  const std::lock_guard lock(mutex_);
  const auto found = known_.find(ordinal);
  if (found == known_.end() || found->second.next_attempt >= found->second.tokens.size()) return std::nullopt;
  Known& known = found->second;
  const std::uint32_t attempt = known.next_attempt++;
  return Target{known.address, attempt, known.tokens[attempt]};
}

bool ScatterAnswers::send_locked(wire::FrameHeader header) {
  if (over_) return false;
  wire::seal(header);
  over_ = !send_(header);
  return !over_;
}

bool ScatterAnswers::refused(std::uint32_t region, PageRun run, std::uint8_t ordinal, std::uint16_t why) {
  wire::FrameHeader header = wire::make_header(wire::FrameType::kRefused, region, run, ordinal);
  header.flags = why;
  const std::lock_guard lock(mutex_);
  return send_locked(header);
}

bool ScatterAnswers::barrier(std::uint64_t tag, std::vector<std::uint8_t> waiting) {
  const std::lock_guard lock(mutex_);
  if (barriers_.size() >= kMostBarriers) return false;
  barriers_.push_back({tag, std::move(waiting), std::chrono::steady_clock::now()});
  return answer_barriers_locked();
}

// A server answers its barriers in order, and a later barrier waits for no fewer servers: so the oldest is always
// the first to be complete.
bool ScatterAnswers::chain_acknowledged(std::uint8_t ordinal, std::uint64_t tag) {
  const std::lock_guard lock(mutex_);
  for (Barrier& barrier : barriers_) {
    const auto waiting = std::find(barrier.waiting.begin(), barrier.waiting.end(), ordinal);
    if (waiting == barrier.waiting.end()) continue;
    if (barrier.tag != tag) return false;
    barrier.waiting.erase(waiting);
    return answer_barriers_locked();
  }
  return false;
}

bool ScatterAnswers::worked(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  worked_ += bytes;
  const auto now = std::chrono::steady_clock::now();
  if (now - told_ < wire::kTellWork) return !over_;
  told_ = now;
  return send_locked(wire::make_header(wire::FrameType::kTaken, 0, {}, worked_));
}

bool ScatterAnswers::owed_since(std::uint8_t ordinal, std::chrono::steady_clock::time_point since) {
  const std::lock_guard lock(mutex_);
  return std::any_of(barriers_.begin(), barriers_.end(), [&](const Barrier& barrier) {
    return barrier.asked < since &&
           std::find(barrier.waiting.begin(), barrier.waiting.end(), ordinal) != barrier.waiting.end();
  });
}

bool ScatterAnswers::answer_barriers_locked() {
  while (!barriers_.empty() && barriers_.front().waiting.empty()) {
    const std::uint64_t tag = barriers_.front().tag;
    barriers_.pop_front();
    if (!send_locked(wire::make_header(wire::FrameType::kBarrierAck, 0, {}, tag))) return false;
  }
  return true;
}

void ScatterAnswers::chain_broken(std::uint8_t ordinal) {
  const std::lock_guard lock(mutex_);
  (void)send_locked(wire::make_header(wire::FrameType::kChainBroken, 0, {}, ordinal));
  over_ = true;
}

ReplicaChains::ReplicaChains(std::shared_ptr<Image> image, std::uint32_t epoch,
                             std::shared_ptr<ChainTargets> targets, ScatterAnswers& answers,
                             WorkerThread& self, std::function<void()> on_broken, ChainTimeouts timeouts)
    : image_(std::move(image)),
      epoch_(epoch),
      targets_(std::move(targets)),
      answers_(answers),
      self_(self),
      on_broken_(std::move(on_broken)),
      timeouts_(timeouts) {}

bool ReplicaChains::broken(std::uint8_t ordinal) {
  // Where this side is ending, the other server is not to blame; and the source may still hear us.
  if (closing_ || self_.stopping()) return false;
  answers_.chain_broken(ordinal);
  on_broken_();
  return false;
}

bool ReplicaChains::forward(std::uint8_t ordinal, std::span<iovec> buffers) {
  Link* to = link(ordinal);
  return (to != nullptr && send(*to, buffers)) || broken(ordinal);
}

// Whoever reads its answers ends this when the server gives no sign any more.
bool ReplicaChains::send(Link& link, std::span<iovec> buffers) {
  for (const iovec& each : buffers) link.forwarded.fetch_add(each.iov_len, std::memory_order_relaxed);
  link.sending_since.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
  const bool sent = link.stream->send_all(buffers).done();
  link.sending_since.store(0, std::memory_order_relaxed);
  return sent;
}

bool ReplicaChains::send(Link& link, const wire::FrameHeader& header) {
  wire::FrameHeader copy = header;
  iovec buffer{&copy, sizeof copy};
  return send(link, std::span(&buffer, 1));
}

bool ReplicaChains::over(Image::Chain chain) {
  const wire::FrameHeader header = over_frame(chain);
  for (const auto& [ordinal, link] : links_) {
    if (!send(*link, header)) return broken(ordinal);
  }
  return true;
}

bool ReplicaChains::barrier(const wire::FrameHeader& header) {
  std::vector<std::uint8_t> ordinals;
  for (const auto& [ordinal, link] : links_) ordinals.push_back(ordinal);
  // Before the first of them can answer.
  if (!answers_.barrier(header.tag, ordinals)) return false;
  for (const auto& [ordinal, link] : links_) {
    if (!send(*link, header)) return broken(ordinal);
  }
  return true;
}

void ReplicaChains::goodbye() {
  wire::FrameHeader header = wire::make_header(wire::FrameType::kGoodbye);
  wire::seal(header);
  for (const auto& [ordinal, link] : links_) (void)send(*link, header);
}

void ReplicaChains::interrupt() {
  const std::lock_guard lock(mutex_);
  for (const auto& [ordinal, link] : links_) link->stream->shutdown();
}

void ReplicaChains::close() {
  closing_ = true;
  interrupt();
  // Joined without the mutex: an answer's reader may be on its way to interrupt().
  for (const auto& [ordinal, link] : links_) link->answers.stop();
  const std::lock_guard lock(mutex_);
  links_.clear();
}

ReplicaChains::Link* ReplicaChains::link(std::uint8_t ordinal) {
  if (const auto found = links_.find(ordinal); found != links_.end()) return found->second.get();
  if (links_.size() >= kMostChains || self_.stopping()) return nullptr;
  std::unique_ptr<wire::Stream> stream = dial(ordinal);
  if (!stream || !introduce(*stream)) return nullptr;
  Link* made = nullptr;
  {
    const std::lock_guard lock(mutex_);
    // interrupt() comes after the thread's stop, so either it sees the link or we see the stop.
    if (self_.stopping()) return nullptr;
    made = links_.emplace(ordinal, std::make_unique<Link>(std::move(stream))).first->second.get();
  }
  made->answers.start("mf-stage-chain",
                      [this, ordinal, made](WorkerThread&) { read_answers(ordinal, *made); });
  return made;
}

// Whose pages come, and whose must not count any more: before the first of them.
bool ReplicaChains::introduce(wire::Stream& stream) {
  std::vector<wire::FrameHeader> said(1, wire::make_header(wire::FrameType::kChainOf, 0, {}, epoch_));
  wire::seal(said[0]);
  for (const Image::Chain chain : image_->ended_chains()) said.push_back(over_frame(chain));
  return stream.send_all(std::as_bytes(std::span(said))).done();
}

std::unique_ptr<wire::Stream> ReplicaChains::dial(std::uint8_t ordinal) {
  const std::optional<ChainTargets::Target> target = targets_->next(ordinal);
  if (!target) return nullptr;
  const auto deadline = std::chrono::steady_clock::now() + timeouts_.dial;
  try {
    wire::DialResult dialled = wire::dial(target->address, timeouts_.dial, self_.wake_fd());
    if (dialled.kind != wire::DialResult::Kind::kConnected) return nullptr;
    wire::bear_with_full_window(dialled.fd.get());
    auto stream = std::make_unique<wire::PlainStream>(std::move(dialled.fd));
    wire::Hello hello{};
    hello.preface = wire::kStagePreface;
    hello.migration = image_->id();
    hello.version = wire::kVersion;
    hello.channel = static_cast<std::uint16_t>(wire::StageRole::kChain);
    hello.epoch = (std::uint32_t{wire::kFirstChainSession} + image_->ordinal()) << 16 | target->attempt;
    hello.token = target->token;
    wire::HelloReply reply{};
    // The first bytes on a fresh connection never block.
    const bool said = stream->send_all(std::as_bytes(std::span(&hello, 1))).done();
    if (!said ||
        !wire::receive_until(*stream, std::as_writable_bytes(std::span(&reply, 1)), deadline, self_.wake_fd())
             .done()) {
      return nullptr;
    }
    const bool accepted = reply.magic == wire::kFrameMagic &&
                          reply.status == static_cast<std::uint32_t>(wire::HelloStatus::kAccepted);
    return accepted ? std::move(stream) : nullptr;
  } catch (const SystemError&) {
    return nullptr;  // no descriptor for it, or a connection that was reset at once
  }
}

void ReplicaChains::read_answers(std::uint8_t ordinal, Link& link) {
  for (;;) {
    // The source must learn which of two servers has stalled before it gives up the one that it talks to. A pause of this
    // process is not the other's silence: what is late by then has been given a look's time more.
    const Clock::time_point looked = Clock::now();
    const auto ready = wire::wait_readable(link.stream->fd(), looked + timeouts_.answer / 4, -1);
    if (ready == wire::DialResult::Kind::kConnected) {
      wire::FrameHeader header;
      const auto bytes = std::as_writable_bytes(std::span(&header, 1));
      // One that stops in the middle of an answer ends the chain.
      if (!wire::receive_until(*link.stream, bytes, Clock::now() + timeouts_.answer, -1).done()) break;
      if (!answered(ordinal, link, header)) break;
    }
    if (silent(ordinal, link, looked)) break;
  }
  (void)broken(ordinal);
}

bool ReplicaChains::silent(std::uint8_t ordinal, const Link& link, Clock::time_point now) const {
  const auto waited_since = [&](Clock::time_point since) {
    const Clock::rep sending = link.sending_since.load(std::memory_order_relaxed);
    return answers_.owed_since(ordinal, since) ||
           (sending != 0 && Clock::time_point(Clock::duration(sending)) < since);
  };
  if (!waited_since(now - timeouts_.answer)) return false;
  const Clock::time_point longest = now - wire::kLongestTurn;
  return link.heard_at < now - timeouts_.answer || (link.grew_at < longest && waited_since(longest)) ||
         waited_since(now - wire::kLongestAnswer);
}

bool ReplicaChains::answered(std::uint8_t ordinal, Link& link, const wire::FrameHeader& header) {
  if (wire::malformed(header, image_->slab()->slot_bytes()) != nullptr || header.payload_bytes != 0 ||
      wire::payload_checksum(header, {}) != header.checksum) {
    return false;
  }
  link.heard_at = Clock::now();
  switch (static_cast<wire::FrameType>(header.type)) {
    case wire::FrameType::kBarrierAck:
      link.grew_at = link.heard_at;
      return answers_.chain_acknowledged(ordinal, header.tag);
    case wire::FrameType::kTaken: {
      if (header.tag < link.worked || header.tag > link.forwarded.load(std::memory_order_relaxed))
        return false;
      const std::uint64_t more = header.tag - std::exchange(link.worked, header.tag);
      if (more > 0) link.grew_at = link.heard_at;
      return answers_.worked(more);
    }
    case wire::FrameType::kRefused:
      return image_->inside(header.region, header.first_page, header.page_count) &&
             answers_.refused(header.region, {PageNumber{header.first_page}, header.page_count}, ordinal,
                              header.flags & (wire::kFlagTorn | wire::kFlagReference));
    default:
      return false;
  }
}

}  // namespace memferry
