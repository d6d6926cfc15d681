#include "os/mapping.h"

#include <unistd.h>

#include <utility>

#include "os/sys_error.h"

namespace memferry {

std::uint64_t system_page_size() {
  static const auto size = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

Mapping Mapping::anonymous(std::uint64_t bytes, int protection, int extra_flags) {
  void* data = ::mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | extra_flags, -1, 0);
  if (data == MAP_FAILED) throw_errno("mmap");
  return {static_cast<std::byte*>(data), bytes};
}

Mapping Mapping::shared(int fd, std::uint64_t bytes, std::uint64_t offset, int protection, int extra_flags) {
  void* data = ::mmap(nullptr, bytes, protection, MAP_SHARED | extra_flags, fd, static_cast<off_t>(offset));
  if (data == MAP_FAILED) throw_errno("mmap");
  return {static_cast<std::byte*>(data), bytes};
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    reset();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

std::byte* Mapping::release() {
  bytes_ = 0;
  return std::exchange(data_, nullptr);
}

void Mapping::reset() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace memferry
