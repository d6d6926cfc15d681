// The right to touch the regions' memory, taken for a short while and revoked for good when a region goes.
//
// Threads: any. Entering and leaving cost one atomic operation each.
#pragma once

#include <atomic>
#include <cstdint>

namespace memferry {

class TouchGate {
 public:
  // False once the gate is closed; then nothing may be touched and leave() must not be called.
  [[nodiscard]] bool enter() {
    if ((state_.fetch_add(1, std::memory_order_acquire) & kClosed) == 0) return true;
    leave();
    return false;
  }
  void leave() {
    const std::uint32_t former = state_.fetch_sub(1, std::memory_order_release);
    if (former == (kClosed | 1)) state_.notify_all();
  }
  // Nobody enters any more.
  void close() { state_.fetch_or(kClosed, std::memory_order_acq_rel); }
  // After close(): returns when everybody has left.
  void wait_left() const {
    for (std::uint32_t now; (now = state_.load(std::memory_order_acquire)) != kClosed;) state_.wait(now);
  }
  [[nodiscard]] bool closed() const { return (state_.load(std::memory_order_acquire) & kClosed) != 0; }

  class Pass {
   public:
    explicit Pass(TouchGate& gate) : gate_(gate.enter() ? &gate : nullptr) {}
    ~Pass() {
      if (gate_ != nullptr) gate_->leave();
    }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;
    explicit operator bool() const { return gate_ != nullptr; }

   private:
    TouchGate* gate_;
  };

 private:
  static constexpr std::uint32_t kClosed = 1U << 31;
  std::atomic<std::uint32_t> state_{0};
};

}  // namespace memferry
