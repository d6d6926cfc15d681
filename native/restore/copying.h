// The run of pages that one thread is copying at this moment, for the others to see: none is to be copied twice. A hint:
// who does not see it in time finds the page there.
//
// Threads: one copies, any look.
#pragma once

#include <atomic>
#include <cstdint>

#include "page/range.h"

namespace memferry {

class Copying {
 public:
  // From its construction to its end; one at a time.
  class Held {
   public:
    Held(Copying& copying, PageRun run) : copying_(copying) {
      copying_.run_.store(run.first.value << kCountBits | run.count, std::memory_order_release);
    }
    ~Held() { copying_.run_.store(0, std::memory_order_release); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;

   private:
    Copying& copying_;
  };
  // Of no pages: none.
  [[nodiscard]] PageRun now() const {
    const std::uint64_t run = run_.load(std::memory_order_acquire);
    return {PageNumber{run >> kCountBits}, run & ((1ULL << kCountBits) - 1)};
  }
  [[nodiscard]] bool has(PageNumber page) const {
    const PageRun run = now();
    return page >= run.first && page < run.end();
  }

 private:
  static constexpr unsigned kCountBits = 16;  // a run is some MiB at most
  std::atomic<std::uint64_t> run_{0};
};

}  // namespace memferry
