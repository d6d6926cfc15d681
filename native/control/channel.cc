#include "control/channel.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include "control/text.h"

namespace memferry::control {

namespace {

constexpr std::chrono::milliseconds kPingInterval{1000};
// How long the last bytes may take to leave after a goodbye.
constexpr std::chrono::milliseconds kFarewell{2000};
constexpr std::size_t kReadBytes = 64 * 1024;
constexpr std::size_t kMostByeText = 1024;

const Cause kNothingWrong{};

std::string errno_text() { return std::generic_category().message(errno); }

}  // namespace

Channel::Channel(UniqueFd fd, Options options) : options_(std::move(options)), fd_(std::move(fd)) {
  thread_.start("mf-control", [this](WorkerThread& self) { run(self); });
}

Channel::~Channel() {
  destroy();
  thread_.stop();
}

std::optional<Key> Channel::session() const {
  const std::lock_guard lock(mutex_);
  return session_;
}

std::optional<Channel::Received> Channel::take() {
  const std::lock_guard lock(mutex_);
  if (inbox_.empty()) return {};
  Received next = std::move(inbox_.front());
  inbox_.pop_front();
  if (next.binary) inbox_bytes_ -= next.binary->size();
  thread_.wake();
  return next;
}

bool Channel::send(const Json& message, std::shared_ptr<const Bytes> binary) {
  Outgoing outgoing;
  const std::string text = to_text(message);
  if (text.size() > kMaxJsonBytes || (binary && binary->size() > options_.max_binary_bytes)) return false;
  std::string payload;
  if (binary) {
    outgoing.kind = FrameKind::kJsonWithBinary;
    for (unsigned i = 0; i < kAnnouncementBytes; ++i) payload += static_cast<char>(binary->size() >> (8 * i));
  }
  payload += text;
  outgoing.first.assign(payload.begin(), payload.end());
  outgoing.binary = std::move(binary);
  {
    const std::lock_guard lock(mutex_);
    if (ended_ || closing_ || outbox_.size() >= kMaxOutbox) return false;
    outbox_.push_back(std::move(outgoing));
  }
  thread_.wake();
  return true;
}

void Channel::close() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  thread_.wake();
}

void Channel::destroy() {
  destroyed_.store(true, std::memory_order_release);
  thread_.request_stop();
}

std::optional<Cause> Channel::ended() const {
  const std::lock_guard lock(mutex_);
  return ended_;
}

void Channel::run(WorkerThread& self) {
  try {
    const auto deadline = Clock::now() + kHandshakeTimeout;
    const Key key = options_.role == Role::kAcceptor
                        ? handshake_as_acceptor(fd_.get(), options_.secret, deadline, self.wake_fd())
                        : handshake_as_dialler(fd_.get(), options_.secret, deadline, self.wake_fd());
    sealer_.emplace(direction_key(key, options_.role));
    opener_.emplace(direction_key(key, options_.role == Role::kAcceptor ? Role::kDialler : Role::kAcceptor));
    {
      const std::lock_guard lock(mutex_);
      session_ = key;
    }
    if (options_.changed) options_.changed();
    converse(self);
  } catch (...) {
    end(cause_of_current("SYSTEM"));
  }
  end({"CHANNEL_LOST", "the control channel is closed"});
  fd_.reset();
  over_.store(true, std::memory_order_release);
  if (options_.changed) options_.changed();
}

void Channel::converse(WorkerThread& self) {
  last_tick_ = last_heard_ = Clock::now();
  while (!destroyed_.load(std::memory_order_acquire)) {
    try {
      if (!serve_once(self)) return;
    } catch (...) {
      // The peer broke the rules, or this side cannot go on: it is told, and heard no more.
      const Cause cause = cause_of_current("SYSTEM");
      if (leaving_) return;
      say_bye(cause);
      end(cause);
      leave();
    }
  }
}

// False when nothing is left to do.
bool Channel::serve_once(WorkerThread& self) {
  write_some();
  if (leaving_ && wire_start_ == wire_.size() && !said_bye_) return false;
  const Clock::time_point now = Clock::now();
  if (leaving_ && now >= leave_until_) return false;
  if (!leaving_ && closing_for_too_long(now)) {
    end(kNothingWrong);
    return false;
  }
  const auto until = leaving_ ? leave_until_ : last_tick_ + kPingInterval;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - now).count();
  std::array<pollfd, 2> fds = {{{fd_.get(), 0, 0}, {self.wake_fd(), POLLIN, 0}}};
  if (leaving_ || !full()) fds[0].events |= POLLIN;
  if (wire_start_ < wire_.size()) fds[0].events |= POLLOUT;
  ::poll(fds.data(), fds.size(), static_cast<int>(std::max<std::int64_t>(left, 0)));
  if ((fds[1].revents & POLLIN) != 0) self.drain_wake();
  if ((fds[0].revents & (POLLIN | POLLERR | POLLHUP)) != 0) {
    if ((fds[0].events & POLLIN) == 0 && (fds[0].revents & (POLLERR | POLLHUP)) != 0 && full()) {
      // Broken while the owner is slow: nothing more will come, and polling would spin.
      end({"PEER_LOST", "the connection failed"});
      return false;
    }
    read_some();
    if (!fd_) return false;
  }
  if (!leaving_) parse();
  if (!leaving_ && Clock::now() - last_tick_ >= kPingInterval) tick(Clock::now());
  return fd_.valid();
}

