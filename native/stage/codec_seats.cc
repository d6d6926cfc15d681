#include "stage/codec_seats.h"

#include <algorithm>
#include <utility>

namespace memferry {

std::uint64_t CodecSeats::seats_for(std::uint64_t memory_bytes) {
  return std::clamp<std::uint64_t>(memory_bytes / kShare / kSeatBytes, 1, kMostSeats);
}

CodecSeats::CodecSeats(std::uint64_t seats) : seats_(seats) {
  // Contexts and buffers are made when they are first used.
  for (std::uint64_t i = 0; i < seats; ++i) free_.push_back(std::make_unique<Equipment>());
}

CodecSeats::Seat CodecSeats::take() {
  std::unique_lock lock(mutex_);
  freed_.wait(lock, [this] { return !free_.empty(); });
  Seat seat(*this, std::move(free_.back()));
  free_.pop_back();
  return seat;
}

CodecSeats::Seat CodecSeats::try_take() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) return {};
  Seat seat(*this, std::move(free_.back()));
  free_.pop_back();
  return seat;
}

CodecSeats::Seat& CodecSeats::Seat::operator=(Seat&& other) noexcept {
  give_back();
  of_ = other.of_;
  equipment_ = std::move(other.equipment_);
  return *this;
}

void CodecSeats::Seat::give_back() {
  if (!equipment_) return;
  {
    const std::lock_guard lock(of_->mutex_);
    // There was room for it when it was taken.
    of_->free_.push_back(std::move(equipment_));
  }
  of_->freed_.notify_one();
}

}  // namespace memferry
