#include "track/kvm_log.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <stdexcept>
#include <string>
#include <utility>

#include "os/kvm_abi.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

constexpr std::uint64_t kWordPages = 64;
// KVM holds a lock, which every vCPU that faults waits for, while it protects one part: 256 MiB.
constexpr std::uint64_t kPartWords = 1024;
constexpr std::uint64_t kUnread = ~0ULL;

[[nodiscard]] std::uint64_t words_for(std::uint64_t pages) { return (pages + kWordPages - 1) / kWordPages; }

[[nodiscard]] std::string slot_name(const KvmSlot& slot) {
  return "kvm-log: slot " + std::to_string(slot.slot);
}

void check_slots(const Region& region, const std::vector<KvmSlot>& slots) {
  if (region.owner()) throw std::invalid_argument("kvm-log: a VM's log is for its own process to read");
  if (slots.empty()) throw std::invalid_argument("kvm-log: no slots");
  const std::uint64_t pages = region.pages();
  for (const KvmSlot& slot : slots) {
    if (slot.pages.count == 0) throw std::invalid_argument(slot_name(slot) + " has no pages");
    if (slot.pages.first.value >= pages || slot.pages.count > pages - slot.pages.first.value) {
      throw std::invalid_argument(slot_name(slot) + " reaches beyond the region");
    }
    if (region.contiguous_run(slot.pages).count != slot.pages.count) {
      throw std::invalid_argument(slot_name(slot) + " is not contiguous in memory");
    }
    // A page may be in several slots (an alias), a slot is there once.
    const auto same = [&](const KvmSlot& other) { return other.slot == slot.slot; };
    if (std::count_if(slots.begin(), slots.end(), same) > 1) {
      throw std::invalid_argument(slot_name(slot) + " is named twice");
    }
  }
}

UniqueFd duplicate_vm(int fd) {
  if (::ioctl(fd, abi::kKvmCheckExtension, abi::kKvmCapManualDirtyLogProtect2) < 0) {
    throw SystemError("kvm-log: the descriptor is not that of a KVM VM", errno);
  }
  UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy.valid()) throw_errno("kvm-log: fcntl(F_DUPFD_CLOEXEC)");
  return copy;
}

[[noreturn]] void fail(const KvmSlot& slot, const char* operation, int error) {
  std::string why;
  switch (error) {
    case ENOENT:
      why = " does not exist, or has no log: the VMM sets KVM_MEM_LOG_DIRTY_PAGES first";
      break;
    case EINVAL:
    case EFAULT:
      why = " is not " + std::to_string(slot.pages.count) + " pages long";
      break;
    case EIO:
      why = " is of a VM of another process, or of one that is dead";
      break;
    case ENXIO:
      why = " has no log, because the VM has a dirty ring";
      break;
    case ENOTTY:
      why = ": the descriptor is not that of a KVM VM";
      break;
    default:
      why = std::string(": ") + operation;
  }
  throw SystemError(slot_name(slot) + why, error == EFAULT ? EINVAL : error);
}

}  // namespace

KvmLogTracker::KvmLogTracker(std::shared_ptr<Region> region, KvmLog log, std::unique_ptr<DirtyTracker> others)
    : region_(std::move(region)),
      log_(std::move(log)),
      vm_(duplicate_vm(log_.vm_fd)),
      others_(std::move(others)),
      found_(region_->capacity_pages()) {
  check_slots(*region_, log_.slots);
  if (!others_ && !log_.marks) {
    throw std::invalid_argument("kvm-log: writes of the VMM are seen by another tracker or marked");
  }
  if (log_.marks && log_.marks->capacity() != region_->capacity_pages()) {
    throw std::invalid_argument("kvm-log: the marks are not of the region's capacity");
  }
  const auto shorter = [](const KvmSlot& a, const KvmSlot& b) { return a.pages.count < b.pages.count; };
  const std::uint64_t page = system_page_size();
  const KvmSlot& longest = *std::max_element(log_.slots.begin(), log_.slots.end(), shorter);
  const std::uint64_t bytes = (words_for(small_pages(longest)) * 8 + page - 1) / page * page;
  words_ = Mapping::anonymous(bytes + page);
  if (::mprotect(words_.data() + bytes, page, PROT_NONE) != 0) throw_errno("kvm-log: mprotect");
}

