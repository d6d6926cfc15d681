#include "control/secret_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "control/failure.h"
#include "os/unique_fd.h"

namespace memferry::control {

namespace {

constexpr std::size_t kMostFileBytes = 4096;
constexpr unsigned kOthers = 0077;

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Failure("AUTH_FAILED", "secret file: " + path + " " + what);
}

}  // namespace

Bytes read_secret_file(const std::string& path) {
  // NONBLOCK: opening a FIFO that was put there must not wait for its writer.
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!fd) {
    if (errno == ELOOP) refuse(path, "is a symbolic link");
    refuse(path, "cannot be opened: " + std::generic_category().message(errno));
  }
  // The open file is checked, not the path: what is read is what was looked at.
  struct stat facts {};
  if (::fstat(fd.get(), &facts) != 0) refuse(path, "cannot be looked at");
  if (!S_ISREG(facts.st_mode)) refuse(path, "is not a regular file");
  if (facts.st_uid != ::geteuid()) refuse(path, "belongs to another user");
  if ((facts.st_mode & kOthers) != 0) refuse(path, "can be used by others; chmod 600 it");
  Bytes bytes(kMostFileBytes + 1);
  std::size_t length = 0;
  while (length < bytes.size()) {
    const ssize_t got = ::read(fd.get(), bytes.data() + length, bytes.size() - length);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) refuse(path, "cannot be read");
    if (got == 0) break;
    length += static_cast<std::size_t>(got);
  }
  if (length > kMostFileBytes) refuse(path, "is too long");
  const auto space = [](std::uint8_t byte) {
    return byte == ' ' || byte == '\t' || byte == '\n' || byte == '\r';
  };
  while (length > 0 && space(bytes[length - 1])) --length;
  bytes.resize(length);
  if (length < kLeastSecretBytes)
    throw Failure("INVALID_ARGUMENT", path + " has " + std::to_string(length) + " bytes; at least " +
                                          std::to_string(kLeastSecretBytes) + " are needed");
  return bytes;
}

}  // namespace memferry::control
