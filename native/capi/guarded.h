// The border of the C interface: exceptions become codes, options of another library's version are read with care, and a
// callback is known as one.
//
// Threads: any.
#pragma once

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

#include "capi/memferry.h"
#include "control/failure.h"

namespace memferry::capi {

// Fills it in; what does not fit is cut. nullptr: for nobody.
void write_error(memferry_error* error, int code, int system_error, const char* text) noexcept;
void write_error(memferry_error* error, const control::Cause& cause) noexcept;
// What is being handled (call it in a catch block); gives its code.
int write_current(memferry_error* error) noexcept;
[[nodiscard]] int code_of(const std::string& name) noexcept;

// A cause that an embedder's callback gave: its code, and its text where it wrote one.
[[nodiscard]] control::Failure failure_of(int code, const memferry_error& why, const char* otherwise);

template <typename Body>
int guarded(memferry_error* error, Body&& body) noexcept {
  try {
    body();
    write_error(error, MEMFERRY_OK, 0, "");
    return MEMFERRY_OK;
  } catch (...) {
    return write_current(error);
  }
}

template <typename T>
T& required(T* pointer, const char* what) {
  if (!pointer) throw std::invalid_argument(std::string(what) + ": NULL");
  return *pointer;
}

// A caller's structure as this library knows it: what an older memferry.h did not have is zero, what a newer one has more
// must be.
template <typename T>
T read_sized(const T* given, const char* what) {
  const T& source = required(given, what);
  std::size_t size = 0;
  std::memcpy(&size, &source, sizeof size);
  if (size <= sizeof size) throw std::invalid_argument(std::string(what) + ": its size is not set");
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t at = sizeof(T); at < size; ++at) {
    if (bytes[at] != 0)
      throw std::invalid_argument(std::string(what) + ": a field that this library does not know");
  }
  T result{};
  std::memcpy(static_cast<void*>(&result), given, size < sizeof(T) ? size : sizeof(T));
  return result;
}

// As much of it as the caller has room for.
template <typename T>
void write_sized(T* to, T value, const char* what) {
  T& target = required(to, what);
  std::size_t size = 0;
  std::memcpy(&size, &target, sizeof size);
  if (size <= sizeof size) throw std::invalid_argument(std::string(what) + ": its size is not set");
  value.size = size;
  std::memcpy(static_cast<void*>(to), &value, size < sizeof(T) ? size : sizeof(T));
}

enum class Callback { kNone, kEngine, kArrival };
// Until it goes, this thread is in a callback of that kind.
class InCallback {
 public:
  explicit InCallback(Callback kind);
  ~InCallback();
  InCallback(const InCallback&) = delete;
  InCallback& operator=(const InCallback&) = delete;

 private:
  Callback before_;
};
// For what would wait for the caller: throws where this thread is in such a callback.
void refuse_in(Callback kind, const char* what);

}  // namespace memferry::capi
