// Which trackers work here, found out by using them: kernels and containers differ from what their version
// numbers and feature bits promise.

#include <sys/mman.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "os/mapping.h"
#include "os/pagemap.h"
#include "os/sys_error.h"
#include "os/userfaultfd.h"
#include "track/dirty_tracker.h"
#include "track/kvm_log.h"
#include "track/soft_dirty_process.h"
#include "track/uffd_wp.h"
#include "track/uffd_wp_async.h"

namespace memferry {

namespace {

// Writes one page of several, some never touched, and expects the tracker to find exactly that one.
void try_out(TrackerKind kind) {
  constexpr std::uint64_t kPages = 4;
  // Between pages of another protection, so that the kernel joins it with no neighbour (which makes soft-dirty report
  // too much).
  const std::uint64_t page_size = system_page_size();
  const Mapping memory = Mapping::anonymous((kPages + 2) * page_size, PROT_NONE);
  if (::mprotect(memory.data() + page_size, kPages * page_size, PROT_READ | PROT_WRITE) != 0)
    throw_errno("mprotect");
  const auto region =
      Region::adopt({{memory.start().plus(page_size), kPages * page_size}}, kPages * page_size);
  volatile std::byte* first = region->address(PageNumber{0}).pointer();
  *first = std::byte{1};
  const auto tracker = make_tracker(kind, region);
  tracker->arm();
  AtomicBitmap dirty(kPages);
  if (tracker->collect(dirty) != 0)
    throw std::runtime_error("pages that nobody wrote are reported as written");
  volatile std::byte* third = region->address(PageNumber{2}).pointer();
  *first = std::byte{2};
  *third = std::byte{2};
  tracker->collect(dirty);
  if (!dirty.test(PageNumber{0}) || !dirty.test(PageNumber{2})) {
    throw std::runtime_error("a page that was written is not reported");
  }
  if (dirty.count() != 2) throw std::runtime_error("pages that nobody wrote are reported as written");
}

constexpr const char* kGrantUserfaultfd =
    "sysctl vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE, or access to /dev/userfaultfd, or a seccomp "
    "profile that "
    "allows userfaultfd";

bool explain_userfaultfd(TrackerProbe& probe, const Userfaultfd::Offer& offer) {
  if (offer.user_faults) return true;
  probe.reason = "no userfaultfd: " + std::generic_category().message(offer.error);
  probe.remedy = offer.error == ENOSYS
                     ? "a kernel with CONFIG_USERFAULTFD, or a seccomp profile that allows userfaultfd"
                     : kGrantUserfaultfd;
  return false;
}

void explain_uffd_wp_async(TrackerProbe& probe) {
  const Userfaultfd::Offer offer = Userfaultfd::probe();
  if (!explain_userfaultfd(probe, offer)) return;
  if ((offer.features & UffdWpAsyncTracker::kFeatures) != UffdWpAsyncTracker::kFeatures) {
    probe.reason = "this kernel has no asynchronous write protection (UFFD_FEATURE_WP_ASYNC)";
    probe.remedy = "Linux 6.7 or later";
    return;
  }
  try {
    if (!Pagemap().can_scan()) {
      probe.reason = "this kernel has no PAGEMAP_SCAN";
      probe.remedy = "Linux 6.7 or later with CONFIG_PROC_PAGE_MONITOR";
    }
  } catch (const SystemError& error) {
    probe.reason = error.what();
    probe.remedy = "a mounted /proc";
  }
}

void explain_uffd_wp(TrackerProbe& probe) {
  const Userfaultfd::Offer offer = Userfaultfd::probe();
  if (!explain_userfaultfd(probe, offer)) return;
  if (!offer.kernel_faults) {
    probe.reason = "the user-mode-only userfaultfd would fail the system calls of whoever writes: " +
                   std::generic_category().message(offer.error);
    probe.remedy = kGrantUserfaultfd;
  } else if ((offer.features & UffdWpTracker::kFeatures) != UffdWpTracker::kFeatures) {
    probe.reason = "this kernel has no write protection (UFFD_FEATURE_PAGEFAULT_FLAG_WP)";
    probe.remedy = "Linux 5.14 or later";
  }
}

void explain_soft_dirty(TrackerProbe& probe) {
  try {
    if (SoftDirtyProcess::kernel_has_it()) return;
    probe.reason = "this kernel keeps no soft-dirty bits: a page that was just written has none";
    probe.remedy = "a kernel with CONFIG_MEM_SOFT_DIRTY";
  } catch (const SystemError& error) {
    probe.reason = error.what();
    probe.remedy = "a mounted /proc";
  }
}

// What the kernel has, but this process may not use.
const char* remedy_of_failure(TrackerKind kind, const std::exception& error) {
  const auto* const failed = dynamic_cast<const SystemError*>(&error);
  if (kind == TrackerKind::kSoftDirty && failed != nullptr &&
      (failed->error() == EPERM || failed->error() == EACCES))
    return "CAP_SYS_PTRACE, or kernel.yama.ptrace_scope below 2 and a seccomp profile that allows ptrace; "
           "and no "
           "debugger attached";
  if (kind == TrackerKind::kUffdWp && failed == nullptr) return "Linux 5.14 or later";
  return "";
}

}  // namespace

TrackerProbe probe_tracker(TrackerKind kind) {
  if (kind == TrackerKind::kKvmLog) return probe_kvm_log();
  TrackerProbe probe;
  probe.name = tracker_name(kind);
  if (kind == TrackerKind::kUffdWpAsync) explain_uffd_wp_async(probe);
  if (kind == TrackerKind::kUffdWp) explain_uffd_wp(probe);
  if (kind == TrackerKind::kSoftDirty) explain_soft_dirty(probe);
  if (!probe.reason.empty()) return probe;
  try {
    try_out(kind);
    probe.available = true;
  } catch (const std::exception& error) {
    probe.reason = error.what();
    probe.remedy = remedy_of_failure(kind, error);
  }
  return probe;
}

}  // namespace memferry
