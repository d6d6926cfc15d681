// KVM's structures that end in a list, without the list. Some versions of <linux/kvm.h> give them another size in C++
// than in C, and the numbers of their ioctls with it; so they are declared here.
#pragma once

#include <linux/kvm.h>

#include <cstdint>

namespace kvm_example {

struct MsrListHead {
  std::uint32_t count = 0;
};
struct MsrsHead {
  std::uint32_t count = 0;
  std::uint32_t reserved = 0;
};
struct SignalMaskHead {
  std::uint32_t length = 0;
};

struct Xsave {
  std::uint32_t region[1024] = {};
};

constexpr unsigned long kGetMsrIndexList = _IOWR(KVMIO, 0x02, MsrListHead);
constexpr unsigned long kGetMsrs = _IOWR(KVMIO, 0x88, MsrsHead);
constexpr unsigned long kSetMsrs = _IOW(KVMIO, 0x89, MsrsHead);
constexpr unsigned long kSetSignalMask = _IOW(KVMIO, 0x8b, SignalMaskHead);
constexpr unsigned long kGetXsave = _IOR(KVMIO, 0xa4, Xsave);
constexpr unsigned long kSetXsave = _IOW(KVMIO, 0xa5, Xsave);

}  // namespace kvm_example
