// A VM with one vCPU, its RAM somebody else's memory (a memferry region), one slot, and one device: a port on which
// the guest puts out its counter. The device appends each count to the console and writes it into a ring of pages of
// the guest's RAM, as a disk or a network card would: a write that KVM's dirty log does not have, so it is marked.
//
// Threads: the vCPU has its own. run(), pause() and status() from any; the rest from one at a time, with the vCPU
// standing (std::logic_error else).
#pragma once

#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "os/mapping.h"
#include "os/unique_fd.h"
#include "vcpu_state.h"

namespace kvm_example {

// Where things are in the guest's RAM; guest.S has the same numbers.
namespace layout {
constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kCode = 0x1000;
constexpr std::uint64_t kParameters = 0x2000;
constexpr std::uint64_t kRing = 0x4000;  // the device's
constexpr std::uint64_t kRingPages = 8;
constexpr std::uint64_t kSweep = 0x10000;  // to the end of the RAM
constexpr std::uint16_t kCountPort = 0x10;
constexpr std::uint16_t kWrongPort = 0x14;
constexpr std::uint64_t kLeastRam = kSweep + 16 * kPage;
constexpr std::uint64_t kMostRam = 1ULL << 31;
}  // namespace layout

enum class RunState { kStands, kRuns, kFailed };

struct Status {
  RunState state = RunState::kStands;
  DeviceState device;
  std::string failure;  // why it runs no more, with kFailed
};

struct VmConfig {
  std::span<std::byte> ram;        // page-aligned; outlives the VM
  std::span<std::uint64_t> marks;  // one bit a page for what the VMM writes; empty: nobody asks
  int console = -1;                // duplicated; 4 bytes are appended for each count. -1: none
};

class Vm {
 public:
  // Throws memferry::SystemError, std::invalid_argument.
  explicit Vm(const VmConfig& config);
  // Waits for the vCPU, which may be waiting for a page: close the engine that serves it first.
  ~Vm();
  Vm(const Vm&) = delete;
  Vm& operator=(const Vm&) = delete;

  [[nodiscard]] int fd() const { return vm_.get(); }
  // KVM's dirty log of the slot, on or off, also while the vCPU runs.
  void log_writes(bool on);

  // A fresh guest: its program and its parameters into the RAM, its registers to the beginning.
  void boot();
  // Of a guest that stands: its registers and its device. The RAM is the caller's. Throws what save_vcpu throws.
  [[nodiscard]] std::vector<std::byte> save();
  // Throws BadState.
  void load(std::span<const std::byte> state);

  void run();
  // When this returns the vCPU stands, nothing of its last instruction is half done, and the RAM is not written any
  // more. Gives the time (CLOCK_MONOTONIC, ns) at which it stopped. Throws std::runtime_error when the guest failed.
  std::uint64_t pause();
  [[nodiscard]] Status status();

 private:
  void set_slot(std::uint32_t flags);
  void vcpu_thread();
  void run_until_asked();
  void enter_once();
  bool finish_instruction();
  void handle_exit();
  void count(std::uint32_t value);
  void write_ram(std::uint64_t address, const void* bytes, std::uint64_t length);
  void fail(const std::string& why);
  void require_standing(const char* operation);

  const std::span<std::byte> ram_;
  const std::span<std::uint64_t> marks_;
  memferry::UniqueFd console_;
  memferry::UniqueFd system_;
  memferry::UniqueFd vm_;
  memferry::UniqueFd vcpu_;
  memferry::Mapping run_;
  VcpuFeatures features_;

  std::mutex mutex_;  // guards what follows, up to the thread
  std::condition_variable changed_;
  bool wanted_ = false;  // to run
  bool ending_ = false;
  bool stands_ = true;
  std::uint64_t stood_at_ns_ = 0;
  std::string failure_;

  std::atomic<bool> stop_{false};  // what the vCPU looks at between two entries
  std::mutex device_mutex_;        // guards device_
  DeviceState device_;
  std::thread thread_;
};

}  // namespace kvm_example