void Channel::read_some() {
  std::array<std::uint8_t, kReadBytes> piece;
  const ssize_t got = ::recv(fd_.get(), piece.data(), piece.size(), MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return;
  if (got <= 0) {
    const std::string why = got == 0 ? "the peer closed the connection without a goodbye"
                                     : "the connection failed: " + errno_text();
    bool meant = false;
    {
      const std::lock_guard lock(mutex_);
      meant = closing_;
    }
    if (!leaving_) parse();
    end(meant ? kNothingWrong : Cause{"PEER_LOST", why});
    fd_.reset();
    return;
  }
  // What comes after the end is read and dropped: closing with bytes unread would reset the connection, and the reset
  // could overtake the goodbye.
  if (!leaving_) in_.insert(in_.end(), piece.begin(), piece.begin() + got);
}

void Channel::parse() {
  while (!leaving_ && !full()) {
    const ByteSpan have = ByteSpan(in_).subspan(in_start_);
    if (have.size() < kFrameHeaderBytes) break;
    const FrameHeader header = parse_frame_header(have.first<kFrameHeaderBytes>());
    const std::size_t whole = kFrameHeaderBytes + header.payload_bytes + kFrameMacBytes;
    if (have.size() < whole) break;
    const ByteSpan payload = have.subspan(kFrameHeaderBytes, header.payload_bytes);
    if (!opener_->opens(have.first(kFrameHeaderBytes), payload,
                        have.subspan(whole - kFrameMacBytes, kFrameMacBytes))) {
      throw Failure(
          "PROTOCOL_ERROR",
          "a control frame does not authenticate: it was changed, repeated, or left out on the way");
    }
    last_heard_ = Clock::now();
    on_frame(header.kind, payload);
    in_start_ += whole;
  }
  if (in_start_ > 0) {
    in_.erase(in_.begin(), in_.begin() + static_cast<std::ptrdiff_t>(in_start_));
    in_start_ = 0;
  }
}

void Channel::on_frame(FrameKind kind, ByteSpan payload) {
  const auto text_of = [](ByteSpan bytes) {
    return std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  switch (kind) {
    case FrameKind::kPing:
      return;
    case FrameKind::kBye:
      return on_bye(payload);
    case FrameKind::kChunk: {
      if (!assembling_ || payload.size() > assembling_->total - assembling_->binary.size())
        throw Failure("PROTOCOL_ERROR",
                      assembling_ ? "more bytes than were announced" : "bytes that were not announced");
      assembling_->binary.insert(assembling_->binary.end(), payload.begin(), payload.end());
      if (assembling_->binary.size() < assembling_->total) return;
      Assembling whole = std::move(*assembling_);
      assembling_.reset();
      return deliver(std::move(whole.message), std::move(whole.binary));
    }
    case FrameKind::kJson:
    case FrameKind::kJsonWithBinary:
      break;
  }
  if (assembling_) throw Failure("PROTOCOL_ERROR", "a message in the middle of a binary part");
  if (kind == FrameKind::kJson) {
    Json message = parse_json(text_of(payload));
    options_.check(message, {});
    return deliver(std::move(message), {});
  }
  std::uint64_t total = 0;
  for (unsigned i = 0; i < kAnnouncementBytes; ++i) total |= std::uint64_t{payload[i]} << (8 * i);
  Json message = parse_json(text_of(payload.subspan(kAnnouncementBytes)));
  if (total > options_.max_binary_bytes) {
    throw Failure("LIMIT_EXCEEDED", "a binary part of " + std::to_string(total) + " bytes; " +
                                        std::to_string(options_.max_binary_bytes) + " are allowed");
  }
  options_.check(message, total);
  if (total == 0) return deliver(std::move(message), Bytes());
  assembling_ = {std::move(message), Bytes(), static_cast<std::size_t>(total)};
  // No memory is touched for what was only announced.
  assembling_->binary.reserve(static_cast<std::size_t>(total));
}

void Channel::on_bye(ByteSpan payload) {
  if (!payload.empty()) {
    const Json why = parse_json({reinterpret_cast<const char*>(payload.data()), payload.size()});
    const bool formed =
        why.is_object() && why.value("code", Json()).is_string() && why.value("message", Json()).is_string();
    if (!formed) throw Failure("PROTOCOL_ERROR", "a goodbye that says nothing");
    const auto code = why.at("code").get<std::string>();
    // The peer's word for it, but never a code by which it could speak for the migration.
    end({code == "LIMIT_EXCEEDED" ? code : "PROTOCOL_ERROR",
         "the peer ended the connection (" + cut(code, 64) + "): " + why.at("message").get<std::string>()});
    fd_.reset();
    leaving_ = true;
    return;
  }
  if (assembling_) throw Failure("PROTOCOL_ERROR", "a goodbye in the middle of a binary part");
  write_some();
  if (!leaving_) {
    say_bye(kNothingWrong);
    end(kNothingWrong);
    leave();
  }
}

void Channel::deliver(Json message, std::optional<Bytes> binary) {
  if (options_.unheard && options_.unheard(message)) return;
  {
    const std::lock_guard lock(mutex_);
    // After our own goodbye nobody asks any more; reading on only lets the peer's goodbye through.
    if (closing_) return;
    if (binary) inbox_bytes_ += binary->size();
    inbox_.push_back({std::move(message), std::move(binary)});
  }
  if (options_.changed) options_.changed();
}

bool Channel::full() const {
  const std::lock_guard lock(mutex_);
  return inbox_.size() >= kMaxInbox || inbox_bytes_ > options_.max_binary_bytes;
}

// Writes until the connection takes no more.
void Channel::write_some() {
  while (fd_) {
    if (wire_start_ == wire_.size() && (leaving_ || !next_frame())) break;
    const ssize_t put = ::send(fd_.get(), wire_.data() + wire_start_, wire_.size() - wire_start_,
                               MSG_NOSIGNAL | MSG_DONTWAIT);
    if (put > 0) {
      wire_start_ += static_cast<std::size_t>(put);
      blocked_since_.reset();
      continue;
    }
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
      // What the peer said before is still to be read; its end is noticed there.
      wire_.clear();
      wire_start_ = 0;
      if (leaving_) said_bye_ = false;
      break;
    }
    if (!blocked_since_) blocked_since_ = Clock::now();
    break;
  }
  if (leaving_ && said_bye_ && wire_start_ == wire_.size() && fd_) {
    ::shutdown(fd_.get(), SHUT_WR);
    said_bye_ = true;
  }
}

// The next piece of what waits to be sent, sealed into wire_.
bool Channel::next_frame() {
  wire_.clear();
  wire_start_ = 0;
  std::unique_lock lock(mutex_);
  if (outbox_.empty()) {
    if (!closing_ || ended_) return false;
    lock.unlock();
    say_bye(kNothingWrong);
    end(kNothingWrong);
    leave();
    return wire_start_ < wire_.size();
  }
  Outgoing& next = outbox_.front();
  if (!next.begun) {
    next.begun = true;
    wire_ = sealer_->seal(next.kind, {next.first});
  } else {
    const std::size_t length = std::min(kMaxChunkBytes, next.binary->size() - next.offset);
    wire_ = sealer_->seal(FrameKind::kChunk, {ByteSpan(*next.binary).subspan(next.offset, length)});
    next.offset += length;
  }
  if (!next.binary || next.offset == next.binary->size()) outbox_.pop_front();
  return true;
}

void Channel::tick(Clock::time_point now) {
  // Time in which this thread did not run, or did not want to read, is not the peer's silence.
  const auto late = std::max<Clock::duration>(Clock::duration::zero(), now - last_tick_ - kPingInterval);
  last_heard_ = full() ? now : std::min(now, last_heard_ + late);
  if (blocked_since_) *blocked_since_ += late;
  last_tick_ = now;
  const char* why = nullptr;
  if (now - last_heard_ > options_.peer_timeout) why = "the peer has said nothing for too long";
  if (blocked_since_ && now - *blocked_since_ > options_.stall_timeout)
    why = "the peer has taken nothing for too long";
  if (why) {
    end({"PEER_LOST", why});
    fd_.reset();
    return;
  }
  // With the buffer full there is something to hear as soon as the peer reads on.
  if (!blocked_since_ && wire_start_ == wire_.size()) {
    wire_ = sealer_->seal(FrameKind::kPing, {});
    wire_start_ = 0;
    write_some();
  }
}

void Channel::say_bye(const Cause& cause) {
  if (said_bye_ || !sealer_) return;
  said_bye_ = true;
  std::string text;
  if (!cause.code.empty())
    text = to_text({{"code", cut(cause.code, 64)}, {"message", cut(cause.message, kMostByeText)}});
  const Bytes frame = sealer_->seal(FrameKind::kBye, {bytes_of(text)});
  wire_.insert(wire_.end(), frame.begin(), frame.end());
}

void Channel::end(const Cause& cause) {
  {
    const std::lock_guard lock(mutex_);
    if (ended_) return;
    ended_ = cause;
    outbox_.clear();
  }
  assembling_.reset();
  if (options_.changed) options_.changed();
}

// A peer that takes nothing gets no goodbye.
bool Channel::closing_for_too_long(Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  if (!closing_) return false;
  if (!close_by_) close_by_ = now + kFarewell;
  return now >= *close_by_;
}

void Channel::leave() {
  leaving_ = true;
  leave_until_ = Clock::now() + kFarewell;
}

}  // namespace memferry::control
