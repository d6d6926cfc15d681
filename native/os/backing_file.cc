#include "os/backing_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <ctime>
#include <memory>
#include <string>

#include "os/sys_error.h"

namespace memferry {

namespace {

constexpr std::uint64_t kTmpfsMagic = 0x01021994;
constexpr std::uint64_t kHugetlbfsMagic = 0x958458f6;

UniqueFd open_map_file(const MappedArea& area, const Process* owner) {
  char name[64];
  std::snprintf(name, sizeof name, "map_files/%lx-%lx", static_cast<unsigned long>(area.start.value),
                static_cast<unsigned long>(area.end.value));
  if (owner == nullptr)
    return UniqueFd(::open((std::string("/proc/self/") + name).c_str(), O_RDONLY | O_CLOEXEC));
  try {
    return owner->open_file(name, O_RDONLY);
  } catch (const OwnerGone&) {
    throw;
  } catch (const SystemError&) {
    return {};
  }
}

// A descriptor of ours for the same file.
UniqueFd find_descriptor(const MappedArea& area) {
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir("/proc/self/fd"), &::closedir);
  if (!directory) return {};
  while (const dirent* const entry = ::readdir(directory.get())) {
    int fd = -1;
    const std::string name = entry->d_name;
    const auto number = std::from_chars(name.data(), name.data() + name.size(), fd);
    if (number.ec != std::errc()) continue;
    struct stat status {};
    if (::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) continue;
    if (status.st_ino != area.inode || status.st_dev != area.device) continue;
    // Opened anew: a duplicate would share its position, which data() moves.
    return UniqueFd(::open(("/proc/self/fd/" + name).c_str(), O_RDONLY | O_CLOEXEC));
  }
  return {};
}

}  // namespace

std::optional<BackingFile> BackingFile::of(const MappedArea& area, const Process* owner) {
  UniqueFd fd = open_map_file(area, owner);
  if (!fd) fd = find_descriptor(area);
  if (!fd) return std::nullopt;
  struct statfs file_system {};
  if (::fstatfs(fd.get(), &file_system) != 0) throw_errno("fstatfs");
  const auto magic = static_cast<std::uint64_t>(file_system.f_type);
  const Kind kind = magic == kTmpfsMagic       ? Kind::kTmpfs
                    : magic == kHugetlbfsMagic ? Kind::kHugetlbfs
                                               : Kind::kOther;
  return BackingFile(std::move(fd), kind, static_cast<std::uint64_t>(file_system.f_bsize));
}

void BackingFile::data(std::uint64_t offset, std::uint64_t bytes,
                       const std::function<void(std::uint64_t, std::uint64_t)>& visit) const {
  const std::uint64_t end = offset + bytes;
  for (std::uint64_t at = offset; at < end;) {
    const off_t data = ::lseek(fd_.get(), static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno == ENXIO) return;  // nothing but a hole from here on
    if (data < 0) throw_errno("lseek(SEEK_DATA)");
    const std::uint64_t start = std::max(at, static_cast<std::uint64_t>(data));
    if (start >= end) return;
    const off_t hole = ::lseek(fd_.get(), static_cast<off_t>(start), SEEK_HOLE);
    if (hole < 0 && errno != ENXIO) throw_errno("lseek(SEEK_HOLE)");
    // A page that became a hole in between counts as content once more.
    const std::uint64_t stop = hole < 0 ? start + 1 : std::max(start + 1, static_cast<std::uint64_t>(hole));
    visit(start, std::min(stop, end));
    at = stop;
  }
}

UniqueFd BackingFile::open_for_writing() const {
  UniqueFd fd(::open(("/proc/self/fd/" + std::to_string(fd_.get())).c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) throw_errno("open() of the file behind shared memory, to write it");
  return fd;
}

BackingFile::Stamp BackingFile::stamp() const {
  constexpr std::int64_t kSettledMs = 50;  // several ticks at the slowest usual rate, 100 Hz
  struct stat status {};
  if (::fstat(fd_.get(), &status) != 0) throw_errno("fstat");
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME_COARSE, &now);
  Stamp stamp;
  stamp.seconds = status.st_ctim.tv_sec;
  stamp.nanoseconds = status.st_ctim.tv_nsec;
  stamp.blocks = static_cast<std::uint64_t>(status.st_blocks);
  const std::int64_t age_ms =
      (now.tv_sec - status.st_ctim.tv_sec) * 1000 + (now.tv_nsec - status.st_ctim.tv_nsec) / 1'000'000;
  stamp.settled = age_ms >= kSettledMs;
  return stamp;
}

}  // namespace memferry
