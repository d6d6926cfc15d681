#include "bind/kernel_features.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <optional>

#include "os/kernel_abi.h"
#include "os/mapping.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"
#include "os/userfaultfd.h"
#include "track/kvm_log.h"

namespace memferry::bind {

namespace {

constexpr const char* kGrantUserfaultfd =
    "run as root or with CAP_SYS_PTRACE, or give the user read and write access to /dev/userfaultfd (a udev "
    "rule), or "
    "sysctl -w vm.unprivileged_userfaultfd=1; in a container the seccomp profile must allow userfaultfd";

// The first bytes of a small file of /proc or /sys, without the newline.
std::optional<std::string> read_small_file(const char* path) {
  const UniqueFd fd(::open(path, O_RDONLY | O_CLOEXEC));
  if (!fd) return std::nullopt;
  std::array<char, 8192> buffer;
  const ssize_t got = ::read(fd.get(), buffer.data(), buffer.size());
  if (got < 0) return std::nullopt;
  std::string text(buffer.data(), static_cast<std::size_t>(got));
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

KernelFeature present(std::string name, std::string detail = {}) {
  return {std::move(name), true, std::move(detail), {}};
}

KernelFeature absent(std::string name, std::string reason, std::string remedy) {
  return {std::move(name), false, std::move(reason), std::move(remedy)};
}

void add_userfaultfd(std::vector<KernelFeature>& features, const Userfaultfd::Offer& offer) {
  if (offer.kernel_faults) {
    features.push_back(present("userfaultfd", "serves the faults of system calls too"));
  } else if (offer.error == ENOSYS) {
    features.push_back(absent("userfaultfd", "this kernel has no userfaultfd (or a seccomp profile hides it)",
                              "a kernel with CONFIG_USERFAULTFD"));
  } else {
    const std::string why =
        offer.user_faults ? "; the user-mode-only one fails system calls that touch a missing page" : "";
    features.push_back(absent("userfaultfd", std::strerror(offer.error) + why, kGrantUserfaultfd));
  }
  features.push_back(offer.user_faults ? present("userfaultfd-user-mode-only")
                                       : absent("userfaultfd-user-mode-only", std::strerror(offer.error),
                                                offer.error == ENOSYS ? "a kernel with CONFIG_USERFAULTFD"
                                                                      : kGrantUserfaultfd));

  const bool device = ::access("/dev/userfaultfd", R_OK | W_OK) == 0;
  const int device_error = errno;
  features.push_back(
      device ? present("dev-userfaultfd")
             : absent("dev-userfaultfd", std::string("/dev/userfaultfd: ") + std::strerror(device_error),
                      device_error == ENOENT
                          ? "Linux 6.1 or later"
                          : "chgrp and chmod 0660 it for the user's group (a udev rule keeps it so)"));

  const auto sysctl = read_small_file("/proc/sys/vm/unprivileged_userfaultfd");
  features.push_back(sysctl == "1" ? present("unprivileged-userfaultfd")
                                   : absent("unprivileged-userfaultfd",
                                            "vm.unprivileged_userfaultfd is " + sysctl.value_or("not there"),
                                            "sysctl -w vm.unprivileged_userfaultfd=1, where neither root, "
                                            "CAP_SYS_PTRACE nor /dev/userfaultfd can be had"));
}

void add_capability(std::vector<KernelFeature>& features) {
  constexpr unsigned kSysPtrace = 19;  // CAP_SYS_PTRACE
  const std::string status = read_small_file("/proc/self/status").value_or("");
  std::uint64_t effective = 0;
  constexpr std::string_view kField = "CapEff:\t";
  if (const std::size_t at = status.find(kField); at != std::string::npos) {
    std::from_chars(status.data() + at + kField.size(), status.data() + status.size(), effective, 16);
  }
  features.push_back((effective >> kSysPtrace & 1U) != 0
                         ? present("cap-sys-ptrace")
                         : absent("cap-sys-ptrace", "not in the effective set",
                                  "setcap cap_sys_ptrace+ep on the node binary, or --cap-add SYS_PTRACE"));
}

struct UserfaultfdFeature {
  const char* name;
  std::uint64_t bit;
  const char* since;
  const char* what_for;
  const char* instead;  // what memferry does without it
};

constexpr std::array kUserfaultfdFeatures = {
    UserfaultfdFeature{"uffd-wp", UFFD_FEATURE_PAGEFAULT_FLAG_WP, "Linux 5.7", "write protection",
                       "it tracks in another way"},
    UserfaultfdFeature{"uffd-wp-unpopulated", abi::kUffdFeatureWpUnpopulated, "Linux 6.4",
                       "tracking untouched pages", "it tracks in another way"},
    UserfaultfdFeature{"uffd-wp-async", abi::kUffdFeatureWpAsync, "Linux 6.7", "tracking without faults",
                       "it tracks in another way"},
    UserfaultfdFeature{
        "uffd-poison", abi::kUffdFeaturePoison, "Linux 6.6", "lost pages fail instead of reading zeros",
        "lost pages fail by a mapping over them; very many scattered ones take the whole region"},
    UserfaultfdFeature{"uffd-move", abi::kUffdFeatureMove, "Linux 6.8", "installing pages without a copy",
                       "pages are copied, as elsewhere"},
    UserfaultfdFeature{"uffd-thread-id", UFFD_FEATURE_THREAD_ID, "Linux 4.14",
                       "which thread waits for a page", "nothing needs it"},
    UserfaultfdFeature{"uffd-event-remove", UFFD_FEATURE_EVENT_REMOVE, "Linux 4.11",
                       "noticing discarded memory", "what a guest discards goes unnoticed"},
    UserfaultfdFeature{"uffd-missing-shmem", UFFD_FEATURE_MISSING_SHMEM, "Linux 4.11", "paging shared memory",
                       "shared memory moves by pre-copy only"},
    UserfaultfdFeature{"uffd-missing-hugetlbfs", UFFD_FEATURE_MISSING_HUGETLBFS, "Linux 4.11",
                       "paging into huge pages", "modes without paging move into huge pages"},
    UserfaultfdFeature{"uffd-minor-hugetlbfs", UFFD_FEATURE_MINOR_HUGETLBFS, "Linux 5.13",
                       "paging into huge pages", "modes without paging move into huge pages"},
    UserfaultfdFeature{"uffd-minor-shmem", UFFD_FEATURE_MINOR_SHMEM, "Linux 5.14", "paging from a page cache",
                       "nothing needs it"},
};

void add_userfaultfd_features(std::vector<KernelFeature>& features, const Userfaultfd::Offer& offer) {
  for (const UserfaultfdFeature& feature : kUserfaultfdFeatures) {
    if (!offer.user_faults) {
      features.push_back(absent(feature.name, "no userfaultfd to ask", kGrantUserfaultfd));
    } else if ((offer.features & feature.bit) == 0) {
      features.push_back(absent(feature.name,
                                std::string("this kernel does not have it (") + feature.what_for +
                                    "); without it " + feature.instead,
                                std::string(feature.since) + " or later"));
    } else {
      features.push_back(present(feature.name, feature.what_for));
    }
  }
}

void add_pagemap_scan(std::vector<KernelFeature>& features) {
  const UniqueFd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  if (!pagemap) {
    features.push_back(absent("pagemap-scan", std::string("/proc/self/pagemap: ") + std::strerror(errno),
                              "a mounted /proc and a kernel with CONFIG_PROC_PAGE_MONITOR"));
    return;
  }
  const Mapping page = Mapping::anonymous(system_page_size());
  abi::PmScanArg scan{};
  scan.size = sizeof(scan);
  scan.start = page.start().value;
  scan.end = page.start().value + page.size();
  scan.category_mask = abi::kPageIsPresent;
  scan.return_mask = abi::kPageIsPresent;
  std::array<abi::PageRegion, 1> found{};
  scan.vec = Address::of(found.data()).value;
  scan.vec_len = found.size();
  features.push_back(::ioctl(pagemap.get(), abi::kPagemapScan, &scan) >= 0
                         ? present("pagemap-scan")
                         : absent("pagemap-scan",
                                  std::string("PAGEMAP_SCAN: ") + std::strerror(errno) +
                                      "; without it /proc/self/pagemap is read entry by entry",
                                  "Linux 6.7 or later"));
}

void add_memory_calls(std::vector<KernelFeature>& features) {
  const Mapping page = Mapping::anonymous(system_page_size());
  features.push_back(
      ::madvise(page.data(), page.size(), abi::kMadvPopulateWrite) == 0
          ? present("madv-populate-write", "touching ahead")
          : absent("madv-populate-write",
                   std::string(std::strerror(errno)) + "; without it memory is touched as it is filled",
                   "Linux 5.14 or later"));

  // A page that was just made is soft-dirty where the kernel keeps the bit; elsewhere it stays 0 silently.
  constexpr std::uint64_t kSoftDirtyBit = 1ULL << 55U;
  volatile std::byte* touched = page.data();
  *touched = std::byte{1};
  std::uint64_t entry = 0;
  const UniqueFd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  const auto offset = static_cast<off_t>(page.start().value / system_page_size() * sizeof(entry));
  const bool read = pagemap && ::pread(pagemap.get(), &entry, sizeof(entry), offset) == sizeof(entry);
  features.push_back(read && (entry & kSoftDirtyBit) != 0
                         ? present("soft-dirty")
                         : absent("soft-dirty", "a page that was just written does not have the bit",
                                  "a kernel with CONFIG_MEM_SOFT_DIRTY"));

  std::byte copied{};
  const iovec local{&copied, 1};
  const iovec remote{page.data(), 1};
  features.push_back(
      ::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0) == 1
          ? present("process-vm-readv", "reading pages that may be lost without a signal")
          : absent("process-vm-readv", std::strerror(errno),
                   "a kernel with CONFIG_CROSS_MEMORY_ATTACH, and a seccomp profile that allows it"));
}

void add_kvm(std::vector<KernelFeature>& features) {
  const TrackerProbe kvm = probe_kvm_log();
  features.push_back(kvm.available ? present("kvm", "guests' RAM is tracked by their own log (kvm-log)")
                                   : absent("kvm", kvm.reason, kvm.remedy));
}

void add_settings(std::vector<KernelFeature>& features) {
  const auto thp = read_small_file("/sys/kernel/mm/transparent_hugepage/enabled");
  if (!thp) {
    features.push_back(
        absent("transparent-hugepages", "this kernel has none", "CONFIG_TRANSPARENT_HUGEPAGE"));
  } else if (thp->find("[never]") != std::string::npos) {
    features.push_back(absent("transparent-hugepages", "set to never",
                              "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"));
  } else {
    features.push_back(present("transparent-hugepages", *thp));
  }

  const auto huge = read_small_file("/proc/sys/vm/nr_hugepages");
  features.push_back(huge && *huge != "0"
                         ? present("hugetlb-pages", *huge + " reserved")
                         : absent("hugetlb-pages", "none reserved", "sysctl -w vm.nr_hugepages=N"));

  rlimit limit{};
  (void)::getrlimit(RLIMIT_MEMLOCK, &limit);
  features.push_back(limit.rlim_cur == RLIM_INFINITY
                         ? present("memlock", "unlimited")
                         : present("memlock", std::to_string(limit.rlim_cur / 1024) + " KiB"));
}

}  // namespace

std::vector<KernelFeature> probe_kernel_features() {
  std::vector<KernelFeature> features;
  const Userfaultfd::Offer offer = Userfaultfd::probe();
  add_userfaultfd(features, offer);
  add_capability(features);
  add_userfaultfd_features(features, offer);
  add_pagemap_scan(features);
  add_memory_calls(features);
  add_kvm(features);
  add_settings(features);
  return features;
}

}  // namespace memferry::bind
