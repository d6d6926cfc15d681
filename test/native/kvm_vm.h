// The smallest VM: one vCPU in real mode whose program writes one 32-bit value and halts, each time it is asked to.
// Its code lies in a page of its own, in slot 31; the memory under test is in slots of the test's making.
#pragma once

#if defined(__x86_64__)
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include "os/mapping.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"
#include "page/range.h"

namespace memferry {

class WritingVm {
 public:
  static constexpr std::uint64_t kCode = 0x1000;

  WritingVm() {
    const UniqueFd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
    if (!kvm.valid()) throw_errno("/dev/kvm");
    vm_ = UniqueFd(call(kvm, KVM_CREATE_VM, 0, "KVM_CREATE_VM"));
    // Intel's real mode needs a task state somewhere below 4 GiB.
    call(vm_, KVM_SET_TSS_ADDR, 0xfffbd000, "KVM_SET_TSS_ADDR");
    code_ = Mapping::anonymous(system_page_size());
    const unsigned char program[] = {
        0x67, 0x66, 0x89, 0x07,  // mov [edi], eax
        0xf4,                    // hlt
    };
    std::memcpy(code_.data(), program, sizeof program);
    map(31, kCode, code_.start(), code_.size(), 0);
    const int size = call(kvm, KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE");
    vcpu_ = UniqueFd(call(vm_, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU"));
    run_ = Mapping::shared(vcpu_.get(), static_cast<std::uint64_t>(size));
    kvm_sregs special{};
    call(vcpu_, KVM_GET_SREGS, &special, "KVM_GET_SREGS");
    special.cs.base = 0;
    special.cs.selector = 0;
    special.ds.base = 0;
    special.ds.limit = 0xffffffff;
    special.ds.g = 1;
    call(vcpu_, KVM_SET_SREGS, &special, "KVM_SET_SREGS");
  }

  [[nodiscard]] int fd() const { return vm_.get(); }

  void map(std::uint32_t slot, std::uint64_t guest, Address memory, std::uint64_t bytes,
           std::uint32_t flags = KVM_MEM_LOG_DIRTY_PAGES) {
    kvm_userspace_memory_region region{};
    region.slot = slot;
    region.flags = flags;
    region.guest_phys_addr = guest;
    region.memory_size = bytes;
    region.userspace_addr = memory.value;
    call(vm_, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
  }

  // The guest writes `value` at guest-physical `address`. For one thread at a time.
  void write(std::uint64_t address, std::uint32_t value) {
    kvm_regs registers{};
    registers.rip = kCode;
    registers.rflags = 2;
    registers.rdi = address;
    registers.rax = value;
    call(vcpu_, KVM_SET_REGS, &registers, "KVM_SET_REGS");
    auto* const run = reinterpret_cast<kvm_run*>(run_.data());
    while (::ioctl(vcpu_.get(), KVM_RUN, 0) != 0) {
      if (errno != EINTR) throw_errno("KVM_RUN");
    }
    if (run->exit_reason != KVM_EXIT_HLT) {
      throw SystemError("the guest did not halt: exit " + std::to_string(run->exit_reason), EIO);
    }
  }

 private:
  template <typename Argument>
  static int call(const UniqueFd& fd, unsigned long request, Argument argument, const char* name) {
    const int result = ::ioctl(fd.get(), request, argument);
    if (result < 0) throw_errno(name);
    return result;
  }

  UniqueFd vm_;
  Mapping code_;
  UniqueFd vcpu_;
  Mapping run_;
};

}  // namespace memferry
#endif
