#include <algorithm>
#include <array>
#include <new>
#include <string_view>
#include <system_error>

#include "capi/guarded.h"
#include "control/text.h"
#include "os/sys_error.h"
#include "page/region.h"

namespace memferry::capi {

namespace {

// By number.
constexpr std::array<const char*, 33> kNames = {
    "OK",
    "INVALID_ARGUMENT",
    "NO_MEMORY",
    "SYSTEM",
    "WRONG_THREAD",
    "TIMEOUT",
    "REGION_UNALIGNED",
    "REGION_BUSY",
    "REGION_GONE",
    "TRACKER_UNAVAILABLE",
    "USERFAULTFD_UNAVAILABLE",
    "AUTH_FAILED",
    "PLAINTEXT_REQUIRED",
    "PROTOCOL_ERROR",
    "VERSION_MISMATCH",
    "CONNECT_FAILED",
    "CHANNEL_LOST",
    "PEER_LOST",
    "LIMIT_EXCEEDED",
    "CANCELLED",
    "PREPARE_FAILED",
    "PREPARE_TIMEOUT",
    "MODULE_REFUSED",
    "VERIFICATION_FAILED",
    "MIGRATION_IN_DOUBT",
    "GUEST_LOST",
    "PAGES_LOST",
    "VMD_CAPACITY",
    "VMD_LOST",
    "VMD_REFUSED",
    "GUEST_BUSY",
    "PAUSE_FAILED",
    "PAUSE_TIMEOUT",
};
static_assert(kNames.size() == MEMFERRY_PAUSE_TIMEOUT + 1);

thread_local Callback callback = Callback::kNone;

}  // namespace

int code_of(const std::string& name) noexcept {
  const auto* const found = std::ranges::find_if(kNames, [&](const char* known) { return name == known; });
  return found == kNames.end() ? MEMFERRY_SYSTEM : static_cast<int>(found - kNames.begin());
}

void write_error(memferry_error* error, int code, int system_error, const char* text) noexcept {
  if (!error || error->size <= sizeof error->size) return;
  memferry_error full{};
  full.size = error->size;
  full.code = code;
  full.system_error = system_error;
  // As long as it fits, whole characters only.
  std::size_t length = std::min(std::strlen(text), sizeof full.text - 1);
  while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xc0U) == 0x80U) --length;
  std::memcpy(full.text, text, length);
  std::memcpy(static_cast<void*>(error), &full, std::min(error->size, sizeof full));
  if (error->size < sizeof full && error->size > offsetof(memferry_error, text))
    error->text[error->size - offsetof(memferry_error, text) - 1] = '\0';
}

void write_error(memferry_error* error, const control::Cause& cause) noexcept {
  write_error(error, code_of(cause.code), 0, cause.message.c_str());
}

int write_current(memferry_error* error) noexcept {
  int code = MEMFERRY_SYSTEM;
  try {
    throw;
  } catch (const control::Failure& failure) {
    code = code_of(failure.code());
    write_error(error, code, 0, failure.what());
  } catch (const RegionGone& gone) {
    code = MEMFERRY_REGION_GONE;
    write_error(error, code, 0, gone.what());
  } catch (const SystemError& system) {
    code = system.error() == ENOMEM ? MEMFERRY_NO_MEMORY : MEMFERRY_SYSTEM;
    write_error(error, code, system.error(), system.what());
  } catch (const std::bad_alloc&) {
    code = MEMFERRY_NO_MEMORY;
    write_error(error, code, 0, "there is no memory left");
  } catch (const std::system_error& system) {
    write_error(error, code, system.code().value(), system.what());
  } catch (const std::logic_error& wrong) {  // invalid_argument, out_of_range
    code = MEMFERRY_INVALID_ARGUMENT;
    write_error(error, code, 0, wrong.what());
  } catch (const std::exception& other) {
    write_error(error, code, 0, other.what());
  } catch (...) {
    write_error(error, code, 0, "something that is no exception of the standard library was thrown");
  }
  return code;
}

control::Failure failure_of(int code, const memferry_error& why, const char* otherwise) {
  const std::string text(why.text, ::strnlen(why.text, sizeof why.text));
  return {memferry_code_name(code), text.empty() ? otherwise : text};
}

InCallback::InCallback(Callback kind) : before_(callback) { callback = kind; }
InCallback::~InCallback() { callback = before_; }

void refuse_in(Callback kind, const char* what) {
  if (callback == kind)
    throw control::Failure("WRONG_THREAD", std::string(what) + " from a callback of its own");
}

}  // namespace memferry::capi

extern "C" {

uint32_t memferry_version(void) { return MEMFERRY_VERSION; }

const char* memferry_code_name(int code) {
  const bool known = code >= 0 && static_cast<std::size_t>(code) < memferry::capi::kNames.size();
  return known ? memferry::capi::kNames[static_cast<std::size_t>(code)] : "UNKNOWN";
}

}  // extern "C"
