// A process that owns memory and a userfaultfd for it, and does with it what it is told.
#pragma once

#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/mman.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>

#include "os/mapping.h"
#include "os/process.h"
#include "os/userfaultfd.h"
#include "page/hash.h"
#include "page/region.h"
#include "tmpfs_file.h"

namespace memferry {

inline constexpr std::uint64_t kUffdInitialised = 1ULL << 31U;

class OwnerProcess {
 public:
  struct Options {
    std::uint64_t pages = 64;
    bool shared = false;         // a memfd
    bool named = false;          // shared, in a file that had a name in tmpfs
    std::uint64_t features = 0;  // of its userfaultfd
    bool api = true;             // it calls UFFDIO_API itself
    bool hidden_uffd = false;    // it has none
    bool huge = false;           // of reserved huge pages of 2 MiB
  };
  enum class Op : std::uint32_t {
    kRead,
    kWrite,
    kHash,
    kDiscard,
    kUnmap,
    kRemap,
    kExec,
    kFork,
    kPopulate,
    kGrandchild,
    kIdleChild,
    kDiscardBeside
  };
  struct Command {
    Op op;
    std::uint64_t first;
    std::uint64_t count;
    std::uint64_t value;
  };

  explicit OwnerProcess(Options options) : options_(options), page_(system_page_size()) {
    if (::pipe2(to_.data(), O_CLOEXEC) != 0 || ::pipe2(from_.data(), O_CLOEXEC) != 0) throw_errno("pipe");
    const std::uint64_t bytes = options.pages * page_;
    if (options.shared) {
      memory_ = options.named
                    ? file_in_tmpfs()
                    : UniqueFd(::memfd_create("owner", MFD_CLOEXEC | (options.huge ? kSealedHuge : 0U)));
      if (!memory_) throw_errno("memfd_create");
      if (::ftruncate(memory_.get(), static_cast<off_t>(bytes)) != 0) throw_errno("ftruncate");
      // As QEMU does it.
      if (options.huge && ::fcntl(memory_.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
        throw_errno("fcntl(F_ADD_SEALS)");
    }
    pid_ = ::fork();
    if (pid_ == 0) live();
    pidfd_ = UniqueFd(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0U)));
    std::uint64_t hello[2] = {};
    receive(hello, sizeof hello);
    address_ = hello[0];
    if (!options.hidden_uffd) {
      uffd_ = UniqueFd(
          static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd_.get(), static_cast<int>(hello[1]), 0U)));
      if (!uffd_) throw_errno("pidfd_getfd");
    }
  }
  ~OwnerProcess() {
    kill();
    for (const int fd : {to_[0], to_[1], from_[0], from_[1]}) ::close(fd);
  }
  OwnerProcess(const OwnerProcess&) = delete;
  OwnerProcess& operator=(const OwnerProcess&) = delete;

  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }

  // Without waiting for an answer: reply() does.
  void tell(Op op, std::uint64_t first = 0, std::uint64_t count = 1, std::uint64_t value = 0) {
    const Command command{op, first, count, value};
    if (::write(to_[1], &command, sizeof command) != sizeof command) throw_errno("write");
  }
  // Nothing within the time: nullopt, also when it is dead.
  std::optional<std::uint64_t> reply(int timeout_ms = 10'000) {
    pollfd look{from_[0], POLLIN, 0};
    if (::poll(&look, 1, timeout_ms) <= 0) return std::nullopt;
    std::uint64_t value = 0;
    if (::read(from_[0], &value, sizeof value) != sizeof value) return std::nullopt;
    return value;
  }
  std::uint64_t ask(Op op, std::uint64_t first = 0, std::uint64_t count = 1, std::uint64_t value = 0) {
    tell(op, first, count, value);
    const auto answer = reply();
    if (!answer) throw std::runtime_error("the owner does not answer");
    return *answer;
  }

  [[nodiscard]] int pidfd() const { return pidfd_.get(); }
  [[nodiscard]] pid_t pid() const { return pid_; }
  [[nodiscard]] int uffd() const { return uffd_.get(); }
  [[nodiscard]] int memory() const { return memory_.get(); }
  [[nodiscard]] OwnerAddress address() const { return OwnerAddress{address_}; }
  [[nodiscard]] std::uint64_t bytes() const { return options_.pages * page_; }

  [[nodiscard]] Region::Attachment attachment() const {
    Region::Attachment attachment;
    attachment.owner = Process::open(pidfd_.get());
    attachment.extents.push_back({address(), bytes()});
    if (!options_.hidden_uffd) attachment.uffd = Userfaultfd::adopt(uffd_.get(), options_.features);
    if (options_.shared) {
      attachment.memory = duplicate(memory_.get());
      attachment.offsets.push_back(0);
    }
    return attachment;
  }
  [[nodiscard]] std::shared_ptr<Region> attach() const { return Region::attach(attachment()); }

 private:
  static constexpr unsigned kSealedHuge = MFD_HUGETLB | MFD_HUGE_2MB | MFD_ALLOW_SEALING;
  static constexpr int kTurns = 1000;

  void receive(void* into, std::size_t bytes) const {
    for (std::size_t done = 0; done < bytes;) {
      const ssize_t got = ::read(from_[0], static_cast<std::byte*>(into) + done, bytes - done);
      if (got <= 0) throw std::runtime_error("the owner does not say hello");
      done += static_cast<std::size_t>(got);
    }
  }

  [[noreturn]] void live() const {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    (void)::signal(SIGBUS, SIG_DFL);  // a sanitizer's handler would make an exit of it
    const std::uint64_t bytes = options_.pages * page_;
    const int huge = options_.huge ? MAP_HUGETLB | MAP_HUGE_2MB : 0;
    const int flags = options_.shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | huge;
    auto* const memory = static_cast<std::byte*>(
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, options_.shared ? memory_.get() : -1, 0));
    if (static_cast<void*>(memory) == MAP_FAILED) ::_exit(5);
    // A huge page is soft-dirty as a whole.
    ::madvise(memory, bytes, MADV_NOHUGEPAGE);
    int uffd = -1;
    if (!options_.hidden_uffd) {
      uffd = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC));
      uffdio_api api{};
      api.api = UFFD_API;
      api.features = options_.features;
      if (options_.api && ::ioctl(uffd, UFFDIO_API, &api) != 0) ::_exit(3);
    }
    answer(reinterpret_cast<std::uintptr_t>(memory));
    answer(static_cast<std::uint64_t>(uffd));
    Command command{};
    while (::read(to_[0], &command, sizeof command) == sizeof command) obey(command, memory);
    ::_exit(0);
  }

  void answer(std::uint64_t value) const {
    if (::write(from_[1], &value, sizeof value) != sizeof value) ::_exit(2);
  }

  void obey(const Command& command, std::byte* memory) const {
    std::byte* const at = memory + command.first * page_;
    const std::uint64_t length = command.count * page_;
    std::uint64_t result = 0;
    switch (command.op) {
      case Op::kRead:
        result = *reinterpret_cast<volatile std::uint64_t*>(at);
        break;
      case Op::kWrite:
        for (std::uint64_t i = 0; i < command.count; ++i)
          *reinterpret_cast<volatile std::uint64_t*>(at + i * page_) = command.value + i;
        break;
      case Op::kHash:
        result = xxh3_64({at, static_cast<std::size_t>(length)});
        break;
      case Op::kDiscard:
        result = static_cast<std::uint64_t>(
            ::madvise(at, length, options_.shared ? MADV_REMOVE : MADV_DONTNEED) == 0 ? 0 : errno);
        break;
      case Op::kUnmap:
        result = ::munmap(at, length) == 0 ? 0 : 1;
        break;
      case Op::kRemap:
        result =
            ::mremap(at, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
                     ::mmap(nullptr, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) == MAP_FAILED
                ? 1
                : 0;
        break;
      case Op::kExec:
        ::execl("/bin/sleep", "sleep", "1000", nullptr);
        ::_exit(4);
      case Op::kFork: {
        // What its child reads there: 0xdead when it is killed by SIGBUS.
        const pid_t child = ::fork();
        if (child == 0) ::_exit(*reinterpret_cast<volatile std::uint64_t*>(at) == 0 ? 10 : 11);
        int status = 0;
        ::waitpid(child, &status, 0);
        result = WIFSIGNALED(status) ? 0xdead : static_cast<std::uint64_t>(WEXITSTATUS(status));
        break;
      }
      case Op::kGrandchild: {
        // The same of a child's child, when the child has read the page `value`.
        const pid_t child = ::fork();
        if (child == 0) {
          if (command.value != 0) (void)*(static_cast<volatile std::byte*>(memory + command.value * page_));
          const pid_t own = ::fork();
          if (own == 0) ::_exit(*reinterpret_cast<volatile std::uint64_t*>(at) == 0 ? 10 : 11);
          int status = 0;
          ::waitpid(own, &status, 0);
          ::_exit(WIFSIGNALED(status) ? 99 : WEXITSTATUS(status));
        }
        int status = 0;
        ::waitpid(child, &status, 0);
        result = WIFSIGNALED(status)         ? 0xdead0
                 : WEXITSTATUS(status) == 99 ? 0xdead
                                             : static_cast<std::uint64_t>(WEXITSTATUS(status));
        break;
      }
      case Op::kIdleChild: {
        const pid_t child = ::fork();
        while (child == 0) ::pause();
        result = static_cast<std::uint64_t>(child);
        break;
      }
      case Op::kDiscardBeside: {
        // Two threads discard and read two ranges, one at `first` and one at `value`: how often it was not zeros.
        std::atomic<std::uint64_t> wrong{0};
        const auto turns = [&](std::byte* range) {
          for (int i = 0; i < kTurns; ++i) {
            wrong += ::madvise(range, length, MADV_REMOVE) == 0 ? 0 : 1;
            wrong += *reinterpret_cast<volatile std::uint64_t*>(range) == 0 ? 0 : 1;
          }
        };
        std::thread other(turns, memory + command.value * page_);
        turns(at);
        other.join();
        result = wrong;
        break;
      }
      case Op::kPopulate:
        result = ::madvise(at, length, abi::kMadvPopulateWrite) == 0 ? 0 : 1;
        break;
    }
    answer(result);
  }

  const Options options_;
  const std::uint64_t page_;
  std::array<int, 2> to_{};
  std::array<int, 2> from_{};
  pid_t pid_ = 0;
  UniqueFd pidfd_;
  UniqueFd uffd_;
  UniqueFd memory_;
  std::uint64_t address_ = 0;
};

}  // namespace memferry
