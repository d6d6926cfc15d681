#include "fault/page_ledger.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>

#include "os/sys_error.h"

namespace memferry {

// The events first, so that they lie in one page.
std::uint64_t PageLedger::bytes_for(std::uint64_t pages) {
  const std::uint64_t page = system_page_size();
  const std::uint64_t words = (pages + 63) / 64 + 1;  // the last: it has begun
  return (kEvents * sizeof(uffd_msg) + words * sizeof(std::uint64_t) + page - 1) / page * page;
}

PageLedger::PageLedger(std::uint64_t pages)
    : words_((pages + 63) / 64), bits_(Mapping::anonymous(bytes_for(pages))) {}

PageLedger::PageLedger(std::uint64_t pages, int fd) : words_((pages + 63) / 64) {
  if (::ftruncate(fd, static_cast<off_t>(bytes_for(pages))) != 0) throw_errno("ftruncate(ledger)");
  bits_ = Mapping::shared(fd, bytes_for(pages));
  // The kernel writes events there while this process may be being killed, and should not have to wait for it. May fail.
  (void)::mlock(bits_.data(), system_page_size());
}

std::span<uffd_msg, PageLedger::kEvents> PageLedger::events() const {
  return std::span<uffd_msg, kEvents>(reinterpret_cast<uffd_msg*>(bits_.data()), kEvents);
}

// After what was noted of them.
void PageLedger::forget_events(std::size_t count) {
  std::atomic_thread_fence(std::memory_order_release);
  for (uffd_msg& event : events().first(count)) event.event = 0;
}

std::uint64_t& PageLedger::word(std::uint64_t index) const {
  return reinterpret_cast<std::uint64_t*>(bits_.data() + kEvents * sizeof(uffd_msg))[index];
}

bool PageLedger::test(PageNumber page) const {
  const std::uint64_t bits = std::atomic_ref(word(page.value / 64)).load(std::memory_order_acquire);
  return ((bits >> (page.value % 64)) & 1U) != 0;
}

std::uint64_t PageLedger::set(PageRun run) {
  std::uint64_t fresh = 0;
  for (std::uint64_t at = run.first.value; at < run.end().value;) {
    const std::uint64_t within = at % 64;
    const std::uint64_t count = std::min<std::uint64_t>(64 - within, run.end().value - at);
    const std::uint64_t bits = (~std::uint64_t{0} >> (64 - count)) << within;
    const std::uint64_t before = std::atomic_ref(word(at / 64)).fetch_or(bits, std::memory_order_acq_rel);
    fresh += static_cast<std::uint64_t>(std::popcount(bits & ~before));
    at += count;
  }
  return fresh;
}

bool PageLedger::begun() const { return std::atomic_ref(word(words_)).load(std::memory_order_acquire) != 0; }
void PageLedger::begin() { std::atomic_ref(word(words_)).store(1, std::memory_order_release); }

}  // namespace memferry
