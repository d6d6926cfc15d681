// Reading pages that a guest may be writing at the same time. That is the nature of pre-copy: such a copy may
// be torn, and the protocol around it sees to it that a torn page goes again. No lock can order us against
// the guest's plain stores, so the race is told to the thread sanitizer here, in one function and nowhere
// else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#define MEMFERRY_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MEMFERRY_TSAN 1
#endif
#endif

namespace memferry {

#if defined(MEMFERRY_TSAN)
// Not memcpy: the sanitizer intercepts that one whatever the attribute says. Volatile keeps the compiler from
// making a memcpy of the loop.
__attribute__((no_sanitize("thread"), noinline)) inline void racy_copy(std::byte* to, const std::byte* from,
                                                                       std::size_t bytes) {
  std::size_t at = 0;
  if ((reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from)) %
          sizeof(std::uint64_t) ==
      0) {
    for (; at + sizeof(std::uint64_t) <= bytes; at += sizeof(std::uint64_t)) {
      *reinterpret_cast<volatile std::uint64_t*>(to + at) =
          *reinterpret_cast<const volatile std::uint64_t*>(from + at);
    }
  }
  for (; at < bytes; ++at)
    *static_cast<volatile std::byte*>(to + at) = *static_cast<const volatile std::byte*>(from + at);
}
#else
inline void racy_copy(std::byte* to, const std::byte* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}
#endif

// A guest's bytes for code that only reads them: hash, compare with zero, hand to sendmsg(). The bytes
// themselves, which may change while they are read; under the thread sanitizer a racy copy of them.
class RacyView {
 public:
  explicit RacyView(std::span<const std::byte> guest_bytes) {
#if defined(MEMFERRY_TSAN)
    copy_.resize(guest_bytes.size());
    racy_copy(copy_.data(), guest_bytes.data(), guest_bytes.size());
    bytes_ = copy_;
#else
    bytes_ = guest_bytes;
#endif
  }
  RacyView(const RacyView&) = delete;
  RacyView& operator=(const RacyView&) = delete;
  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
#if defined(MEMFERRY_TSAN)
  std::vector<std::byte> copy_;
#endif
};

}  // namespace memferry
