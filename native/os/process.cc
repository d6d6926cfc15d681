#include "os/process.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <fstream>

namespace memferry {
namespace {

constexpr std::uint64_t kAtOnceBytes = 1ULL << 20;  // process_vm_readv is no faster with more

// 8 bytes while the address space that it was opened for has users; none afterwards.
bool has_users(int pagemap) {
  std::uint64_t entry = 0;
  ssize_t got = -1;
  do got = ::pread(pagemap, &entry, sizeof entry, 0);
  while (got < 0 && errno == EINTR);
  return got == static_cast<ssize_t>(sizeof entry);
}

// Its pages, of any kind, as the first number of a statm file: none where it has let go of its address space.
bool has_pages(const std::string& task) {
  std::ifstream statm(task + "/statm");
  std::uint64_t pages = 0;
  return static_cast<bool>(statm >> pages) && pages > 0;
}

}  // namespace

std::string descriptor_name(int fd) {
  std::array<char, 256> name{};
  const ssize_t length =
      ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), name.data(), name.size() - 1);
  if (length < 0) throw SystemError("descriptor " + std::to_string(fd), EBADF);
  return {name.data(), static_cast<std::size_t>(length)};
}

std::string descriptor_info(int fd, const std::string& key) {
  std::ifstream info("/proc/self/fdinfo/" + std::to_string(fd));
  const std::string wanted = key + ":";
  for (std::string line; std::getline(info, line);) {
    if (!line.starts_with(wanted)) continue;
    const std::size_t from = line.find_first_not_of(" \t", wanted.size());
    return from == std::string::npos ? std::string() : line.substr(from);
  }
  return {};
}

UniqueFd duplicate(int fd) {
  UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy) throw_errno("fcntl(F_DUPFD_CLOEXEC)");
  return copy;
}

std::shared_ptr<Process> Process::open(int pidfd) {
  UniqueFd own = duplicate(pidfd);
  // "Pid" is there for pidfds alone; 0: not in this pid namespace, -1: it has ended.
  const std::string pid = descriptor_info(own.get(), "Pid");
  if (pid.empty()) throw SystemError("descriptor " + std::to_string(pidfd) + " is no pidfd", EBADF);
  pid_t number = 0;
  try {
    number = static_cast<pid_t>(std::stol(pid));
  } catch (const std::exception&) {
    number = 0;
  }
  if (number == -1) throw OwnerGone("the process of the pidfd has ended", ESRCH);
  if (number <= 0) throw SystemError("the process of the pidfd is not visible in this pid namespace", EINVAL);
  std::shared_ptr<Process> process(new Process(std::move(own), number));
  process->pagemap_ = process->open_file("pagemap", O_RDONLY);
  process->memory_ = process->open_file("mem", O_RDONLY);
  // An exec between the two would give files of two address spaces: the older one says so.
  process->require("attach");
  return process;
}

UniqueFd Process::open_file(const char* name, int flags) const {
  const std::optional<std::string> task = task_with_memory();
  if (!task) throw gone(std::string("open(/proc/PID/") + name + ")");
  const std::string path = *task + "/" + name;
  UniqueFd file(::open(path.c_str(), flags | O_CLOEXEC));
  const int error = errno;
  if (ended() || (!file && !task_with_memory())) throw gone("open(" + path + ")");
  if (!file) throw SystemError("open(" + path + ")", error);
  return file;
}

bool Process::ended() const {
  pollfd look{pidfd_.get(), POLLIN, 0};
  int status = -1;
  do status = ::poll(&look, 1, 0);
  while (status < 0 && errno == EINTR);
  return status > 0;
}

// The threads of an ending process let go of its memory one by one, the first often before others, and all of them
// before the pidfd says so; the memory itself stays while anybody reads it.
std::optional<std::string> Process::task_with_memory() const {
  const std::string first = "/proc/" + std::to_string(pid_);
  if (has_pages(first)) return first;
  const std::unique_ptr<DIR, int (*)(DIR*)> tasks(::opendir((first + "/task").c_str()), &::closedir);
  while (const dirent* const entry = tasks ? ::readdir(tasks.get()) : nullptr) {
    const std::string task = first + "/task/" + entry->d_name;
    if (entry->d_name[0] != '.' && has_pages(task)) return task;
  }
  return std::nullopt;
}

bool Process::has_memory() const { return !ended() && has_users(pagemap_.get()); }

Process::Life Process::life() const {
  if (has_memory()) return task_with_memory() ? Life::kAlive : Life::kEnded;
  // An ending process has let go of its memory before its pidfd says so; another program has memory of its own.
  const UniqueFd now(::open(("/proc/" + std::to_string(pid_) + "/pagemap").c_str(), O_RDONLY | O_CLOEXEC));
  return now && has_users(now.get()) && !ended() ? Life::kReplaced : Life::kEnded;
}

OwnerGone Process::gone(const std::string& operation) const {
  const char* how = life() == Life::kReplaced ? " runs another program (exec)" : " has ended";
  return {operation + ": the process " + std::to_string(pid_) + " that owns the memory" + how, ESRCH};
}

void Process::require(const std::string& operation) const {
  if (!has_memory()) throw gone(operation);
}

std::size_t Process::read_some(OwnerAddress from, std::span<std::byte> into) const {
  std::size_t done = 0;
  bool by_pid = true;
  while (done < into.size()) {
    const std::size_t most = std::min<std::size_t>(kAtOnceBytes, into.size() - done);
    ssize_t got = -1;
    if (by_pid) {
      const iovec local{into.data() + done, most};
      const iovec remote{reinterpret_cast<void*>(static_cast<std::uintptr_t>(from.value + done)), most};
      got = ::process_vm_readv(pid_, &local, 1, &remote, 1, 0);
      // Whose memory that was is known only afterwards.
      if (!has_memory()) throw gone("process_vm_readv");
      // Its first thread has ended while others run, or a seccomp profile forbids it: the slower way.
      if (got < 0 && (errno == ESRCH || errno == EPERM || errno == ENOSYS)) {
        by_pid = false;
        continue;
      }
    } else {
      got = ::pread(memory_.get(), into.data() + done, most, static_cast<off_t>(from.value + done));
      if (got <= 0 && !alive()) throw gone("read(/proc/PID/mem)");
    }
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return done;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

void Process::read(OwnerAddress from, std::span<std::byte> into) const {
  if (read_some(from, into) != into.size()) {
    throw SystemError("a page of process " + std::to_string(pid_) + " cannot be read", EFAULT);
  }
}

std::size_t Process::read_each(std::span<const iovec> from, std::span<std::byte> into) const {
  const iovec local{into.data(), into.size()};
  const ssize_t got = ::process_vm_readv(pid_, &local, 1, from.data(), from.size(), 0);
  // Whose memory that was is known only afterwards.
  if (!has_memory()) throw gone("process_vm_readv");
  return got < 0 ? 0 : static_cast<std::size_t>(got);
}

void Process::end() const { (void)::syscall(SYS_pidfd_send_signal, pidfd_.get(), SIGKILL, nullptr, 0U); }

}  // namespace memferry
