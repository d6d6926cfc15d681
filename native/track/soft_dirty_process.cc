#include "track/soft_dirty_process.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <utility>

#include "os/process_maps.h"
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

std::shared_ptr<SoftDirtyProcess> SoftDirtyProcess::of(const std::shared_ptr<Process>& owner) {
  // The one thing in memferry that is shared by all who concern a process: so are the bits.
  static std::mutex mutex;
  static std::vector<std::weak_ptr<SoftDirtyProcess>> known;
  const std::lock_guard lock(mutex);
  std::erase_if(known, [](const auto& entry) { return entry.expired(); });
  for (const auto& entry : known) {
    if (auto process = entry.lock(); process && process->is_of(owner)) return process;
  }
  std::shared_ptr<SoftDirtyProcess> process(new SoftDirtyProcess(owner));
  known.push_back(process);
  return process;
}

// A child of fork() has bits and page tables of its own; a pid that was reused is another process.
bool SoftDirtyProcess::is_of(const std::shared_ptr<Process>& owner) const {
  if (!owner) return !owner_ && pid_ == ::getpid();
  return owner_ && pid_ == owner->pid() && owner_->alive() && owner->alive();
}

SoftDirtyProcess::SoftDirtyProcess(std::shared_ptr<Process> owner)
    : owner_(std::move(owner)),
      pid_(owner_ ? owner_->pid() : ::getpid()),
      pagemap_(owner_ ? duplicate(owner_->pagemap()) : open_or_throw("/proc/self/pagemap", O_RDONLY)),
      clear_refs_(owner_ ? owner_->open_file("clear_refs", O_WRONLY)
                         : open_or_throw("/proc/self/clear_refs", O_WRONLY)),
      entries_(Mapping::anonymous(kEntriesAtOnce * sizeof(std::uint64_t))) {
  // Touched beforehand: what is read into it while all stand still must not need memory that a stopped thread holds.
  std::fill_n(entries_.data(), entries_.size(), std::byte{0});
  if (owner_) {
    tasks_ = owner_->open_file("task", O_RDONLY | O_DIRECTORY);
  } else {
    own_page_ = Mapping::anonymous(system_page_size());
  }
  find_canary();
  (void)ksm_merges();
}

void SoftDirtyProcess::find_canary() {
  if (!owner_) {
    canary_ = own_page_.start();
    return;
  }
  for_each_mapped_area(
      [&](const MappedArea& area) {
        if (area.name != "[stack]") return true;
        canary_ =
            OwnerAddress{area.end.value - 1};  // the end of the last string that the program was started with
        return false;
      },
      owner_.get());
}

void SoftDirtyProcess::touch_canary() {
  if (canary_.value == 0) return;
  if (!owner_) {
    *static_cast<volatile std::byte*>(own_page_.data()) = std::byte{1};
    return;
  }
  std::byte byte{};
  const iovec here{&byte, 1};
  const iovec there{Address{canary_.value}.pointer(), 1};
  const bool touched = ::process_vm_readv(pid_, &here, 1, &there, 1, 0) == 1 &&
                       ::process_vm_writev(pid_, &here, 1, &there, 1, 0) == 1;
  if (!touched) canary_set_ = false;
}

// A page that is merged with an equal one loses its bit, and is a common one from then on.
bool SoftDirtyProcess::ksm_merges() {
  const auto read_number = [](const char* path) {
    std::uint64_t number = 0;
    std::ifstream(path) >> number;  // none: this kernel has no KSM, or does not count these
    return number;
  };
  const std::uint64_t scanned = read_number("/sys/kernel/mm/ksm/pages_scanned");
  const std::uint64_t scans = read_number("/sys/kernel/mm/ksm/full_scans");
  const bool more = scanned != ksm_scanned_ || scans != ksm_scans_;
  ksm_scanned_ = scanned;
  ksm_scans_ = scans;
  return more || read_number("/sys/kernel/mm/ksm/run") == 1;
}

bool SoftDirtyProcess::kernel_has_it() {
  const Mapping page = Mapping::anonymous(system_page_size());
  *static_cast<volatile std::byte*>(page.data()) = std::byte{1};
  bool set = false;
  Pagemap().entries(page.start(), page.size(), [&](OwnerAddress, std::span<const std::uint64_t> found) {
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
  merging_ = ksm_merges();
  error_ = 0;
  const auto body = [](void* self) { static_cast<SoftDirtyProcess*>(self)->read_and_reset(); };
  bool held = true;
  try {
    held = owner_ ? ThreadFreezer::run_while_stopped(tasks_.get(), body, this)
                  : ThreadFreezer::run_alone(body, this);
  } catch (const SystemError&) {
    arming_ = nullptr;
    if (owner_) owner_->require("soft-dirty");
    throw;
  }
  arming_ = nullptr;
  if (!held || (!merging_ && ksm_merges())) {
    for (SoftDirtyWatch* watch : watches_) read(*watch, true);
  }
  // Whoever lost something by a failure is told by the next look: the canary stays without its bit.
  if (owner_) owner_->require("soft-dirty");
  if (error_ != 0) throw SystemError(failed_, std::exchange(error_, 0));
}

// While all other threads stand still: no allocation, no lock, no exception.
void SoftDirtyProcess::read_and_reset() {
  const auto page = static_cast<off_t>(canary_.value / system_page_size() * sizeof(std::uint64_t));
  std::uint64_t entry = 0;
  const bool readable = ::pread(pagemap_.get(), &entry, sizeof entry, page) == sizeof entry;
  const bool untouched =
      canary_set_ && (canary_.value == 0 || (readable && (entry & abi::kPagemapSoftDirty) != 0));
  for (SoftDirtyWatch* watch : watches_) read(*watch, !untouched);
  if (::write(clear_refs_.get(), kResetSoftDirty, 1) != 1) {
    error_ = errno;
    failed_ = "write(/proc/PID/clear_refs)";
  }
  canary_set_ = error_ == 0;
  touch_canary();
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
      const ssize_t got =
          ::pread(pagemap_.get(), entries, wanted * sizeof(std::uint64_t),
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
    if (merging_) watch.written.set(page);
    watch.doubtful.set(page);  // a read after a discard has mapped the page of zeros, or a child shares it
  } else if (!had_content && there && !common) {
    watch.written.set(page);  // there was no page, and this one has no bit: should not be, so it counts
    watch.content.set(page);
  }
}

void SoftDirtyProcess::settle(SoftDirtyWatch& watch, bool arming,
                              const std::function<bool(PageNumber)>& is_zero) {
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
