#include <algorithm>
#include <string>
#include <string_view>

#include "capi/events.h"
#include "capi/handles.h"
#include "capi/session.h"
#include "control/crypto.h"
#include "transfer/listener.h"
#include "transfer/receiver.h"

using memferry::Listener;
using memferry::Receiver;
using memferry::ReceiverConfig;
using memferry::capi::Callback;
using memferry::capi::Events;
using memferry::capi::guarded;
using memferry::capi::required;

struct memferry_receiver {
  std::shared_ptr<Events> events;
  std::shared_ptr<Receiver> receiver;
};

struct memferry_listener {
  std::unique_ptr<Listener> listener;
};

namespace memferry::capi {

void apply(const memferry_session& session, wire::MigrationId& migration, unsigned& channels,
           std::vector<wire::Token>& tokens) {
  constexpr std::uint32_t kDefaultChannels = 2;
  constexpr std::uint32_t kMostChannels = 16;
  const bool keyed = std::ranges::any_of(session.key, [](std::uint8_t byte) { return byte != 0; });
  const bool named = std::ranges::any_of(session.migration, [](std::uint8_t byte) { return byte != 0; });
  if (!keyed || !named) throw std::invalid_argument("session: no key or no migration: fill in random bytes");
  if (session.channels > kMostChannels) throw std::invalid_argument("session: 1 to 16 channels");
  channels = session.channels == 0 ? kDefaultChannels : session.channels;
  std::ranges::copy(session.migration, migration.begin());
  control::Key key{};
  std::ranges::copy(session.key, key.begin());
  tokens = control::data_tokens(key, migration, channels);
}

memferry_receiver_stats stats_of(const ReceiverStats& stats) {
  memferry_receiver_stats out{};
  out.size = sizeof out;
  out.bytes_received = stats.bytes_received;
  out.pages_received = stats.pages_received;
  out.pages_zero = stats.pages_zero;
  out.pages_missing = stats.pages_missing;
  out.remote_faults = stats.faults.count;
  out.remote_fault_p50_us = stats.faults.p50_us;
  out.remote_fault_p99_us = stats.faults.p99_us;
  out.remote_fault_max_us = stats.faults.max_us;
  out.extra_memory_bytes = stats.extra_memory_bytes;
  out.pages_gathered = stats.pages_gathered;
  return out;
}

void write_stats(memferry_receiver_stats* to, const ReceiverStats& stats) {
  write_sized(to, stats_of(stats), "stats");
}

}  // namespace memferry::capi

namespace {

std::uint16_t encodings_of(const char* names) {
  std::uint16_t flags = 0;
  std::string_view rest = names ? names : "";
  while (!rest.empty()) {
    const std::string_view name = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), name.size() + 1));
    if (name == "lz4") {
      flags |= memferry::wire::kFlagLz4;
    } else if (name == "zstd") {
      flags |= memferry::wire::kFlagZstd;
    } else {
      throw std::invalid_argument("encodings: lz4, zstd, with a comma between them");
    }
  }
  return flags;
}

}  // namespace

extern "C" {

int memferry_receiver_create(const memferry_receiver_options* options, memferry_receiver** receiver,
                             memferry_error* error) {
  return guarded(error, [&] {
    required(receiver, "receiver") = nullptr;
    const memferry_receiver_options given = memferry::capi::read_sized(options, "options");
    ReceiverConfig config;
    config.regions = memferry::capi::regions_of(given.regions, given.region_count);
    memferry::capi::apply(given.session, config.migration, config.channels, config.tokens);
    config.may_page = given.may_page != 0;
    config.keep_page_hashes = given.keep_digests != 0;
    config.encodings = encodings_of(given.encodings);
    config.bandwidth = given.bandwidth;
    config.recover_timeout = memferry::capi::milliseconds_or(given.recover_timeout_ms, 60000);
    auto made = std::make_unique<memferry_receiver>();
    made->events = std::make_shared<Events>(given.on_event, given.context);
    config.on_event = Events::callback_of(made->events);
    made->receiver = Receiver::create(std::move(config));
    *receiver = made.release();
  });
}

int memferry_receiver_seal(memferry_receiver* receiver, int* ready, memferry_error* error) {
  return guarded(error, [&] {
    int& out = required(ready, "ready");
    out = required(receiver, "receiver").receiver->seal() ? 1 : 0;
  });
}

int memferry_receiver_digest(memferry_receiver* receiver, uint32_t region, uint8_t digest[16],
                             memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::write_digest(digest, required(receiver, "receiver").receiver->digest(region));
  });
}

int memferry_receiver_acknowledge_loss(memferry_receiver* receiver, memferry_error* error) {
  return guarded(error, [&] { required(receiver, "receiver").receiver->acknowledge_loss(); });
}

int memferry_receiver_get_stats(memferry_receiver* receiver, struct memferry_receiver_stats* stats,
                                memferry_error* error) {
  return guarded(
      error, [&] { memferry::capi::write_stats(stats, required(receiver, "receiver").receiver->stats()); });
}

int memferry_receiver_wait(memferry_receiver* receiver, int kind, int64_t timeout_ms, memferry_error* error) {
  return guarded(error, [&] { required(receiver, "receiver").events->wait(kind, 0, timeout_ms); });
}

int memferry_receiver_close(memferry_receiver* receiver, memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::refuse_in(Callback::kEngine, "memferry_receiver_close()");
    if (!receiver) return;
    const std::unique_ptr<memferry_receiver> owned(receiver);
    owned->receiver->close();
  });
}

int memferry_listener_create(const char* host, uint16_t port, memferry_listener** listener,
                             memferry_error* error) {
  return guarded(error, [&] {
    required(listener, "listener") = nullptr;
    Listener::Config config;
    config.host = &required(host, "host");
    config.port = port;
    auto made = std::make_unique<memferry_listener>();
    made->listener = std::make_unique<Listener>(std::move(config));
    *listener = made.release();
  });
}

uint16_t memferry_listener_port(const memferry_listener* listener) {
  return listener ? listener->listener->port() : uint16_t{0};
}

int memferry_listener_add(memferry_listener* listener, memferry_receiver* receiver, memferry_error* error) {
  return guarded(
      error, [&] { required(listener, "listener").listener->add(required(receiver, "receiver").receiver); });
}

int memferry_listener_remove(memferry_listener* listener, memferry_receiver* receiver,
                             memferry_error* error) {
  return guarded(error, [&] {
    required(listener, "listener").listener->remove(required(receiver, "receiver").receiver->migration());
  });
}

int memferry_listener_close(memferry_listener* listener, memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::refuse_in(Callback::kEngine, "memferry_listener_close()");
    if (!listener) return;
    const std::unique_ptr<memferry_listener> owned(listener);
    owned->listener->close();
  });
}

}  // extern "C"
