#include "control/destination.h"

#include <algorithm>
#include <array>
#include <string>
#include <utility>
#include <vector>

#include "capi/handles.h"
#include "capi/secret.h"
#include "wire/socket.h"

using memferry::RegionRun;
using memferry::capi::Callback;
using memferry::capi::failure_of;
using memferry::capi::guarded;
using memferry::capi::InCallback;
using memferry::capi::required;
using memferry::capi::write_error;
using memferry::control::Arrival;
using memferry::control::ArrivalReport;
using memferry::control::ArrivingGuest;
using memferry::control::ByteSpan;
using memferry::control::Cause;
using memferry::control::Destination;
using memferry::control::DestinationOptions;
using memferry::control::Failure;
using memferry::control::Offer;

struct memferry_arrival {
  Arrival* arrival;
};

struct memferry_destination {
  std::unique_ptr<Destination> destination;
};

namespace {

memferry_error blank() {
  memferry_error error{};
  error.size = sizeof error;
  return error;
}

memferry_error error_of(const Cause& cause) {
  memferry_error error = blank();
  write_error(&error, cause);
  return error;
}

// An embedder's guest: every call is one of his callbacks.
class CGuest : public ArrivingGuest {
 public:
  CGuest(const memferry_destination_callbacks& callbacks, Arrival& arrival)
      : callbacks_(callbacks), handle_{&arrival} {}

  // Throws Failure: he declines.
  void accept(void* context, const Offer& offer) {
    std::vector<memferry_offered_region> regions;
    for (const auto& region : offer.guest.regions)
      regions.push_back({region.name.c_str(), region.length_bytes, region.capacity_bytes, region.page_size});
    memferry_offer told{};
    told.size = sizeof told;
    told.migration = offer.id.c_str();
    told.mode = offer.mode.c_str();
    told.guest = offer.guest.name.c_str();
    told.module = offer.guest.module ? offer.guest.module->name.c_str() : nullptr;
    told.module_sha256 = offer.guest.module ? offer.guest.module->sha256.c_str() : nullptr;
    told.description = offer.guest.description.c_str();
    told.regions = regions.data();
    told.region_count = regions.size();
    memferry_acceptance answer{};
    answer.size = sizeof answer;
    memferry_error why = blank();
    const InCallback here(Callback::kArrival);
    if (const int code = callbacks_.accept(context, &handle_, &told, &answer, &why); code != MEMFERRY_OK)
      throw failure_of(code, why, "the destination does not want the guest");
    // From here on he is told of the end.
    guest_ = answer.guest;
    accepted_ = true;
    try {
      if (offer.guest.module && answer.accepts_module == 0)
        throw Failure("MODULE_REFUSED", "module '" + offer.guest.module->name + "' is not run here");
      regions_ = memferry::capi::regions_of(answer.regions, answer.region_count);
    } catch (...) {
      // Nobody else knows of the guest yet.
      abandon(memferry::control::cause_of_current("PREPARE_FAILED"));
      ended();
      throw;
    }
  }

  [[nodiscard]] const std::vector<std::shared_ptr<memferry::Region>>& regions() const override {
    return regions_;
  }

  void grow(std::uint32_t region, std::uint64_t length_bytes) override {
    if (!callbacks_.grow) throw Failure("LIMIT_EXCEEDED", "this guest cannot grow at the destination");
    memferry_error why = blank();
    const InCallback here(Callback::kArrival);
    if (const int code = callbacks_.grow(guest_, &handle_, region, length_bytes, &why); code != MEMFERRY_OK)
      throw failure_of(code, why, "the guest cannot grow at the destination");
    memferry::Region& grown = *regions_[region];
    if (grown.bytes() < length_bytes) grown.grow(length_bytes / grown.page_size());
  }

  void prepare(ByteSpan state) override {
    memferry_error why = blank();
    const InCallback here(Callback::kArrival);
    const int code = callbacks_.prepare(guest_, &handle_, state.data(), state.size(), &why);
    if (code != MEMFERRY_OK) throw failure_of(code, why, "the guest cannot run at the destination");
  }

  void resume() noexcept override {
    const InCallback here(Callback::kArrival);
    callbacks_.resume(guest_, &handle_);
  }

  void abandon(const Cause& cause) noexcept override {
    const InCallback here(Callback::kArrival);
    const memferry_error why = error_of(cause);
    callbacks_.abandon(guest_, &handle_, &why);
  }

  void lost(const std::vector<RegionRun>& runs, const std::string& text) noexcept override {
    if (!callbacks_.lost) return;
    const InCallback here(Callback::kArrival);
    memferry_error why = blank();
    write_error(&why, MEMFERRY_PAGES_LOST, 0, text.c_str());
    // A few at a time: no memory is needed for what must be told.
    constexpr std::size_t kAtOnce = 64;
    std::array<memferry_run, kAtOnce> some;
    for (std::size_t from = 0; from < runs.size(); from += kAtOnce) {
      std::size_t count = 0;
      for (; count < kAtOnce && from + count < runs.size(); ++count) {
        const RegionRun& run = runs[from + count];
        some[count] = {run.region, 0, run.run.first.value, run.run.count};
      }
      callbacks_.lost(guest_, &handle_, some.data(), count, &why);
    }
  }

