// What the dirty log of KVM takes: a handful of constants and layouts of <linux/kvm.h>, which is not there on every
// architecture that the core builds on. (test/native/kvm_log_test.cc compares them with the header's.)
#pragma once

#include <sys/ioctl.h>

#include <cstddef>
#include <cstdint>

namespace memferry::abi {

struct KvmDirtyLog {
  std::uint32_t slot = 0;  // the address space in its upper 16 bits
  std::uint32_t padding = 0;
  std::uint64_t bitmap = 0;  // a pointer; as many 64-bit words as the slot has, whatever its reader expects
};
static_assert(sizeof(KvmDirtyLog) == 16);

struct KvmClearDirtyLog {
  std::uint32_t slot = 0;
  std::uint32_t pages = 0;
  std::uint64_t first_page = 0;  // a multiple of 64
  std::uint64_t bitmap = 0;
};
static_assert(sizeof(KvmClearDirtyLog) == 24);

struct KvmEnableCap {
  std::uint32_t cap = 0;
  std::uint32_t flags = 0;
  std::uint64_t args[4] = {};
  std::uint8_t padding[64] = {};
};
static_assert(sizeof(KvmEnableCap) == 104);

constexpr unsigned long kKvmGetApiVersion = _IO(0xAE, 0x00);
constexpr unsigned long kKvmCheckExtension = _IO(0xAE, 0x03);
constexpr unsigned long kKvmGetDirtyLog = _IOW(0xAE, 0x42, KvmDirtyLog);
constexpr unsigned long kKvmEnableCap = _IOW(0xAE, 0xa3, KvmEnableCap);
constexpr unsigned long kKvmClearDirtyLog = _IOWR(0xAE, 0xc0, KvmClearDirtyLog);

constexpr int kKvmApiVersion = 12;
constexpr unsigned long kKvmCapManualDirtyLogProtect2 = 168;
constexpr std::uint64_t kKvmDirtyLogManualProtect = 1;

}  // namespace memferry::abi
