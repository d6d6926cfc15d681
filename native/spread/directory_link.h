// A member's connection to one directory server (stage/popular_pages.h), as the member's side has it. Whatever goes
// wrong, or takes too long, is the end of it: its owner is told so (lost()), and makes it anew.
//
// Threads: one at a time; `cancel_fd` readable ends whatever waits.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "stage/stage.h"
#include "transfer/stage_server_address.h"
#include "wire/frame.h"
#include "wire/stream.h"

namespace memferry {

// Where, and which membership of ours there.
struct Directory {
  StageServer server;
  ImageId member{};
};

class DirectoryLink {
 public:
  // For an answer, sending the question included.
  static constexpr std::chrono::milliseconds kPatience{10'000};

  DirectoryLink(Directory directory, int cancel_fd);
  DirectoryLink(const DirectoryLink&) = delete;
  DirectoryLink& operator=(const DirectoryLink&) = delete;

  [[nodiscard]] const Directory& directory() const { return directory_; }
  // 0 once it is lost: no name is this one's any more.
  [[nodiscard]] std::uint64_t identity() const { return lost_ ? 0 : directory_.server.identity; }
  [[nodiscard]] bool lost() const { return lost_; }
  [[nodiscard]] const std::string& why() const { return why_; }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }

  // Dials when it is first used. Each false when the connection is lost.
  bool send(wire::FrameHeader header, std::span<const std::byte> payload);
  // The next frame, which must be of this type and tag.
  bool receive(wire::FrameType type, std::uint64_t tag, wire::FrameHeader& header,
               std::vector<std::byte>& payload);
  // False, for good.
  bool lose(std::string why);

 private:
  using Clock = std::chrono::steady_clock;
  bool connected();
  bool write(std::span<const std::byte> bytes, Clock::time_point deadline);

  const Directory directory_;
  const int cancel_fd_;
  const std::uint64_t page_size_;
  std::shared_ptr<wire::Stream> stream_;
  std::uint32_t attempt_ = 0;
  std::uint64_t bytes_ = 0;
  bool lost_ = false;
  std::string why_;
};

// Those that somebody has, as they come and go: the same member of the same server is the same link.
class DirectoryLinks {
 public:
  using Links = std::vector<std::unique_ptr<DirectoryLink>>;
  // Any thread: what is to be had from the next take() on.
  void set(std::vector<Directory> directories);
  // The owner's thread: those that were set last. And those that take() gave.
  Links& take(int cancel_fd);
  Links& taken() { return links_; }
  void note_lost();
  // Ends them all; the owner's thread has ended.
  void clear();
  // Any thread: whether the link of each, in the order of set(), is lost.
  [[nodiscard]] std::vector<bool> lost() const;
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }

 private:
  mutable std::mutex mutex_;  // guards those below
  std::vector<Directory> wanted_;
  bool changed_ = false;
  std::vector<ImageId> lost_members_;
  std::atomic<std::uint64_t> bytes_{0};
  Links links_;  // the owner's thread's
};

}  // namespace memferry
