// What serving a member's frame takes: buffers for its names, pages and the answer. All members of a server share a few
// desks, so that however many there are the memory for it is bounded, and comes out of the server's reserve. A desk is
// had from a frame's header until its answer is sent: who stands still in between loses the connection
// (StageConfig::member_timeout_ms), so that the others come to their turn.
//
// Threads: any. A desk is its holder's alone; what is in its buffers is gone when it is given back.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "os/worker_thread.h"
#include "wire/frame.h"

namespace memferry {

class MemberDesks {
 public:
  // Of the reserve: one desk in so many bytes, of which it takes 0.4 MiB; and one connection, with its stack.
  static constexpr std::uint64_t kReserveADesk = 1ULL << 20;
  static constexpr std::uint64_t kReserveAConnection = 32 * 1024;
  [[nodiscard]] static std::uint64_t desks_for(std::uint64_t reserve) {
    return std::clamp<std::uint64_t>(reserve / kReserveADesk, 4, 8);
  }
  [[nodiscard]] static std::uint64_t connections_for(std::uint64_t reserve) {
    return std::min<std::uint64_t>(reserve / kReserveAConnection, 512);
  }

  struct Desk {
    std::vector<wire::ContentName> names;
    std::vector<std::uint64_t> wanted;
    std::vector<wire::PopularName> popular;
    std::vector<std::byte> pages;
  };
  // Nothing, or a desk; given back when it goes.
  class Seat {
   public:
    Seat() = default;
    Seat(MemberDesks& of, std::unique_ptr<Desk> desk) : of_(&of), desk_(std::move(desk)) {}
    Seat(Seat&&) = default;
    Seat& operator=(Seat&&) = delete;
    ~Seat() {
      if (desk_) of_->give_back(std::move(desk_));
    }
    Seat(const Seat&) = delete;
    Seat& operator=(const Seat&) = delete;
    [[nodiscard]] explicit operator bool() const { return desk_ != nullptr; }
    Desk& operator*() const { return *desk_; }

   private:
    MemberDesks* of_ = nullptr;
    std::unique_ptr<Desk> desk_;
  };

  explicit MemberDesks(std::uint64_t desks) : left_(desks) { free_.reserve(static_cast<std::size_t>(desks)); }
  // Waits for one. Nothing: the thread is to stop; who asks it to calls wake() afterwards.
  [[nodiscard]] Seat take(const WorkerThread& self) {
    std::unique_lock lock(mutex_);
    freed_.wait(lock, [&] { return self.stopping() || left_ > 0; });
    if (self.stopping()) return {};
    std::unique_ptr<Desk> desk;
    if (free_.empty()) {
      desk = std::make_unique<Desk>();
    } else {
      desk = std::move(free_.back());
      free_.pop_back();
    }
    --left_;
    return {*this, std::move(desk)};
  }
  void wake() {
    const std::lock_guard lock(mutex_);
    freed_.notify_all();
  }

 private:
  void give_back(std::unique_ptr<Desk> desk) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(desk));
    ++left_;
    // Any of them takes it; one that is to stop was woken by wake().
    freed_.notify_all();
  }

  std::mutex mutex_;  // guards the rest
  std::condition_variable freed_;
  std::vector<std::unique_ptr<Desk>> free_;  // the one used last first: its memory is warm
  std::uint64_t left_;                       // that nobody has
};

}  // namespace memferry
