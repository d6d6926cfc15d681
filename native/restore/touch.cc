#include "restore/touch.h"

#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "os/kernel_abi.h"
#include "os/mapping.h"

namespace memferry {

namespace {

constexpr std::size_t kPagesAtOnce = 256;

}  // namespace

std::uint64_t touch(std::span<const std::byte> memory) {
  if (::madvise(const_cast<std::byte*>(memory.data()), memory.size(), abi::kMadvPopulateRead) == 0)
    return memory.size();
  // Older kernels, and to learn how far it went.
  const std::uint64_t page = system_page_size();
  std::uint64_t done = 0;
  while (done < memory.size()) {
    std::array<std::byte, kPagesAtOnce> sink;
    std::array<iovec, kPagesAtOnce> pages;
    const std::uint64_t count =
        std::min<std::uint64_t>(kPagesAtOnce, (memory.size() - done + page - 1) / page);
    for (std::uint64_t i = 0; i < count; ++i)
      pages[i] = {const_cast<std::byte*>(memory.data()) + done + i * page, 1};
    const iovec into{sink.data(), count};
    const ssize_t got = ::process_vm_readv(::getpid(), &into, 1, pages.data(), count, 0);
    if (got <= 0) break;
    done += static_cast<std::uint64_t>(got) * page;
    if (static_cast<std::uint64_t>(got) < count) break;
  }
  return std::min<std::uint64_t>(done, memory.size());
}

std::uint64_t resident(std::span<const std::byte> memory) {
  const std::uint64_t page = system_page_size();
  std::uint64_t done = 0;
  while (done < memory.size()) {
    std::array<unsigned char, kPagesAtOnce> there{};
    const std::uint64_t bytes = std::min<std::uint64_t>(memory.size() - done, kPagesAtOnce * page);
    if (::mincore(const_cast<std::byte*>(memory.data()) + done, bytes, there.data()) != 0)
      return memory.size();
    const std::uint64_t count = (bytes + page - 1) / page;
    std::uint64_t i = 0;
    while (i < count && (there[i] & 1U) != 0) ++i;
    done += i * page;
    if (i < count) break;
  }
  return std::min<std::uint64_t>(done, memory.size());
}

}  // namespace memferry
