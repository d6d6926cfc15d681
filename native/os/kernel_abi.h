// Kernel interfaces newer than the system headers that we build against (Debian 12 ships those of 6.1). The
// layouts are from the kernel's documentation (admin-guide/mm/userfaultfd, admin-guide/mm/pagemap); names
// differ from the kernel's macros, so that newer headers do not clash.
#pragma once

#include <linux/ioctl.h>
#include <linux/userfaultfd.h>

#include <cstddef>
#include <cstdint>

namespace memferry::abi {

// userfaultfd features, with the release that brought each.
inline constexpr std::uint64_t kUffdFeatureWpHugetlbfsShmem = 1ULL << 12;  // 5.19
inline constexpr std::uint64_t kUffdFeatureWpUnpopulated = 1ULL << 13;     // 6.4
inline constexpr std::uint64_t kUffdFeaturePoison = 1ULL << 14;            // 6.6
inline constexpr std::uint64_t kUffdFeatureWpAsync = 1ULL << 15;           // 6.7
inline constexpr std::uint64_t kUffdFeatureMove = 1ULL << 16;              // 6.8

inline constexpr unsigned kUffdioMoveNumber = 0x05;
inline constexpr unsigned kUffdioPoisonNumber = 0x08;

struct UffdioMove {
  std::uint64_t dst;
  std::uint64_t src;
  std::uint64_t len;
  std::uint64_t mode;
  std::int64_t move;  // written by the kernel, and not read by it
};
inline constexpr std::uint64_t kUffdioMoveDontWake = 1ULL << 0;
inline constexpr std::uint64_t kUffdioMoveAllowSrcHoles = 1ULL << 1;

struct UffdioPoison {
  uffdio_range range;
  std::uint64_t mode;
  std::int64_t updated;  // written by the kernel, and not read by it
};
inline constexpr std::uint64_t kUffdioPoisonDontWake = 1ULL << 0;

inline constexpr unsigned long kUffdioMove = _IOWR(UFFDIO, kUffdioMoveNumber, UffdioMove);
inline constexpr unsigned long kUffdioPoison = _IOWR(UFFDIO, kUffdioPoisonNumber, UffdioPoison);

// PAGEMAP_SCAN on /proc/PID/pagemap (6.7).
struct PageRegion {
  std::uint64_t start;
  std::uint64_t end;
  std::uint64_t categories;
};
struct PmScanArg {
  std::uint64_t size;
  std::uint64_t flags;
  std::uint64_t start;
  std::uint64_t end;
  std::uint64_t walk_end;  // written by the kernel: where it stopped
  std::uint64_t vec;
  std::uint64_t vec_len;
  std::uint64_t max_pages;
  std::uint64_t category_inverted;
  std::uint64_t category_mask;
  std::uint64_t category_anyof_mask;
  std::uint64_t return_mask;
};
inline constexpr unsigned long kPagemapScan = _IOWR('f', 16, PmScanArg);

inline constexpr std::uint64_t kPageIsWpAllowed = 1ULL << 0;
inline constexpr std::uint64_t kPageIsWritten = 1ULL << 1;
inline constexpr std::uint64_t kPageIsFile = 1ULL << 2;
inline constexpr std::uint64_t kPageIsPresent = 1ULL << 3;
inline constexpr std::uint64_t kPageIsSwapped = 1ULL << 4;
inline constexpr std::uint64_t kPageIsPfnZero = 1ULL << 5;
inline constexpr std::uint64_t kPageIsHuge = 1ULL << 6;
inline constexpr std::uint64_t kPageIsSoftDirty = 1ULL << 7;

inline constexpr std::uint64_t kScanWpMatching = 1ULL << 0;
inline constexpr std::uint64_t kScanCheckWpAsync = 1ULL << 1;

// One entry of /proc/PID/pagemap.
inline constexpr std::uint64_t kPagemapPresent = 1ULL << 63;
inline constexpr std::uint64_t kPagemapSwapped = 1ULL << 62;
inline constexpr std::uint64_t kPagemapFileOrShared = 1ULL << 61;
inline constexpr std::uint64_t kPagemapUffdWp = 1ULL << 57;     // 5.14
inline constexpr std::uint64_t kPagemapExclusive = 1ULL << 56;  // 4.2: mapped once only
inline constexpr std::uint64_t kPagemapSoftDirty = 1ULL << 55;  // with CONFIG_MEM_SOFT_DIRTY, else always 0

// <linux/sched/types.h> and the C library's <sched.h> cannot be included together. Size 48: the first version.
struct SchedAttr {
  std::uint32_t size;
  std::uint32_t policy;
  std::uint64_t flags;
  std::int32_t nice;
  std::uint32_t priority;
  std::uint64_t runtime;  // of the fair classes: the slice in ns (6.12)
  std::uint64_t deadline;
  std::uint64_t period;
};
static_assert(sizeof(SchedAttr) == 48);

// struct procmap_query of <linux/fs.h> (6.11).
struct ProcmapQuery {
  std::uint64_t size;
  std::uint64_t query_flags;
  std::uint64_t query_addr;
  std::uint64_t vma_start;
  std::uint64_t vma_end;
  std::uint64_t vma_flags;
  std::uint64_t vma_page_size;
  std::uint64_t vma_offset;
  std::uint64_t inode;
  std::uint32_t dev_major;
  std::uint32_t dev_minor;
  std::uint32_t vma_name_size;
  std::uint32_t build_id_size;
  std::uint64_t vma_name_addr;
  std::uint64_t build_id_addr;
};
inline constexpr unsigned long kProcmapQuery = _IOWR('f', 17, ProcmapQuery);
inline constexpr std::uint64_t kProcmapReadable = 1;
inline constexpr std::uint64_t kProcmapWritable = 2;
inline constexpr std::uint64_t kProcmapShared = 8;
inline constexpr std::uint64_t kProcmapCoveringOrNext = 16;

inline constexpr int kMadvPopulateRead = 22;   // 5.14
inline constexpr int kMadvPopulateWrite = 23;  // 5.14

inline constexpr int kSoPeerPidfd = 77;  // SO_PEERPIDFD, 6.5

static_assert(sizeof(UffdioMove) == 40);
static_assert(sizeof(UffdioPoison) == 32);
static_assert(sizeof(PageRegion) == 24);
static_assert(sizeof(PmScanArg) == 96);
static_assert(sizeof(ProcmapQuery) == 104);
static_assert(offsetof(PmScanArg, walk_end) == 32);

#if defined(__x86_64__) || defined(__aarch64__) || defined(__riscv)
// As the kernel's generic ioctl encoding has them; a few other architectures encode directions differently.
static_assert(kUffdioMove == 0xc028aa05UL);
static_assert(kUffdioPoison == 0xc020aa08UL);
static_assert(kPagemapScan == 0xc0606610UL);
static_assert(UFFDIO_COPY == 0xc028aa03UL);
static_assert(UFFDIO_REGISTER == 0xc020aa00UL);
#endif

}  // namespace memferry::abi
