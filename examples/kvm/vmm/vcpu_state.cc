#include "vcpu_state.h"

#include <linux/kvm.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <system_error>

#include "kvm_lists.h"
#include "os/sys_error.h"

namespace kvm_example {

namespace {

using memferry::throw_errno;

constexpr std::array<char, 4> kMagic = {'M', 'F', 'K', 'V'};
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kMaxBytes = 64 * 1024;

enum Section : std::uint32_t {
  kRegisters = 1,
  kSpecialRegisters = 2,
  kFpu = 3,
  kXsave = 4,
  kXcrs = 5,
  kMsrs = 6,
  kDebugRegisters = 7,
  kRunState = 8,
  kEvents = 9,
  kDevice = 10,
};

struct Head {
  std::array<char, 4> magic = kMagic;
  std::uint32_t version = kVersion;
  std::uint32_t sections = 0;
  std::uint32_t reserved = 0;
  std::uint64_t ram_bytes = 0;
};
static_assert(sizeof(Head) == 24);

struct SectionHead {
  std::uint32_t kind = 0;
  std::uint32_t length = 0;
};

// Of these a state may name any, each once: no register that could do more than go on where the guest was.
constexpr std::array<std::uint32_t, 9> kMsrList = {
    0x10,        // TSC
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0x277,       // PAT
    0xc0000081,  // STAR
    0xc0000082,  // LSTAR
    0xc0000084,  // SYSCALL_MASK
    0xc0000102,  // KERNEL_GS_BASE
};

struct Msr {
  std::uint32_t index = 0;
  std::uint32_t reserved = 0;
  std::uint64_t value = 0;
};

struct MsrBatch : MsrsHead {
  std::array<kvm_msr_entry, kMsrList.size()> entries{};
};

template <typename T>
std::span<const std::byte> bytes_of(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}

class Writer {
 public:
  explicit Writer(std::uint64_t ram_bytes) { head_.ram_bytes = ram_bytes; }
  void add(Section kind, std::span<const std::byte> bytes) {
    append(bytes_of(SectionHead{kind, static_cast<std::uint32_t>(bytes.size())}));
    append(bytes);
    ++head_.sections;
  }
  // KVM's answer to `request` as a section.
  template <typename T>
  void add_from(int vcpu, Section kind, unsigned long request, const char* name) {
    T value{};
    if (::ioctl(vcpu, request, &value) != 0) throw_errno(name);
    add(kind, bytes_of(value));
  }
  [[nodiscard]] std::vector<std::byte> finish() const {
    std::vector<std::byte> all(sizeof head_ + body_.size());
    std::memcpy(all.data(), &head_, sizeof head_);
    std::memcpy(all.data() + sizeof head_, body_.data(), body_.size());
    return all;
  }