  void complete(const ArrivalReport& report) noexcept override {
    if (!callbacks_.complete) return;
    const InCallback here(Callback::kArrival);
    memferry_arrival_report told{};
    told.size = sizeof told;
    told.migration = report.migration.c_str();
    told.guest = report.guest.c_str();
    told.heap_bytes = report.heap_bytes;
    told.verified = report.verified ? 1 : 0;
    told.prepare_ms = report.prepare_ms;
    told.gather_ms = report.gather_ms;
    told.stats = memferry::capi::stats_of(report.stats);
    callbacks_.complete(guest_, &handle_, &told);
  }

  void failed(const Cause& cause) noexcept override {
    if (!callbacks_.failed) return;
    const InCallback here(Callback::kArrival);
    const memferry_error why = error_of(cause);
    callbacks_.failed(guest_, &handle_, &why);
  }

  void ended() noexcept override {
    if (!callbacks_.ended || !accepted_) return;
    const InCallback here(Callback::kArrival);
    callbacks_.ended(guest_, &handle_);
  }

 private:
  const memferry_destination_callbacks callbacks_;
  memferry_arrival handle_;
  void* guest_ = nullptr;
  bool accepted_ = false;
  std::vector<std::shared_ptr<memferry::Region>> regions_;
};

memferry_destination_callbacks callbacks_of(const memferry_destination_options& options) {
  const auto callbacks = memferry::capi::read_sized(options.callbacks, "callbacks");
  if (!callbacks.accept || !callbacks.prepare || !callbacks.resume || !callbacks.abandon)
    throw std::invalid_argument("callbacks: accept, prepare, resume and abandon must be given");
  return callbacks;
}

DestinationOptions options_of(const memferry_destination_options& given, const std::string& host) {
  using memferry::capi::milliseconds_or;
  DestinationOptions options;
  options.secret = memferry::capi::secret_of(given.secret, given.secret_bytes, given.secret_file);
  memferry::capi::check_address(host, given.port, given.plaintext != 0);
  if (given.max_bytes != 0) options.max_bytes = given.max_bytes;
  if (given.max_state_bytes != 0)
    options.max_state_bytes = std::min<std::uint64_t>(given.max_state_bytes, UINT32_MAX);
  if (given.max_migrations != 0) options.max_migrations = given.max_migrations;
  options.bandwidth = given.bandwidth;
  options.gather_limit = given.gather_limit;
  options.plaintext = given.plaintext != 0;
  options.connect_timeout = milliseconds_or(given.connect_timeout_ms, 5000);
  options.prepare_timeout = milliseconds_or(given.prepare_timeout_ms, 10000);
  options.grant_timeout = milliseconds_or(given.grant_timeout_ms, 20000);
  options.recover_timeout = milliseconds_or(given.recover_timeout_ms, 60000);
  options.peer_timeout = milliseconds_or(given.peer_timeout_ms, 10000);
  return options;
}

}  // namespace

extern "C" {

int memferry_destination_create(const memferry_destination_options* options,
                                memferry_destination** destination, memferry_error* error) {
  return guarded(error, [&] {
    required(destination, "destination") = nullptr;
    const memferry_destination_options given = memferry::capi::read_sized(options, "options");
    const memferry_destination_callbacks callbacks = callbacks_of(given);
    const std::string host = given.host ? given.host : "127.0.0.1";
    auto made = std::make_unique<memferry_destination>();
    made->destination = std::make_unique<Destination>(
        host, given.port, options_of(given, host),
        [callbacks, context = given.context](Arrival& arrival, const Offer& offer) {
          auto guest = std::make_unique<CGuest>(callbacks, arrival);
          guest->accept(context, offer);
          return guest;
        });
    *destination = made.release();
  });
}

uint16_t memferry_destination_port(const memferry_destination* destination) {
  return destination ? destination->destination->port() : uint16_t{0};
}

int memferry_destination_close(memferry_destination* destination, memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::refuse_in(Callback::kArrival, "memferry_destination_close()");
    if (!destination) return;
    const std::unique_ptr<memferry_destination> owned(destination);
    owned->destination->close();
  });
}

int memferry_arrival_cancelled(const memferry_arrival* arrival) {
  return arrival && arrival->arrival->cancelled() ? 1 : 0;
}

int memferry_arrival_get_stats(const memferry_arrival* arrival, memferry_receiver_stats* stats,
                               memferry_error* error) {
  return guarded(error,
                 [&] { memferry::capi::write_stats(stats, required(arrival, "arrival").arrival->stats()); });
}

int memferry_arrival_close(memferry_arrival* arrival, memferry_error* error) {
  return guarded(error, [&] { required(arrival, "arrival").arrival->close(); });
}

}  // extern "C"
