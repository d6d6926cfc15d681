#include "os/pagemap.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <optional>

#include "os/mapping.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

// Joins ranges that touch, since one run of pages may come in several pieces (present, then swapped), and
// leaves out what a scan reports again.
class Joiner {
 public:
  explicit Joiner(const std::function<void(AddressRange)>& visit) : visit_(visit) {}
  void add(AddressRange range) {
    range.start = std::max(range.start, reported_);
    if (range.start >= range.end) return;
    reported_ = range.end;
    if (pending_ && pending_->end == range.start) {
      pending_->end = range.end;
      return;
    }
    flush();
    pending_ = range;
  }
  void flush() {
    if (pending_) visit_(*pending_);
    pending_.reset();
  }

 private:
  const std::function<void(AddressRange)>& visit_;
  std::optional<AddressRange> pending_;
  OwnerAddress reported_;
};

}  // namespace

Pagemap::Pagemap(std::size_t runs_at_once)
    : fd_(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)), runs_at_once_(runs_at_once) {
  if (!fd_) throw_errno("open(/proc/self/pagemap)");
}

Pagemap::Pagemap(std::shared_ptr<const Process> owner, std::size_t runs_at_once)
    : owner_(std::move(owner)), runs_at_once_(runs_at_once) {
  fd_ = owner_ ? duplicate(owner_->pagemap()) : UniqueFd(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!fd_) throw_errno("open(/proc/self/pagemap)");
}

bool Pagemap::can_scan() const {
  abi::PmScanArg nothing{};
  nothing.size = sizeof nothing;
  nothing.return_mask = abi::kPageIsPresent;
  // An empty range is valid; a kernel without the ioctl says ENOTTY.
  return ::ioctl(fd_.get(), abi::kPagemapScan, &nothing) >= 0;
}

Pagemap::Batch Pagemap::scan_once(std::uint64_t start, std::uint64_t end, const Query& query) {
  if (buffer_.empty()) buffer_.resize(runs_at_once_);
  abi::PmScanArg request{};
  request.size = sizeof request;
  request.flags = query.flags;
  request.start = start;
  request.end = end;
  request.vec = Address::of(buffer_.data()).value;
  request.vec_len = buffer_.size();
  request.category_inverted = query.category_inverted;
  request.category_mask = query.category_mask;
  request.category_anyof_mask = query.category_anyof_mask;
  request.return_mask = query.return_mask;
  const int count = ::ioctl(fd_.get(), abi::kPagemapScan, &request);
  if (count < 0 && errno == ESRCH && owner_) throw owner_->gone("PAGEMAP_SCAN");
  if (count < 0) throw_errno("PAGEMAP_SCAN");
  // A call that neither gets on nor says why would make scan() spin.
  if (request.walk_end <= start || request.walk_end > end)
    throw SystemError("PAGEMAP_SCAN: no progress", EIO);
  return {static_cast<std::size_t>(count), request.walk_end};
}

void Pagemap::populated(OwnerAddress start, std::uint64_t bytes,
                        const std::function<void(AddressRange)>& visit) {
  if (!can_scan()) {
    populated_by_reading(start, bytes, visit);
    return;
  }
  // Everything inverted is "not the page of zeros"; present or swapped is asked for by anyof.
  Query query;
  query.category_inverted = abi::kPageIsPfnZero;
  query.category_mask = abi::kPageIsPfnZero;
  query.category_anyof_mask = abi::kPageIsPresent | abi::kPageIsSwapped;
  query.return_mask = abi::kPageIsPresent | abi::kPageIsSwapped;
  Joiner joiner(visit);
  scan(start, bytes, query, [&](const abi::PageRegion& region) {
    joiner.add({OwnerAddress{region.start}, OwnerAddress{region.end}});
  });
  joiner.flush();
}

void Pagemap::present(OwnerAddress start, std::uint64_t bytes,
                      const std::function<void(AddressRange)>& visit) {
  if (!can_scan()) return read_entries(start, bytes, abi::kPagemapPresent, visit);
  Query query;
  query.category_inverted = abi::kPageIsPfnZero;
  query.category_mask = abi::kPageIsPfnZero | abi::kPageIsPresent;
  query.return_mask = abi::kPageIsPresent;
  Joiner joiner(visit);
  scan(start, bytes, query, [&](const abi::PageRegion& region) {
    joiner.add({OwnerAddress{region.start}, OwnerAddress{region.end}});
  });
  joiner.flush();
}

void Pagemap::populated_by_reading(OwnerAddress start, std::uint64_t bytes,
                                   const std::function<void(AddressRange)>& visit) {
  read_entries(start, bytes, abi::kPagemapPresent | abi::kPagemapSwapped, visit);
}

void Pagemap::read_entries(OwnerAddress start, std::uint64_t bytes, std::uint64_t any_of,
                           const std::function<void(AddressRange)>& visit) {
  const std::uint64_t page_size = system_page_size();
  constexpr std::size_t kMostEntries = 8192;
  const std::size_t at_once =
      std::min<std::size_t>(kMostEntries, static_cast<std::size_t>(bytes / page_size));
  std::vector<std::uint64_t> entries(at_once);
  Joiner joiner(visit);
  std::uint64_t page = start.value / page_size;
  const std::uint64_t end = page + bytes / page_size;
  while (page < end) {
    const std::size_t wanted = static_cast<std::size_t>(std::min<std::uint64_t>(at_once, end - page));
    const ssize_t got = ::pread(fd_.get(), entries.data(), wanted * sizeof(std::uint64_t),
                                static_cast<off_t>(page * sizeof(std::uint64_t)));
    if (got < 0) throw_errno("pread(/proc/PID/pagemap)");
    if (got == 0 && owner_) throw owner_->gone("pread(/proc/PID/pagemap)");
    if (got < static_cast<ssize_t>(sizeof(std::uint64_t)))
      throw SystemError("/proc/PID/pagemap ends early", EIO);
    const auto read = static_cast<std::uint64_t>(got) / sizeof(std::uint64_t);
    for (std::uint64_t i = 0; i < read; ++i) {
      if ((entries[i] & any_of) == 0) continue;
      joiner.add({OwnerAddress{(page + i) * page_size}, OwnerAddress{(page + i + 1) * page_size}});
    }
    page += read;
  }
  if (owner_) owner_->require("pread(/proc/PID/pagemap)");
  joiner.flush();
}

}  // namespace memferry