 private:
  void append(std::span<const std::byte> bytes) { body_.insert(body_.end(), bytes.begin(), bytes.end()); }
  Head head_;
  std::vector<std::byte> body_;
};

using Sections = std::map<std::uint32_t, std::span<const std::byte>>;

template <typename T>
T take(std::span<const std::byte>& rest) {
  if (rest.size() < sizeof(T)) throw BadState("cut short");
  T value;
  std::memcpy(&value, rest.data(), sizeof value);
  rest = rest.subspan(sizeof value);
  return value;
}

Sections sections_of(std::span<const std::byte> state, std::uint64_t ram_bytes) {
  if (state.size() > kMaxBytes) throw BadState("longer than any state");
  const auto head = take<Head>(state);
  if (head.magic != kMagic) throw BadState("not one of this VMM");
  if (head.version != kVersion)
    throw BadState("version " + std::to_string(head.version) + " is not known here");
  if (head.ram_bytes != ram_bytes) {
    throw BadState("of a guest with " + std::to_string(head.ram_bytes) + " bytes of RAM, not " +
                   std::to_string(ram_bytes));
  }
  Sections sections;
  for (std::uint32_t i = 0; i < head.sections; ++i) {
    const auto section = take<SectionHead>(state);
    if (section.kind < kRegisters || section.kind > kDevice) {
      throw BadState("section " + std::to_string(section.kind) + " is not known here");
    }
    if (section.length > state.size()) throw BadState("cut short");
    if (!sections.emplace(section.kind, state.first(section.length)).second) {
      throw BadState("section " + std::to_string(section.kind) + " twice");
    }
    state = state.subspan(section.length);
  }
  if (!state.empty()) throw BadState("more than its sections");
  return sections;
}

template <typename T>
T section(const Sections& sections, Section kind) {
  const auto found = sections.find(kind);
  if (found == sections.end()) throw BadState("without section " + std::to_string(kind));
  if (found->second.size() != sizeof(T)) {
    throw BadState("section " + std::to_string(kind) + " has " + std::to_string(found->second.size()) +
                   " bytes, not " + std::to_string(sizeof(T)));
  }
  std::span<const std::byte> bytes = found->second;
  return take<T>(bytes);
}

template <typename T>
void set(int vcpu, unsigned long request, T value, const char* what) {
  if (::ioctl(vcpu, request, &value) != 0) {
    throw BadState(std::string(what) + " are refused by KVM here: " + std::generic_category().message(errno));
  }
}

MsrBatch msrs_in(const Sections& sections, const VcpuFeatures& features) {
  MsrBatch batch;
  const auto found = sections.find(kMsrs);
  if (found == sections.end()) return batch;
  std::span<const std::byte> rest = found->second;
  if (rest.size() % sizeof(Msr) != 0 || rest.size() / sizeof(Msr) > batch.entries.size()) {
    throw BadState("model-specific registers of no valid length");
  }
  while (!rest.empty()) {
    const auto msr = take<Msr>(rest);
    if (std::find(features.msrs.begin(), features.msrs.end(), msr.index) == features.msrs.end()) {
      throw BadState("model-specific register " + std::to_string(msr.index) + " is not one that moves");
    }
    kvm_msr_entry& entry = batch.entries[batch.count++];
    entry.index = msr.index;
    entry.data = msr.value;
  }
  return batch;
}

}  // namespace

VcpuFeatures VcpuFeatures::of(int system) {
  VcpuFeatures features;
  const auto has = [&](unsigned long capability) {
    return ::ioctl(system, KVM_CHECK_EXTENSION, capability) > 0;
  };
  features.xsave = has(KVM_CAP_XSAVE);
  features.xcrs = has(KVM_CAP_XCRS);
  features.debug_registers = has(KVM_CAP_DEBUGREGS);
  MsrListHead head;
  if (::ioctl(system, kGetMsrIndexList, &head) != 0 && errno != E2BIG) throw_errno("KVM_GET_MSR_INDEX_LIST");
  std::vector<std::uint32_t> buffer(1 + head.count);
  buffer[0] = head.count;
  if (::ioctl(system, kGetMsrIndexList, buffer.data()) != 0) throw_errno("KVM_GET_MSR_INDEX_LIST");
  for (const std::uint32_t index : kMsrList) {
    if (std::find(buffer.begin() + 1, buffer.end(), index) != buffer.end()) features.msrs.push_back(index);
  }
  return features;
}

std::vector<std::byte> save_vcpu(int vcpu, const VcpuFeatures& features, const DeviceState& device,
                                 std::uint64_t ram_bytes) {
  Writer state(ram_bytes);
  state.add_from<kvm_regs>(vcpu, kRegisters, KVM_GET_REGS, "KVM_GET_REGS");
  state.add_from<kvm_sregs>(vcpu, kSpecialRegisters, KVM_GET_SREGS, "KVM_GET_SREGS");
  state.add_from<kvm_fpu>(vcpu, kFpu, KVM_GET_FPU, "KVM_GET_FPU");
  if (features.xsave) state.add_from<Xsave>(vcpu, kXsave, kGetXsave, "KVM_GET_XSAVE");
  if (features.xcrs) state.add_from<kvm_xcrs>(vcpu, kXcrs, KVM_GET_XCRS, "KVM_GET_XCRS");
  if (features.debug_registers) {
    state.add_from<kvm_debugregs>(vcpu, kDebugRegisters, KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS");
  }
  state.add_from<kvm_mp_state>(vcpu, kRunState, KVM_GET_MP_STATE, "KVM_GET_MP_STATE");
  state.add_from<kvm_vcpu_events>(vcpu, kEvents, KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS");
  std::vector<Msr> msrs;
  for (const std::uint32_t index : features.msrs) {
    MsrBatch one;
    one.count = 1;
    one.entries[0].index = index;
    const int read = ::ioctl(vcpu, kGetMsrs, &one);
    if (read < 0) throw_errno("KVM_GET_MSRS");
    if (read == 1) msrs.push_back({index, 0, one.entries[0].data});  // else this vCPU does not have it
  }
  state.add(kMsrs, std::as_bytes(std::span(msrs)));
  state.add(kDevice, bytes_of(device));
  return state.finish();
}

DeviceState load_vcpu(int vcpu, const VcpuFeatures& features, std::span<const std::byte> state,
                      std::uint64_t ram_bytes) {
  const Sections sections = sections_of(state, ram_bytes);
  const auto has = [&](Section kind, bool here) {
    if (!sections.contains(kind)) return false;
    if (!here)
      throw BadState("section " + std::to_string(kind) + " is of a CPU that this host does not have");
    return true;
  };
  const auto registers = section<kvm_regs>(sections, kRegisters);
  const auto special = section<kvm_sregs>(sections, kSpecialRegisters);
  const auto fpu = section<kvm_fpu>(sections, kFpu);
  const auto run_state = section<kvm_mp_state>(sections, kRunState);
  const auto events = section<kvm_vcpu_events>(sections, kEvents);
  const auto device = section<DeviceState>(sections, kDevice);
  MsrBatch msrs = msrs_in(sections, features);

  set(vcpu, KVM_SET_SREGS, special, "special registers");
  set(vcpu, KVM_SET_REGS, registers, "registers");
  set(vcpu, KVM_SET_FPU, fpu, "FPU registers");
  if (has(kXcrs, features.xcrs))
    set(vcpu, KVM_SET_XCRS, section<kvm_xcrs>(sections, kXcrs), "extended control registers");
  if (has(kXsave, features.xsave))
    set(vcpu, kSetXsave, section<Xsave>(sections, kXsave), "extended registers");
  if (has(kDebugRegisters, features.debug_registers)) {
    set(vcpu, KVM_SET_DEBUGREGS, section<kvm_debugregs>(sections, kDebugRegisters), "debug registers");
  }
  if (msrs.count > 0 && ::ioctl(vcpu, kSetMsrs, &msrs) != static_cast<int>(msrs.count)) {
    throw BadState("model-specific registers are refused by KVM here");
  }
  set(vcpu, KVM_SET_MP_STATE, run_state, "the run state's values");
  set(vcpu, KVM_SET_VCPU_EVENTS, events, "pending events");
  return device;
}

}  // namespace kvm_example
