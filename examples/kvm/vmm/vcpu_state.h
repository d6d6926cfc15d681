// A vCPU's state as bytes: what moves as the guest's execution state. Versioned, and checked before anything of it
// reaches KVM, since it comes from another host.
//
//   "MFKV", version, number of sections, RAM in bytes (64 bits); then for each section its kind, its length and its
//   bytes, which are KVM's own structures. Little-endian. Each section there is once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace kvm_example {

// The bytes are not a state, or not one that this host can run.
class BadState : public std::runtime_error {
 public:
  explicit BadState(const std::string& what) : std::runtime_error("the vCPU's state: " + what) {}
};

// What the VMM's one device has to go on with.
struct DeviceState {
  std::uint64_t outputs = 0;  // how many counts the guest has put out
  std::uint32_t last = 0;     // the last one
  std::uint32_t reserved = 0;
};

// Which sections KVM has here, and which of the model-specific registers that are worth moving.
struct VcpuFeatures {
  bool xsave = false;
  bool xcrs = false;
  bool debug_registers = false;
  std::vector<std::uint32_t> msrs;
  // `system`: the descriptor of /dev/kvm. Throws memferry::SystemError.
  static VcpuFeatures of(int system);
};

// The vCPU stands, with no port I/O half done. Throws memferry::SystemError.
[[nodiscard]] std::vector<std::byte> save_vcpu(int vcpu, const VcpuFeatures& features,
                                               const DeviceState& device, std::uint64_t ram_bytes);
// Throws BadState; the vCPU may have some of it then, and needs another state before it runs.
[[nodiscard]] DeviceState load_vcpu(int vcpu, const VcpuFeatures& features, std::span<const std::byte> state,
                                    std::uint64_t ram_bytes);

}  // namespace kvm_example
