#include "os/process_maps.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <optional>
#include <string>

#include "os/kernel_abi.h"
#include "os/sys_error.h"
#include "os/unique_fd.h"

namespace memferry {

namespace {

// "7f12a000-7f12c000 rw-p 00000000 00:00 0     [heap]"
std::optional<MappedArea> parse(std::string_view line) {
  MappedArea area;
  const char* const end = line.data() + line.size();
  auto number = std::from_chars(line.data(), end, area.start.value, 16);
  if (number.ec != std::errc() || number.ptr == end || *number.ptr != '-') return std::nullopt;
  number = std::from_chars(number.ptr + 1, end, area.end.value, 16);
  if (number.ec != std::errc() || end - number.ptr < 5 || *number.ptr != ' ') return std::nullopt;
  const char* const permissions = number.ptr + 1;
  area.readable = permissions[0] == 'r';
  area.writable = permissions[1] == 'w';
  area.shared = permissions[3] == 's';
  // Permissions, offset, device and inode come before the name.
  std::size_t at = static_cast<std::size_t>(permissions - line.data());
  for (int field = 0; field < 4 && at != std::string_view::npos; ++field) {
    at = line.find(' ', at);
    if (at != std::string_view::npos) at = line.find_first_not_of(' ', at);
    if (at == std::string_view::npos) break;
    const char* const here = line.data() + at;
    if (field == 0) (void)std::from_chars(here, end, area.offset, 16);
    if (field == 1) {
      unsigned major = 0;
      unsigned minor = 0;
      const auto device = std::from_chars(here, end, major, 16);
      if (device.ptr != end) (void)std::from_chars(device.ptr + 1, end, minor, 16);
      area.device = makedev(major, minor);
    }
    if (field == 2) (void)std::from_chars(here, end, area.inode);
  }
  area.file = area.inode != 0;
  if (at != std::string_view::npos) area.name = line.substr(at);
  return area;
}

template <typename Accept>
std::uint64_t extent_where(OwnerAddress start, std::uint64_t limit_bytes, const Process* owner,
                           Accept accept) {
  const std::uint64_t limit = start.value + std::min(limit_bytes, ~start.value);
  std::uint64_t reached = start.value;
  for_each_mapped_area_from(
      start,
      [&](const MappedArea& area) {
        if (area.start.value > reached || !accept(area)) return false;
        reached = std::min(area.end.value, limit);
        return reached < limit;
      },
      owner);
  return reached - start.value;
}

// Calls visit for every line until it gives false. False when there was none.
bool visit_lines(const UniqueFd& fd, const std::function<bool(std::string_view)>& visit) {
  std::string text;  // what has been read and not yet visited
  char chunk[16384];
  bool any = false;
  for (;;) {
    const ssize_t got = ::read(fd.get(), chunk, sizeof chunk);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw_errno("read(/proc/PID/maps)");
    if (got == 0) return any;
    any = true;
    text.append(chunk, static_cast<std::size_t>(got));
    std::size_t from = 0;
    for (std::size_t end = text.find('\n'); end != std::string::npos; end = text.find('\n', from)) {
      if (!visit(std::string_view(text).substr(from, end - from))) return true;
      from = end + 1;
    }
    text.erase(0, from);
  }
}

// A thread that ended meanwhile shows nothing: another one is looked at, while any has the memory.
void visit_lines_of(const char* name, const Process* owner,
                    const std::function<bool(std::string_view)>& visit) {
  if (owner == nullptr) {
    const UniqueFd fd(::open((std::string("/proc/self/") + name).c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd) throw_errno("open(/proc/self/maps)");
    visit_lines(fd, visit);
    return;
  }
  while (!visit_lines(owner->open_file(name, O_RDONLY), visit)) continue;
  owner->require("read(/proc/PID/maps)");
}

// False where the kernel has no such question, before anything was visited.
bool query_areas(OwnerAddress from, const std::function<bool(const MappedArea&)>& visit) {
  bool answered = false;
  const UniqueFd maps(::open("/proc/self/maps", O_RDONLY | O_CLOEXEC));
  if (!maps) throw_errno("open(/proc/self/maps)");
  for (;;) {
    abi::ProcmapQuery query{};
    query.size = sizeof query;
    query.query_flags = abi::kProcmapCoveringOrNext;
    query.query_addr = from.value;
    if (::ioctl(maps.get(), abi::kProcmapQuery, &query) != 0) {
      if (errno == EINTR) continue;
      if (errno == ENOENT) return true;
      // Not there (ENOTTY), or not let through by a sandbox or an emulator.
      if (!answered) return false;
      throw_errno("ioctl(PROCMAP_QUERY)");
    }
    answered = true;
    MappedArea area;
    area.start = OwnerAddress{query.vma_start};
    area.end = OwnerAddress{query.vma_end};
    area.readable = (query.vma_flags & abi::kProcmapReadable) != 0;
    area.writable = (query.vma_flags & abi::kProcmapWritable) != 0;
    area.shared = (query.vma_flags & abi::kProcmapShared) != 0;
    area.file = query.inode != 0;
    area.offset = query.vma_offset;
    area.inode = query.inode;
    area.device = makedev(query.dev_major, query.dev_minor);
    if (!visit(area)) return true;
    from = area.end;
  }
}

}  // namespace

void for_each_mapped_area_from(OwnerAddress from, const std::function<bool(const MappedArea&)>& visit,
                               const Process* owner) {
  if (owner == nullptr && query_areas(from, visit)) return;
  for_each_mapped_area([&](const MappedArea& area) { return area.end <= from || visit(area); }, owner);
}

void for_each_mapped_area(const std::function<bool(const MappedArea&)>& visit, const Process* owner) {
  visit_lines_of("maps", owner, [&](std::string_view line) {
    const std::optional<MappedArea> area = parse(line);
    if (!area) throw SystemError("/proc/PID/maps has a line of an unknown form", EIO);
    return visit(*area);
  });
}

// In smaps every area's line, of the same form as in maps, is followed by lines "Key: value".
void for_each_paged_area(const std::function<void(OwnerAddress, OwnerAddress)>& visit, const Process* owner) {
  OwnerAddress start;
  OwnerAddress end;
  visit_lines_of("smaps", owner, [&](std::string_view line) {
    if (line.starts_with("VmFlags:")) {
      if ((std::string(line) + " ").find(" um ") != std::string::npos) visit(start, end);
    } else if (const std::optional<MappedArea> area = parse(line)) {
      start = area->start;
      end = area->end;
    }
    return true;
  });
}

std::uint64_t writable_extent(OwnerAddress start, std::uint64_t limit_bytes) {
  return extent_where(start, limit_bytes, nullptr,
                      [](const MappedArea& area) { return area.readable && area.writable; });
}

std::uint64_t mapped_extent(OwnerAddress start, std::uint64_t limit_bytes, const Process* owner) {
  return extent_where(start, limit_bytes, owner, [](const MappedArea&) { return true; });
}

bool is_private_anonymous(OwnerAddress start, std::uint64_t bytes, const Process* owner) {
  return extent_where(start, bytes, owner,
                      [](const MappedArea& area) { return !area.shared && !area.file; }) == bytes;
}

}  // namespace memferry
