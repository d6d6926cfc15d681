#include "os/worker_thread.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <utility>

#include "os/kernel_abi.h"
#include "os/signals_blocked.h"
#include "os/sys_error.h"

namespace memferry {

namespace {

// These threads wait for a socket or a page most of the time and then have little to do: a wait for a whole slice of
// somebody else's, some milliseconds, each time that they wake would cost most of a link's rate, and every fault.
constexpr std::chrono::microseconds kSlice{300};

}  // namespace

WorkerThread::WorkerThread(const std::string& name, std::function<void(WorkerThread&)> body) {
  start(name, std::move(body));
}

void WorkerThread::start(const std::string& name, std::function<void(WorkerThread&)> body) {
  if (started()) throw std::logic_error("WorkerThread is started already");
  wake_fd_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake_fd_) throw_errno("eventfd");
  stopping_.store(false, std::memory_order_release);
  const SignalsBlocked inherited_by_the_new_thread;
  // By itself, for whatever it does first; and from here, so that who lists threads finds it as soon as this returns.
  const std::string short_name = name.substr(0, 15);
  thread_ = std::thread([this, short_name, body = std::move(body)] {
    pthread_setname_np(pthread_self(), short_name.c_str());
    (void)set_this_thread_slice(kSlice);
    body(*this);
  });
  pthread_setname_np(thread_.native_handle(), short_name.c_str());
}

void WorkerThread::wake() {
  if (!wake_fd_) return;
  const std::uint64_t one = 1;
  // EAGAIN means that the counter is full, so that the descriptor is readable already.
  [[maybe_unused]] const ssize_t written = ::write(wake_fd_.get(), &one, sizeof one);
}

void WorkerThread::request_stop() {
  stopping_.store(true, std::memory_order_release);
  wake();
}

void WorkerThread::stop() {
  if (!thread_.joinable()) return;
  request_stop();
  thread_.join();
}

void WorkerThread::drain_wake() {
  std::uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = ::read(wake_fd_.get(), &count, sizeof count);
}

bool WorkerThread::wait(int timeout_ms) {
  pollfd waiting{wake_fd_.get(), POLLIN, 0};
  // EINTR counts as a timeout: every caller looks at its own state after wait() anyway.
  const bool woken = ::poll(&waiting, 1, timeout_ms) > 0;
  if (woken) drain_wake();
  return woken;
}

bool set_this_thread_slice(std::chrono::nanoseconds slice) {
  abi::SchedAttr attr{};
  if (::syscall(SYS_sched_getattr, 0, &attr, sizeof attr, 0U) != 0) return false;
  if (attr.policy != SCHED_OTHER && attr.policy != SCHED_BATCH) return false;
  attr.size = sizeof attr;
  attr.runtime = static_cast<std::uint64_t>(slice.count());
  return ::syscall(SYS_sched_setattr, 0, &attr, 0U) == 0;
}

bool set_this_thread_nice(int nice_value) {
  // Linux keeps nice values per thread, whatever POSIX says.
  const auto thread = static_cast<id_t>(::syscall(SYS_gettid));
  return ::setpriority(PRIO_PROCESS, thread, nice_value) == 0;
}

bool set_this_thread_idle() {
  const sched_param none{};
  return ::sched_setscheduler(0, SCHED_IDLE, &none) == 0;
}

bool set_this_thread_normal() {
  const sched_param none{};
  return ::sched_setscheduler(0, SCHED_OTHER, &none) == 0;
}

double RunDelay::share(Clock::time_point now) {
  if (begun_ && now - since_ < kWindow) return share_;
  // "nanoseconds run, nanoseconds waited, times run". Not kept open: a thread rests for long between two windows.
  const UniqueFd statistics(::open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC));
  std::array<char, 64> text{};
  const ssize_t got = statistics ? ::read(statistics.get(), text.data(), text.size() - 1) : -1;
  char* after = text.data();
  (void)std::strtoull(text.data(), &after, 10);
  const std::uint64_t delayed_ns = got > 0 ? std::strtoull(after, nullptr, 10) : delayed_ns_;
  const double window_ns = std::chrono::duration<double, std::nano>(now - since_).count();
  share_ = begun_ ? std::clamp(static_cast<double>(delayed_ns - delayed_ns_) / window_ns, 0.0, 1.0) : 0;
  begun_ = true;
  since_ = now;
  delayed_ns_ = delayed_ns;
  return share_;
}

CpuCourtesy::CpuCourtesy(std::uint64_t key) {
  if (::sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) return;
  const auto count = static_cast<unsigned>(CPU_COUNT(&allowed_));
  useful_ = count >= 2 && count <= kSmallHost;
  unsigned skip = static_cast<unsigned>(key % count);
  for (unsigned cpu = 0; useful_ && cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed_) || skip-- > 0) continue;
    CPU_SET(cpu, &corner_);
    break;
  }
}

void CpuCourtesy::follow(bool stand_back) {
  if (!useful_ || stand_back == standing_back_) return;
  if (::sched_setaffinity(0, sizeof corner_, stand_back ? &corner_ : &allowed_) == 0)
    standing_back_ = stand_back;
}

}  // namespace memferry