// KVM counts in the system's pages, whatever the region's are.
std::uint64_t KvmLogTracker::small_pages(const KvmSlot& slot) const {
  return slot.pages.count * (region_->page_size() / system_page_size());
}

// They end where the inaccessible page begins: a slot that is longer than was said is EFAULT, not an overflow.
std::span<std::uint64_t> KvmLogTracker::words_of(const KvmSlot& slot) const {
  const std::uint64_t count = words_for(small_pages(slot));
  std::byte* const end = words_.data() + (words_.size() - system_page_size());
  return {reinterpret_cast<std::uint64_t*>(end) - count, static_cast<std::size_t>(count)};
}

// By our own hand, since KVM does not tell whether it is on: taken for on when it is off, the clearing after the
// reading would lose what was written between the two.
void KvmLogTracker::enable_manual_protect() {
  const int offered = ::ioctl(vm_.get(), abi::kKvmCheckExtension, abi::kKvmCapManualDirtyLogProtect2);
  if (offered < 0) throw_errno("kvm-log: KVM_CHECK_EXTENSION");
  can_clear_ = (static_cast<std::uint64_t>(offered) & abi::kKvmDirtyLogManualProtect) != 0;
  if (!can_clear_ || !log_.manual_protect) return;
  abi::KvmEnableCap enable;
  enable.cap = abi::kKvmCapManualDirtyLogProtect2;
  enable.args[0] = abi::kKvmDirtyLogManualProtect;
  if (::ioctl(vm_.get(), abi::kKvmEnableCap, &enable) != 0) {
    throw_errno("kvm-log: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
  }
  manual_protect_ = true;
}

// Clears nothing, and is refused unless the slot has (at least, where its last word is full) these pages. Reading finds
// one that is longer.
void KvmLogTracker::check_length(const KvmSlot& slot) const {
  const std::uint64_t pages = small_pages(slot);
  std::uint64_t none = 0;
  abi::KvmClearDirtyLog clear;
  clear.slot = slot.slot;
  clear.first_page = (words_for(pages) - 1) * kWordPages;
  clear.pages = static_cast<std::uint32_t>(pages - clear.first_page);
  clear.bitmap = reinterpret_cast<std::uintptr_t>(&none);
  if (::ioctl(vm_.get(), abi::kKvmClearDirtyLog, &clear) != 0) fail(slot, "KVM_CLEAR_DIRTY_LOG", errno);
}

void KvmLogTracker::read_log(const KvmSlot& slot, std::span<std::uint64_t> words) const {
  std::fill(words.begin(), words.end(), kUnread);  // what KVM does not write counts as written by the guest
  abi::KvmDirtyLog read;
  read.slot = slot.slot;
  read.bitmap = reinterpret_cast<std::uintptr_t>(words.data());
  if (::ioctl(vm_.get(), abi::kKvmGetDirtyLog, &read) != 0) fail(slot, "KVM_GET_DIRTY_LOG", errno);
  const std::uint64_t rest = small_pages(slot) % kWordPages;
  if (rest != 0 && (words.back() >> rest) != 0) fail(slot, "KVM_GET_DIRTY_LOG", EINVAL);
}

// Only what was read is cleared: a page that was written since keeps its bit for the next time.
void KvmLogTracker::protect_again(const KvmSlot& slot, std::span<std::uint64_t> words) const {
  const std::uint64_t pages = small_pages(slot);
  for (std::uint64_t at = 0; at < words.size(); at += kPartWords) {
    const std::span<std::uint64_t> part = words.subspan(at, std::min(kPartWords, words.size() - at));
    if (std::all_of(part.begin(), part.end(), [](std::uint64_t word) { return word == 0; })) continue;
    abi::KvmClearDirtyLog clear;
    clear.slot = slot.slot;
    clear.first_page = at * kWordPages;
    clear.pages = static_cast<std::uint32_t>(std::min(part.size() * kWordPages, pages - clear.first_page));
    clear.bitmap = reinterpret_cast<std::uintptr_t>(part.data());
    if (::ioctl(vm_.get(), abi::kKvmClearDirtyLog, &clear) != 0) fail(slot, "KVM_CLEAR_DIRTY_LOG", errno);
  }
}

void KvmLogTracker::find(const KvmSlot& slot, std::span<const std::uint64_t> words) {
  const std::uint64_t per_page = region_->page_size() / system_page_size();
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::uint64_t word = words[i];
    while (word != 0) {
      const auto from = static_cast<std::uint64_t>(std::countr_zero(word));
      const auto count = static_cast<std::uint64_t>(std::countr_one(word >> from));
      const std::uint64_t first = i * kWordPages + from;
      const std::uint64_t first_page = first / per_page;
      const std::uint64_t last_page = (first + count - 1) / per_page;
      found_.set_run({PageNumber{slot.pages.first.value + first_page}, last_page - first_page + 1});
      if (from + count == kWordPages) break;
      word &= ~0ULL << (from + count);
    }
  }
}

