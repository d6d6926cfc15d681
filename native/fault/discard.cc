#include "fault/discard.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>

#include "os/kernel_abi.h"
#include "os/sys_error.h"
#include "track/memory_part.h"

namespace memferry {
namespace {

constexpr std::size_t kRangesAtOnce = 1024;  // UIO_MAXIOV
constexpr int kPidfdSelf = -10000;           // PIDFD_SELF (6.14): the calling thread's process
constexpr int kBusyTries = 100;

long process_madvise(int target, const iovec* ranges, std::size_t count, int advice) {
  return ::syscall(SYS_process_madvise, target, ranges, count, advice, 0U);
}

}  // namespace

Backing backing_of(const Region& region) {
  // What is dropped is in the view: the shared file's pages, or those of a waiting room.
  if (region.owner()) {
    if (region.remote()) return Backing::kPrivate;
    return {.shared = true, .huge_bytes = region.huge_page_bytes()};
  }
  std::ifstream maps("/proc/self/maps");
  if (!maps) throw SystemError("open(/proc/self/maps)", errno);
  std::uint64_t covered = 0;
  bool shared = false;
  bool privately = false;
  bool huge = false;
  const std::vector<Extent> extents = region.extents();
  for (std::string line; std::getline(maps, line);) {
    std::uint64_t start = 0;
    std::uint64_t end = 0;
    std::uint64_t inode = 0;
    char permissions[5] = {};
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %*x %*x:%*x %" SCNu64, &start, &end,
                    permissions, &inode) != 4) {
      continue;
    }
    for (const Extent& extent : extents) {
      const std::uint64_t low = std::max(start, extent.start.value);
      const std::uint64_t high = std::min(end, extent.start.value + extent.bytes);
      if (low >= high) continue;
      covered += high - low;
      if (permissions[3] == 's') {
        shared = true;
      } else if (inode != 0) {
        // Of huge pages without a file of their own these are anonymous too.
        if (!line.ends_with("/anon_hugepage (deleted)"))
          throw std::invalid_argument("a private mapping of a file cannot receive pages");
        huge = privately = true;
      } else {
        privately = true;
      }
    }
  }
  // A stream keeps to itself that there was no memory for a line.
  if (maps.bad()) throw SystemError("read(/proc/self/maps)", ENOMEM);
  if (covered != region.bytes()) throw std::invalid_argument("part of the region is not mapped");
  if (shared && privately) throw std::invalid_argument("a region is either shared or private, not both");
  if (!shared && !huge) return Backing::kPrivate;
  Backing backing{.shared = shared};
  for (const MemoryPart& part : memory_parts(region)) {
    if (part.kind != MemoryPart::Kind::kHugetlb) continue;
    if (!part.shared && !part.file)
      throw std::invalid_argument(
          "huge pages that are mapped privately, and how large they are cannot be told "
          "(CAP_CHECKPOINT_RESTORE)");
    backing.huge_bytes = std::max(backing.huge_bytes, part.page_bytes);
  }
  return backing;
}

Discarder::Discarder(Backing backing) : backing_(backing) {
  ranges_.reserve(kRangesAtOnce);
  if (backing_.shared || backing_.huge_bytes != 0) return;
  // An empty list says whether the kernel knows the descriptor and the advice for this process.
  iovec none{nullptr, 0};
  if (process_madvise(kPidfdSelf, &none, 1, MADV_DONTNEED) == 0) {
    target_ = kPidfdSelf;
    batched_ = true;
    return;
  }
  self_.reset(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0U)));
  if (!self_) return;
  target_ = self_.get();
  batched_ = process_madvise(target_, &none, 1, MADV_DONTNEED) == 0;
}

void Discarder::add(Address start, std::uint64_t bytes) {
  if (bytes == 0) return;
  if (!ranges_.empty()) {
    iovec& last = ranges_.back();
    if (static_cast<std::byte*>(last.iov_base) + last.iov_len == start.pointer()) {
      last.iov_len += bytes;
      return;
    }
  }
  if (ranges_.size() == kRangesAtOnce) flush();
  ranges_.push_back({start.pointer(), static_cast<std::size_t>(bytes)});
}

void Discarder::flush() {
  std::size_t next = 0;
  if (batched_ && ranges_.size() > 1) {
    const long advised = process_madvise(target_, ranges_.data(), ranges_.size(), MADV_DONTNEED);
    // A short count ends inside or before some range: that one is dropped again, which does no harm.
    for (std::uint64_t left = advised > 0 ? static_cast<std::uint64_t>(advised) : 0;
         next < ranges_.size() && left >= ranges_[next].iov_len; ++next) {
      left -= ranges_[next].iov_len;
    }
  }
  for (; next < ranges_.size(); ++next) one(Address::of(ranges_[next].iov_base), ranges_[next].iov_len);
  ranges_.clear();
}

// Writing puts memory behind huge pages that had none. Where none is reserved and none is free this says so, and a write
// would be killed.
void Discarder::huge(Address start, std::uint64_t bytes) const {
  const std::uint64_t unit = backing_.huge_bytes;
  const std::uint64_t end = start.value + bytes;
  const std::uint64_t low = std::min(end, (start.value + unit - 1) / unit * unit);
  const std::uint64_t high = std::max(low, end / unit * unit);
  const auto zero = [unit](std::uint64_t from, std::uint64_t to) {
    if (from == to) return;
    if (::madvise(Address{from / unit * unit}.pointer(), unit, abi::kMadvPopulateWrite) != 0)
      throw_errno("madvise(MADV_POPULATE_WRITE) of huge pages");
    std::memset(Address{from}.pointer(), 0, static_cast<std::size_t>(to - from));
  };
  zero(start.value, low);
  const int advice = backing_.shared ? MADV_REMOVE : MADV_DONTNEED;
  if (high > low && ::madvise(Address{low}.pointer(), static_cast<std::size_t>(high - low), advice) != 0)
    throw_errno("madvise() of huge pages (MADV_DONTNEED: Linux 5.18)");
  zero(high, end);
}

void Discarder::one(Address start, std::uint64_t bytes) const {
  if (backing_.huge_bytes != 0) return huge(start, bytes);
  const int advice = backing_.shared ? MADV_REMOVE : MADV_DONTNEED;
  int status = -1;
  for (int tries = 0; status != 0 && tries < kBusyTries; ++tries) {
    status = ::madvise(start.pointer(), static_cast<std::size_t>(bytes), advice);
    if (status != 0 && errno != EAGAIN) break;
  }
  if (status != 0) throw_errno(backing_.shared ? "madvise(MADV_REMOVE)" : "madvise(MADV_DONTNEED)");
}

}  // namespace memferry
