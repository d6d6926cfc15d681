#include "spread/directory_link.h"

#include <poll.h>

#include <algorithm>
#include <array>
#include <utility>

#include "os/mapping.h"
#include "transfer/stage_dial.h"
#include "wire/hello.h"

namespace memferry {
namespace {

constexpr std::chrono::milliseconds kDialTimeout{5000};
// What a writable socket takes without blocking.
constexpr std::size_t kPiece = 4096;

}  // namespace

DirectoryLink::DirectoryLink(Directory directory, int cancel_fd)
    : directory_(std::move(directory)), cancel_fd_(cancel_fd), page_size_(system_page_size()) {}

bool DirectoryLink::lose(std::string why) {
  if (stream_) stream_->shutdown();
  lost_ = true;
  if (why_.empty()) why_ = std::move(why);
  return false;
}

bool DirectoryLink::connected() {
  if (lost_) return false;
  if (stream_) return true;
  StageDial dialled = dial_stage(directory_.server, directory_.member, wire::StageRole::kPopular, attempt_,
                                 Clock::now() + kDialTimeout, cancel_fd_);
  if (!dialled.stream) return lose(std::move(dialled.why));
  stream_ = std::move(dialled.stream);
  return true;
}

bool DirectoryLink::write(std::span<const std::byte> bytes, Clock::time_point deadline) {
  while (!bytes.empty()) {
    std::array<pollfd, 2> waiting{pollfd{stream_->fd(), POLLOUT, 0}, pollfd{cancel_fd_, POLLIN, 0}};
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
    const int ready =
        ::poll(waiting.data(), waiting.size(), static_cast<int>(std::max<std::int64_t>(left.count(), 0)));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0 || waiting[1].revents != 0) return lose("it takes nothing");
    const auto piece = bytes.first(std::min(bytes.size(), kPiece));
    if (!stream_->send_all(piece).done()) return lose("the connection was cut");
    bytes_ += piece.size();
    bytes = bytes.subspan(piece.size());
  }
  return true;
}

bool DirectoryLink::send(wire::FrameHeader header, std::span<const std::byte> payload) {
  if (!connected()) return false;
  wire::seal(header, payload);
  const auto deadline = Clock::now() + kPatience;
  return write(std::as_bytes(std::span(&header, 1)), deadline) && write(payload, deadline);
}

bool DirectoryLink::receive(wire::FrameType type, std::uint64_t tag, wire::FrameHeader& header,
                            std::vector<std::byte>& payload) {
  if (lost_ || !stream_) return false;
  const auto deadline = Clock::now() + kPatience;
  const auto read = [&](std::span<std::byte> into) {
    bytes_ += into.size();
    return wire::receive_until(*stream_, into, deadline, cancel_fd_).done();
  };
  if (!read(std::as_writable_bytes(std::span(&header, 1)))) return lose("no answer");
  if (wire::malformed(header, page_size_) != nullptr || header.type != static_cast<std::uint16_t>(type) ||
      header.tag != tag) {
    return lose("a wrong answer");
  }
  payload.resize(header.payload_bytes);
  if (!read(payload)) return lose("no answer");
  if (wire::payload_checksum(header, payload) != header.checksum) return lose("a wrong answer");
  return true;
}

void DirectoryLinks::set(std::vector<Directory> directories) {
  const std::lock_guard lock(mutex_);
  wanted_ = std::move(directories);
  changed_ = true;
}

DirectoryLinks::Links& DirectoryLinks::take(int cancel_fd) {
  const std::lock_guard lock(mutex_);
  if (!std::exchange(changed_, false)) return links_;
  Links now;
  for (const Directory& each : wanted_) {
    const auto had = std::ranges::find_if(
        links_, [&](const auto& link) { return link && link->directory().member == each.member; });
    now.push_back(had == links_.end() ? std::make_unique<DirectoryLink>(each, cancel_fd) : std::move(*had));
  }
  links_ = std::move(now);
  return links_;
}

void DirectoryLinks::note_lost() {
  std::uint64_t bytes = 0;
  const std::lock_guard lock(mutex_);
  lost_members_.clear();
  for (const auto& link : links_) {
    bytes += link->bytes();
    if (link->lost()) lost_members_.push_back(link->directory().member);
  }
  bytes_ = bytes;
}

void DirectoryLinks::clear() {
  const std::lock_guard lock(mutex_);
  links_.clear();
}

std::vector<bool> DirectoryLinks::lost() const {
  const std::lock_guard lock(mutex_);
  std::vector<bool> lost;
  for (const Directory& each : wanted_)
    lost.push_back(std::ranges::find(lost_members_, each.member) != lost_members_.end());
  return lost;
}

}  // namespace memferry
