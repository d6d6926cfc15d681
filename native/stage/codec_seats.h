// What packing and unpacking pages takes at a server: the codecs' contexts, and buffers for a run. All connections of a
// server share a few seats, so that however many of them send packed pages, or want answers packed, the memory for it is
// bounded, and comes out of the server's cap. A seat is had while a thread computes, never while it waits for a peer.
//
// Threads: any. A seat is its holder's alone; what is in its buffers is gone when it is given back.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "wire/codec.h"
#include "wire/run_decoder.h"

namespace memferry {

class CodecSeats {
 public:
  // What one may come to: zstd's contexts (640 and 160 KiB, measured with runs of 256 KiB), lz4's, and the buffers.
  static constexpr std::uint64_t kSeatBytes = 1536 * 1024;
  // A thread that finds none has to wait for one to have computed: so as many as threads are likely to run.
  static constexpr std::uint64_t kMostSeats = 16;
  // Of a server's memory, at most, but for the first seat.
  static constexpr std::uint64_t kShare = 32;
  [[nodiscard]] static std::uint64_t seats_for(std::uint64_t memory_bytes);

  struct Equipment {
    wire::Compressor compressor;
    wire::RunDecoder decoder;
    std::vector<std::byte> pages;   // a run
    std::vector<std::byte> packed;  // what it becomes, or came as
    std::vector<std::byte> scratch;
  };
  // Nothing, or a seat; given back when it goes.
  class Seat {
   public:
    Seat() = default;
    Seat(Seat&& other) noexcept = default;
    Seat& operator=(Seat&& other) noexcept;
    ~Seat() { give_back(); }
    Seat(const Seat&) = delete;
    Seat& operator=(const Seat&) = delete;
    [[nodiscard]] explicit operator bool() const { return equipment_ != nullptr; }
    Equipment* operator->() const { return equipment_.get(); }
    Equipment& operator*() const { return *equipment_; }
    void give_back();

   private:
    friend class CodecSeats;
    Seat(CodecSeats& of, std::unique_ptr<Equipment> equipment) : of_(&of), equipment_(std::move(equipment)) {}
    CodecSeats* of_ = nullptr;
    std::unique_ptr<Equipment> equipment_;
  };

  explicit CodecSeats(std::uint64_t seats);
  // Waits for as long as the others compute.
  [[nodiscard]] Seat take();
  // Nothing where none is free.
  [[nodiscard]] Seat try_take();
  [[nodiscard]] std::uint64_t seats() const { return seats_; }

 private:
  const std::uint64_t seats_;
  std::mutex mutex_;  // guards the rest
  std::condition_variable freed_;
  std::vector<std::unique_ptr<Equipment>> free_;  // the one used last first: its memory is warm
};

}  // namespace memferry