void KvmLogTracker::take_log(const KvmSlot& slot) {
  const std::span<std::uint64_t> words = words_of(slot);
  try {
    read_log(slot, words);
    find(slot, words);
    if (manual_protect_) protect_again(slot, words);
  } catch (...) {
    found_.set_run(slot.pages);  // what the reading took cannot be told any more
    throw;
  }
}

void KvmLogTracker::arm() {
  const RegionUse use(region_, "arm");
  disarm();
  try {
    if (others_) others_->arm();
    enable_manual_protect();
    for (const KvmSlot& slot : log_.slots) {
      if (can_clear_) check_length(slot);
      take_log(slot);
    }
  } catch (...) {
    disarm();
    throw;
  }
  if (log_.marks) log_.marks->clear();
  // Nobody has copied anything yet: what was written so far is not told.
  armed_pages_ = region_->pages();
  found_.clear_run({PageNumber{0}, region_->capacity_pages()});
  armed_ = true;
}

std::uint64_t KvmLogTracker::collect(AtomicBitmap& dirty) {
  if (!armed_) throw std::logic_error("kvm-log: collect() without arm()");
  const RegionUse use(region_, "collect");
  const std::uint64_t pages = region_->pages();
  if (dirty.capacity() < pages) throw std::invalid_argument("collect: the bitmap is smaller than the region");
  for (const KvmSlot& slot : log_.slots) take_log(slot);
  if (log_.marks) log_.marks->take(found_);
  if (others_) others_->collect(found_);
  if (pages > armed_pages_) {
    found_.set_run({PageNumber{armed_pages_}, pages - armed_pages_});
    armed_pages_ = pages;
  }
  std::uint64_t written = 0;
  PageNumber from{0};
  while (const auto run = found_.take_run(from, PageNumber{pages}, pages)) {
    dirty.set_run(*run);
    written += run->count;
    from = run->end();
  }
  return written;
}

void KvmLogTracker::disarm() {
  armed_ = false;
  if (others_) others_->disarm();
}

TrackerProbe probe_kvm_log() {
  TrackerProbe probe;
  probe.name = "kvm-log";
  const UniqueFd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
  if (!kvm.valid()) {
    probe.reason = "/dev/kvm: " + std::generic_category().message(errno);
    probe.remedy =
        errno == EACCES ? "membership in the group kvm" : "a host with KVM (and nested virtualization)";
  } else if (::ioctl(kvm.get(), abi::kKvmGetApiVersion, 0) != abi::kKvmApiVersion) {
    probe.reason = "/dev/kvm speaks another version of its interface";
    probe.remedy = "Linux 2.6.22 or later";
  } else {
    probe.available = true;
  }
  return probe;
}

}  // namespace memferry
