#include "vm.h"

#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "kvm_lists.h"
#include "os/sys_error.h"

// guest.S
extern "C" const unsigned char kvm_guest[];
extern "C" const unsigned char kvm_guest_end[];

namespace kvm_example {

namespace {

using memferry::throw_errno;
using memferry::UniqueFd;

constexpr std::uint32_t kStep = 0x9e3779b1;

// Kicks a vCPU out of KVM. It needs no handler, and disturbs nobody's: it is blocked in the vCPU's thread except inside
// of KVM_RUN, which returns when it is pending, and it is taken off there.
int kick_signal() { return SIGRTMIN + 5; }

std::uint64_t now_ns() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

template <typename Argument>
int call(int fd, unsigned long request, Argument argument, const char* name) {
  const int result = ::ioctl(fd, request, argument);
  if (result < 0) throw_errno(name);
  return result;
}

kvm_run& run_page(const memferry::Mapping& mapping) { return *reinterpret_cast<kvm_run*>(mapping.data()); }

void set_immediate_exit(const memferry::Mapping& mapping, bool on) {
  std::atomic_ref(run_page(mapping).immediate_exit).store(on ? 1 : 0, std::memory_order_seq_cst);
}

void check(const VmConfig& config) {
  const auto start = reinterpret_cast<std::uintptr_t>(config.ram.data());
  const std::uint64_t bytes = config.ram.size();
  if (start % layout::kPage != 0 || bytes % layout::kPage != 0 || bytes < layout::kLeastRam ||
      bytes > layout::kMostRam) {
    throw std::invalid_argument("the guest's RAM is whole pages, from " + std::to_string(layout::kLeastRam) +
                                " bytes to 2 GiB");
  }
  if (!config.marks.empty() && config.marks.size() < (bytes / layout::kPage + 63) / 64) {
    throw std::invalid_argument("the marks are fewer than the RAM's pages");
  }
}

}  // namespace

Vm::Vm(const VmConfig& config) : ram_(config.ram), marks_(config.marks) {
  check(config);
  if (config.console >= 0) {
    console_ = UniqueFd(::fcntl(config.console, F_DUPFD_CLOEXEC, 0));
    if (!console_.valid()) throw_errno("the console");
  }
  system_ = UniqueFd(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
  if (!system_.valid()) throw_errno("/dev/kvm");
  if (call(system_.get(), KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION") != KVM_API_VERSION) {
    throw std::runtime_error("KVM has another version here");
  }
  features_ = VcpuFeatures::of(system_.get());
  vm_ = UniqueFd(call(system_.get(), KVM_CREATE_VM, 0, "KVM_CREATE_VM"));
  // Intel's real mode needs three pages below 4 GiB for itself.
  call(vm_.get(), KVM_SET_TSS_ADDR, 0xfffbd000UL, "KVM_SET_TSS_ADDR");
  set_slot(0);
  vcpu_ = UniqueFd(call(vm_.get(), KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU"));
  const int bytes = call(system_.get(), KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE");
  run_ = memferry::Mapping::shared(vcpu_.get(), static_cast<std::uint64_t>(bytes));
  // It begins with every signal blocked: a kick must not come before its own mask is there.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { vcpu_thread(); });
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Vm::~Vm() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    wanted_ = false;
    stop_.store(true);
    set_immediate_exit(run_, true);
    ::pthread_kill(thread_.native_handle(), kick_signal());
    changed_.notify_all();
  }
  thread_.join();
}

void Vm::set_slot(std::uint32_t flags) {
  kvm_userspace_memory_region region{};
  region.flags = flags;
  region.memory_size = ram_.size();
  region.userspace_addr = reinterpret_cast<std::uintptr_t>(ram_.data());
  call(vm_.get(), KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
}

void Vm::log_writes(bool on) { set_slot(on ? KVM_MEM_LOG_DIRTY_PAGES : 0); }

void Vm::require_standing(const char* operation) {
  const std::lock_guard lock(mutex_);
  if (!stands_ || wanted_) throw std::logic_error(std::string(operation) + ": the guest runs");
}

void Vm::boot() {
  require_standing("boot");
  const std::uint64_t sweep_bytes = ram_.size() - layout::kSweep;
  const auto pages = static_cast<std::uint32_t>(sweep_bytes / layout::kPage);
  const std::array<std::uint32_t, 5> parameters = {pages, static_cast<std::uint32_t>(layout::kSweep),
                                                   static_cast<std::uint32_t>(ram_.size()), pages * kStep, 0};
  write_ram(layout::kCode, kvm_guest, static_cast<std::uint64_t>(kvm_guest_end - kvm_guest));
  write_ram(layout::kParameters, parameters.data(), sizeof parameters);
  if (status().state == RunState::kFailed) throw std::runtime_error("boot: " + status().failure);

  kvm_sregs special{};
  call(vcpu_.get(), KVM_GET_SREGS, &special, "KVM_GET_SREGS");
  for (kvm_segment* segment : {&special.cs, &special.ds, &special.es}) {
    segment->selector = 0;
    segment->base = 0;
  }
  for (kvm_segment* segment : {&special.ds, &special.es}) {
    segment->limit = 0xffffffff;
    segment->g = 1;
  }
  call(vcpu_.get(), KVM_SET_SREGS, &special, "KVM_SET_SREGS");
  kvm_regs registers{};
  registers.rip = layout::kCode;
  registers.rflags = 2;
  registers.rdi = layout::kSweep;
  call(vcpu_.get(), KVM_SET_REGS, &registers, "KVM_SET_REGS");
  const std::lock_guard lock(device_mutex_);
  device_ = {};
}

std::vector<std::byte> Vm::save() {
  require_standing("save");
  const std::lock_guard lock(device_mutex_);
  return save_vcpu(vcpu_.get(), features_, device_, ram_.size());
}

void Vm::load(std::span<const std::byte> state) {
  require_standing("load");
  const DeviceState device = load_vcpu(vcpu_.get(), features_, state, ram_.size());
  const std::lock_guard lock(device_mutex_);
  device_ = device;
}

void Vm::run() {
  const std::lock_guard lock(mutex_);
  if (!failure_.empty() || ending_) return;
  wanted_ = true;
  changed_.notify_all();
}

// No kick is lost. The vCPU's thread takes stop_, immediate_exit and the signal back under the lock, when it is to run;
// we set them under the lock, when it is not. So whichever comes second stands, and a vCPU that is about to enter KVM
// finds immediate_exit set, or the signal pending.
std::uint64_t Vm::pause() {
  std::unique_lock lock(mutex_);
  wanted_ = false;
  stop_.store(true);
  set_immediate_exit(run_, true);
  ::pthread_kill(thread_.native_handle(), kick_signal());
  changed_.notify_all();
  changed_.wait(lock, [this] { return stands_; });
  if (!failure_.empty()) throw std::runtime_error("the guest has failed: " + failure_);
  return stood_at_ns_;
}

Status Vm::status() {
  Status status;
  const std::lock_guard lock(mutex_);
  status.failure = failure_;
  status.state = !failure_.empty()     ? RunState::kFailed
                 : stands_ && !wanted_ ? RunState::kStands
                                       : RunState::kRuns;
  const std::lock_guard device_lock(device_mutex_);
  status.device = device_;
  return status;
}

void Vm::vcpu_thread() {
  ::pthread_setname_np(::pthread_self(), "vcpu-0");
  sigset_t blocked;
  ::sigfillset(&blocked);
  // SIGBUS stays blocked: KVM sends one for a page that is lost, and then tries again until it is kicked. The owner of
  // the memory hears of the loss before, and pauses the guest (kvm-guest.ts).
  for (const int synchronous : {SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGABRT})
    ::sigdelset(&blocked, synchronous);
  ::pthread_sigmask(SIG_SETMASK, &blocked, nullptr);
  // The same inside of KVM_RUN, but for the kick. The kernel's sigset_t is 8 bytes long.
  sigset_t inside = blocked;
  ::sigdelset(&inside, kick_signal());
  struct : SignalMaskHead {
    std::array<std::byte, 8> signals{};
  } mask;
  mask.length = mask.signals.size();
  std::memcpy(mask.signals.data(), &inside, mask.signals.size());
  if (::ioctl(vcpu_.get(), kSetSignalMask, &mask) != 0) {
    fail("KVM_SET_SIGNAL_MASK: " + std::generic_category().message(errno));
  }

  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return wanted_ || ending_; });
    if (ending_) return;
    if (!failure_.empty()) {
      wanted_ = false;
      continue;
    }
    sigset_t kick;
    ::sigemptyset(&kick);
    ::sigaddset(&kick, kick_signal());
    const timespec at_once{};
    while (::sigtimedwait(&kick, nullptr, &at_once) > 0) {
    }
    set_immediate_exit(run_, false);
    stop_.store(false);
    stands_ = false;
    lock.unlock();
    run_until_asked();
    lock.lock();
    stood_at_ns_ = now_ns();
    stands_ = true;
    changed_.notify_all();
  }
}

void Vm::run_until_asked() {
  while (!stop_.load()) enter_once();
  // An `out` that we have served is over only when KVM is entered once more, and so are the registers.
  set_immediate_exit(run_, true);
  while (finish_instruction()) {
  }
}

void Vm::enter_once() {
  if (::ioctl(vcpu_.get(), KVM_RUN, 0) == 0) {
    handle_exit();
  } else if (errno != EINTR && errno != EAGAIN) {
    // EFAULT: a page that cannot be had any more, or a userfaultfd that serves user mode only.
    fail("KVM_RUN: " + std::generic_category().message(errno));
  }
}

// True when there may be more to finish.
bool Vm::finish_instruction() {
  if (::ioctl(vcpu_.get(), KVM_RUN, 0) == 0) {
    handle_exit();
    return true;
  }
  if (errno == EAGAIN) return true;
  if (errno != EINTR) fail("KVM_RUN: " + std::generic_category().message(errno));
  return false;
}

void Vm::handle_exit() {
  const kvm_run& run = run_page(run_);
  if (run.exit_reason == KVM_EXIT_INTR || run.exit_reason == KVM_EXIT_IRQ_WINDOW_OPEN) return;
  if (run.exit_reason == KVM_EXIT_IO && run.io.direction == KVM_EXIT_IO_OUT && run.io.size == 4 &&
      run.io.count == 1) {
    std::uint32_t value = 0;
    std::memcpy(&value, run_.data() + run.io.data_offset, sizeof value);
    if (run.io.port == layout::kCountPort) return count(value);
    if (run.io.port == layout::kWrongPort) {
      return fail("it found other memory than it had left, at address " + std::to_string(value));
    }
  }
  fail("it did what this VMM has no part for: KVM exit " + std::to_string(run.exit_reason));
}

void Vm::count(std::uint32_t value) {
  if (console_.valid()) {
    ssize_t written = 0;
    do written = ::write(console_.get(), &value, sizeof value);
    while (written < 0 && errno == EINTR);
    if (written != sizeof value) return fail("the console takes no more");
  }
  // The device's own writing: page value % kRingPages of the ring, filled with the count.
  std::array<std::uint32_t, layout::kPage / 4> page{};
  page.fill(value);
  write_ram(layout::kRing + value % layout::kRingPages * layout::kPage, page.data(), sizeof page);
  const std::lock_guard lock(device_mutex_);
  ++device_.outputs;
  device_.last = value;
}

// The one way in which the VMM writes the guest's RAM: first the bytes, then the mark. By a system call, because a page
// that is lost is then an error, and no signal.
void Vm::write_ram(std::uint64_t address, const void* bytes, std::uint64_t length) {
  const iovec from{const_cast<void*>(bytes), length};
  const iovec to{ram_.data() + address, length};
  if (::process_vm_writev(::getpid(), &from, 1, &to, 1, 0) != static_cast<ssize_t>(length)) {
    return fail("its RAM at " + std::to_string(address) + " cannot be written");
  }
  if (marks_.empty()) return;
  for (std::uint64_t page = address / layout::kPage; page <= (address + length - 1) / layout::kPage; ++page) {
    std::atomic_ref(marks_[page / 64]).fetch_or(1ULL << (page % 64), std::memory_order_release);
  }
}

void Vm::fail(const std::string& why) {
  const std::lock_guard lock(mutex_);
  if (failure_.empty()) failure_ = why;
  wanted_ = false;
  stop_.store(true);
}

}  // namespace kvm_example
