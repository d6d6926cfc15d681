#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "capi/handles.h"
#include "capi/leaving.h"
#include "capi/secret.h"
#include "control/parking.h"
#include "control/text.h"

using memferry::capi::guarded;
using memferry::capi::milliseconds_or;
using memferry::capi::required;
using memferry::control::OfferedGuest;
using memferry::control::Parking;
using memferry::control::ParkOptions;

struct memferry_park {
  std::unique_ptr<memferry::capi::Claims> claims;
  std::unique_ptr<Parking> parking;
};

namespace {

constexpr std::uint32_t kLeastStallMs = 2000;
constexpr std::uint32_t kLeastLeaseMs = 100;
constexpr std::uint32_t kMostLeaseMs = 3600000;
constexpr std::size_t kMostDescription = 65536;
constexpr std::size_t kDigestBytes = 32;
constexpr std::size_t kMostRegions = 64;

std::string label_of(const char* given, const char* what) {
  std::string text = &required(given, what);
  const std::size_t units = memferry::control::text_length(text);
  if (units < 1 || units > 64) throw std::invalid_argument(std::string(what) + ": 1 to 64 characters");
  return text;
}

std::string description_of(const char* given) {
  std::string text = given ? given : "null";
  if (text.size() > kMostDescription)
    throw std::invalid_argument("description: at most " + std::to_string(kMostDescription) + " bytes");
  try {
    (void)memferry::control::parse_json(text);
  } catch (const memferry::control::Failure& failure) {
    throw std::invalid_argument(std::string("description: ") + failure.what());
  }
  return text;
}

OfferedGuest guest_of(const memferry_park_options& given, const memferry_named_region* regions,
                      size_t count) {
  OfferedGuest guest;
  guest.name = label_of(given.guest, "guest");
  guest.description = description_of(given.description);
  if ((given.module != nullptr) != (given.module_sha256 != nullptr))
    throw std::invalid_argument("module, module_sha256: both of them, or none");
  if (given.module) {
    guest.module = {label_of(given.module, "module"), given.module_sha256};
    if (!memferry::control::is_hex(guest.module->sha256, kDigestBytes))
      throw std::invalid_argument("module_sha256: 64 hexadecimal digits, in lower case");
  }
  for (size_t i = 0; i < count; ++i) guest.regions.push_back({label_of(regions[i].name, "regions"), 0, 0, 0});
  return guest;
}

ParkOptions options_of(const memferry_park_options& given) {
  ParkOptions options;
  options.vmd.secret = memferry::capi::secret_of(given.secret, given.secret_bytes, given.secret_file);
  options.vmd.plaintext = given.plaintext != 0;
  options.vmd.connect_timeout = milliseconds_or(given.connect_timeout_ms, 5000);
  options.vmd.in_doubt_timeout = milliseconds_or(given.in_doubt_timeout_ms, 30000);
  options.vmd.answer_timeout = std::chrono::milliseconds(10000);
  if (given.max_state_bytes != 0)
    options.vmd.max_state_bytes = std::min<std::uint64_t>(given.max_state_bytes, UINT32_MAX);
  if (given.replicas > 2) throw std::invalid_argument("replicas: 1 or 2");
  options.replicas = std::max(given.replicas, 1U);
  options.stall_timeout = milliseconds_or(given.stall_timeout_ms, 3000);
  if (options.replicas == 2 && options.stall_timeout.count() < kLeastStallMs)
    throw std::invalid_argument("stall_timeout_ms: at least 2000 with replicas");
  options.ready_timeout = milliseconds_or(given.prepare_timeout_ms, 10000);
  options.lease = milliseconds_or(given.lease_ms, 60000);
  if (options.lease.count() < kLeastLeaseMs || options.lease.count() > kMostLeaseMs)
    throw std::invalid_argument("lease_ms: 100 to 3600000");
  options.bandwidth = given.bandwidth;
  options.compress = memferry::capi::compress_of(given.compress);
  if (given.server_count > memferry::control::StagedImage::kMostServers)
    throw std::invalid_argument("servers: 1 to 250");
  if (given.server_count > 0) (void)required(given.servers, "servers");
  for (size_t i = 0; i < given.server_count; ++i) {
    options.servers.push_back(memferry::control::parse_address(&required(given.servers[i], "servers")));
    const auto& [host, port] = options.servers.back();
    memferry::capi::check_address(host, port, options.vmd.plaintext);
  }
  return options;
}

}  // namespace

extern "C" {

int memferry_park_create(const memferry_park_options* options, const memferry_named_region* regions,
                         size_t count, const void* state, size_t state_bytes, memferry_park** park,
                         memferry_error* error) {
  return guarded(error, [&] {
    required(park, "park") = nullptr;
    const memferry_park_options given = memferry::capi::read_sized(options, "options");
    if (!state && state_bytes > 0) throw std::invalid_argument("state: NULL");
    if (!regions || count == 0 || count > kMostRegions) throw std::invalid_argument("regions: 1 to 64");
    std::vector<memferry_region*> handles;
    for (size_t i = 0; i < count; ++i) handles.push_back(regions[i].region);
    const auto memory = memferry::capi::regions_of(handles.data(), handles.size());
    ParkOptions wanted = options_of(given);
    wanted.guest = guest_of(given, regions, count);
    const auto* const bytes = static_cast<const std::uint8_t*>(state);
    auto made = std::make_unique<memferry_park>();
    made->claims = std::make_unique<memferry::capi::Claims>(memory);
    made->parking = std::make_unique<Parking>(std::move(wanted), memory,
                                              memferry::control::Bytes(bytes, bytes + state_bytes));
    *park = made.release();
  });
}

const char* memferry_park_ticket(const memferry_park* park) {
  return park ? park->parking->ticket().c_str() : "";
}

int memferry_park_evict(memferry_park* park, memferry_error* error) {
  const int code = guarded(error, [&] { required(park, "park").parking->evict(); });
  // Of any other failure it would mean that the guest is the caller's.
  if (code != MEMFERRY_NO_MEMORY || !park->parking->granted()) return code;
  memferry::capi::write_error(error, MEMFERRY_MIGRATION_IN_DOUBT, 0,
                              "the home server was granted the guest; there is no memory to find out more");
  return MEMFERRY_MIGRATION_IN_DOUBT;
}

int memferry_park_cancel(memferry_park* park, memferry_error* error) {
  return guarded(error, [&] { required(park, "park").parking->cancel(); });
}

int memferry_park_get_stats(memferry_park* park, memferry_park_stats* stats, memferry_error* error) {
  return guarded(error, [&] {
    const Parking::Stats now = required(park, "park").parking->stats();
    memferry_park_stats out{};
    out.bytes_on_wire = now.sender.bytes_on_wire;
    out.pages_sent = now.sender.pages_sent;
    out.pages_zero = now.sender.pages_zero;
    out.pages_resent = now.sender.pages_resent;
    out.pages_pending = now.sender.pages_pending;
    out.extra_memory_bytes = now.sender.extra_memory_bytes;
    out.eviction_ms = now.eviction_ms;
    out.servers = static_cast<std::uint32_t>(now.sender.servers.size());
    out.servers_failed = static_cast<std::uint32_t>(
        std::ranges::count_if(now.sender.servers, [](const auto& server) { return !server.failed.empty(); }));
    memferry::capi::write_sized(stats, out, "stats");
  });
}

int memferry_park_close(memferry_park* park, memferry_error* error) {
  return guarded(error, [&] { delete park; });
}

}  // extern "C"
