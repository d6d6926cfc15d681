#include "track/soft_dirty_process.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "os/sys_error.h"
#include "os/thread_freezer.h"

namespace memferry {

namespace {

constexpr std::size_t kEntriesAtOnce = 32768;  // of 128 MiB
constexpr char kResetSoftDirty[] = "4";

UniqueFd open_or_throw(const char* path, int flags) {
  UniqueFd fd(::open(path, flags | O_CLOEXEC));
  if (!fd) throw SystemError(std::string("open(") + path + ")", errno);
  return fd;
}

}  // namespace

std::shared_ptr<SoftDirtyProcess> SoftDirtyProcess::own() {
  // The one thing in memferry that is the process's: so are the bits.
  static std::mutex mutex;
  static std::weak_ptr<SoftDirtyProcess> known;
  static pid_t known_by = 0;
  const std::lock_guard lock(mutex);
  // A child of fork() has bits and page tables of its own.
  if (auto process = known.lock(); process && known_by == ::getpid()) return process;
  std::shared_ptr<SoftDirtyProcess> process(new SoftDirtyProcess());
  known = process;
  known_by = ::getpid();
  return process;
}

SoftDirtyProcess::SoftDirtyProcess()
    : pagemap_(open_or_throw("/proc/self/pagemap", O_RDONLY)),
      clear_refs_(open_or_throw("/proc/self/clear_refs", O_WRONLY)),
      canary_(Mapping::anonymous(system_page_size())),
      entries_(Mapping::anonymous(kEntriesAtOnce * sizeof(std::uint64_t))) {
  // Touched beforehand: what is read into it while all stand still must not need memory that a stopped thread holds.
  std::fill_n(entries_.data(), entries_.size(), std::byte{0});
}

bool SoftDirtyProcess::kernel_has_it() {
  const Mapping page = Mapping::anonymous(system_page_size());
  *static_cast<volatile std::byte*>(page.data()) = std::byte{1};
  bool set = false;
  Pagemap().entries(page.start(), page.size(), [&](Address, std::span<const std::uint64_t> found) {
    set = (found.front() & abi::kPagemapSoftDirty) != 0;
  });
  return set;
}

void SoftDirtyProcess::enter(SoftDirtyWatch& watch, std::vector<Extent> extents,
                             const std::function<bool(PageNumber)>& is_zero) {
  const std::lock_guard lock(mutex_);
  watch.extents = std::move(extents);
  look_locked(&watch);
  settle(watch, true, is_zero);
  watches_.push_back(&watch);
}

void SoftDirtyProcess::leave(SoftDirtyWatch& watch) {
  const std::lock_guard lock(mutex_);
  std::erase(watches_, &watch);
}

void SoftDirtyProcess::look(SoftDirtyWatch& watch, std::vector<Extent> extents,
                            const std::function<bool(PageNumber)>& is_zero) {
  const std::lock_guard lock(mutex_);
  watch.extents = std::move(extents);
  look_locked(nullptr);
  settle(watch, false, is_zero);
}

// A page that is written while its tracker is being armed may count or not: so the bits of an arming one are read after
// the reset, when only the content matters.
void SoftDirtyProcess::look_locked(SoftDirtyWatch* arming) {
  arming_ = arming;
  error_ = 0;
  const bool held = ThreadFreezer::run_alone(
      [](void* self) { static_cast<SoftDirtyProcess*>(self)->read_and_reset(); }, this);
  arming_ = nullptr;
  if (!held) {
    for (SoftDirtyWatch* watch : watches_) read(*watch, true);
  }
  // Whoever lost something by a failure is told by the next look: the canary stays without its bit.
  if (error_ != 0) throw SystemError(failed_, std::exchange(error_, 0));
}

// While all other threads stand still: no allocation, no lock, no exception.
void SoftDirtyProcess::read_and_reset() {
  const auto page = static_cast<off_t>(canary_.start().value / system_page_size() * sizeof(std::uint64_t));
  std::uint64_t entry = 0;
  const bool readable = ::pread(pagemap_.get(), &entry, sizeof entry, page) == sizeof entry;
  const bool untouched = readable && canary_set_ && (entry & abi::kPagemapSoftDirty) != 0;
  for (SoftDirtyWatch* watch : watches_) read(*watch, !untouched);
  if (::write(clear_refs_.get(), kResetSoftDirty, 1) != 1) {
    error_ = errno;
    failed_ = "write(/proc/PID/clear_refs)";
  }
  canary_set_ = error_ == 0;
  *static_cast<volatile std::byte*>(canary_.data()) = std::byte{1};
  if (arming_ != nullptr) read(*arming_, false);
}

void SoftDirtyProcess::read(SoftDirtyWatch& watch, bool all_written) {
  const std::uint64_t step = system_page_size();
  auto* const entries = reinterpret_cast<std::uint64_t*>(entries_.data());
  std::uint64_t first = 0;
  for (const Extent& extent : watch.extents) {
    const std::uint64_t count = extent.bytes / step;
    for (std::uint64_t at = 0; at < count;) {
      const std::uint64_t wanted = std::min<std::uint64_t>(kEntriesAtOnce, count - at);
      const ssize_t got = ::pread(pagemap_.get(), entries, wanted * sizeof(std::uint64_t),
                                  static_cast<off_t>((extent.start.value / step + at) * sizeof(std::uint64_t)));
      const std::uint64_t read = got < 0 ? 0 : static_cast<std::uint64_t>(got) / sizeof(std::uint64_t);
      if (read == 0) {
        // What was not read counts as written.
        error_ = got < 0 ? errno : EIO;
        failed_ = "pread(/proc/PID/pagemap)";
      }
      for (std::uint64_t i = 0; i < (read == 0 ? wanted : read); ++i) {
        note(watch, PageNumber{first + at + i}, read == 0 ? 0 : entries[i], all_written || read == 0);
      }
      at += read == 0 ? wanted : read;
    }
    first += count;
  }
  watch.known_pages = first;
}

// `content` is what the tracker knows, not what the page is: zeros that were reported are no content.
void SoftDirtyProcess::note(SoftDirtyWatch& watch, PageNumber page, std::uint64_t entry, bool all_written) {
  const bool there = (entry & (abi::kPagemapPresent | abi::kPagemapSwapped)) != 0;
  // Shared with a child of fork(), or the page of zeros.
  const bool common = (entry & abi::kPagemapPresent) != 0 && (entry & abi::kPagemapExclusive) == 0;
  const bool arming = arming_ == &watch;
  if (arming || all_written || page.value >= watch.known_pages || (entry & abi::kPagemapSoftDirty) != 0) {
    if (!arming) watch.written.set(page);
    if (there) {
      watch.content.set(page);
    } else {
      watch.content.clear(page);
    }
    if (arming && common) watch.doubtful.set(page);
    return;
  }
  const bool had_content = watch.content.test(page);
  if (had_content && !there) {
    watch.written.set(page);  // discarded: zeros by now
    watch.content.clear(page);
  } else if (had_content && common) {
    watch.doubtful.set(page);  // a read after a discard has mapped the page of zeros, or a child shares it
  } else if (!had_content && there && !common) {
    watch.written.set(page);  // there was no page, and this one has no bit: should not be, so it counts
    watch.content.set(page);
  }
}

void SoftDirtyProcess::settle(SoftDirtyWatch& watch, bool arming, const std::function<bool(PageNumber)>& is_zero) {
  const PageNumber end{watch.doubtful.capacity()};
  PageNumber from{0};
  while (const auto run = watch.doubtful.take_run(from, end, end.value)) {
    for (PageNumber page = run->first; page < run->end(); ++page.value) {
      if (!is_zero(page)) continue;  // what is written from now on has its bit again
      watch.content.clear(page);
      if (!arming) watch.written.set(page);
    }
    from = run->end();
  }
}

}  // namespace memferry
