#include "control/failure.h"

#include <algorithm>
#include <array>
#include <new>
#include <string_view>

#include "os/sys_error.h"

namespace memferry::control {

namespace {

constexpr std::array<std::string_view, 35> kCodes = {
    "UNSUPPORTED_PLATFORM",
    "ADDON_MISSING",
    "TRACKER_UNAVAILABLE",
    "USERFAULTFD_UNAVAILABLE",
    "REGION_UNALIGNED",
    "REGION_CLOSED",
    "REGION_BUSY",
    "REGION_GONE",
    "NO_MEMORY",
    "SYSTEM",
    "GUEST_BUSY",
    "GUEST_UNMOVABLE",
    "PAUSE_FAILED",
    "PAUSE_TIMEOUT",
    "PREPARE_FAILED",
    "PREPARE_TIMEOUT",
    "MODULE_REFUSED",
    "AUTH_FAILED",
    "PLAINTEXT_REQUIRED",
    "PROTOCOL_ERROR",
    "VERSION_MISMATCH",
    "CONNECT_FAILED",
    "CHANNEL_LOST",
    "PEER_LOST",
    "LIMIT_EXCEEDED",
    "CANCELLED",
    "NOT_CONVERGED",
    "MIGRATION_IN_DOUBT",
    "VERIFICATION_FAILED",
    "GUEST_LOST",
    "PAGES_LOST",
    "VMD_CAPACITY",
    "VMD_LOST",
    "VMD_REFUSED",
    "INVALID_ARGUMENT",
};

}  // namespace

Cause cause_of_current(const char* otherwise) {
  try {
    throw;
  } catch (const Failure& failure) {
    return failure.cause();
  } catch (const std::bad_alloc&) {
    return {"NO_MEMORY", "there is no memory left"};
  } catch (const SystemError& error) {
    const bool memory = error.error() == ENOMEM;
    return {memory ? "NO_MEMORY" : otherwise, error.what()};
  } catch (const std::exception& error) {
    return {otherwise, error.what()};
  } catch (...) {
    return {otherwise, "something that is no exception of the standard library was thrown"};
  }
}

bool known_code(const std::string& code) { return std::ranges::find(kCodes, code) != kCodes.end(); }

Cause from_peer(std::string code, std::string message) {
  if (!known_code(code)) code = "PEER_LOST";
  return {std::move(code), std::move(message)};
}

Cause engine_cause(const std::string& code, std::string message) {
  if (code == "PROTOCOL" || code == "CHECKSUM" || code == "REFUSED")
    return {"PROTOCOL_ERROR", std::move(message)};
  if (code == "RECOVERY_TIMEOUT") return {"PEER_LOST", std::move(message)};
  return {known_code(code) ? code : "SYSTEM", std::move(message)};
}

}  // namespace memferry::control
