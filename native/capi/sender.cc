#include <algorithm>
#include <atomic>
#include <string>
#include <string_view>

#include "capi/events.h"
#include "capi/handles.h"
#include "capi/leaving.h"
#include "capi/session.h"
#include "transfer/sender.h"

using memferry::Region;
using memferry::Sender;
using memferry::SenderConfig;
using memferry::SenderStats;
using memferry::capi::Callback;
using memferry::capi::Events;
using memferry::capi::guarded;
using memferry::capi::milliseconds_or;
using memferry::capi::required;

struct memferry_sender {
  std::unique_ptr<memferry::capi::Claims> claims;
  std::shared_ptr<Events> events;
  std::unique_ptr<Sender> sender;
};

namespace {

SenderConfig config_of(const memferry_sender_options& options) {
  SenderConfig config;
  config.regions = memferry::capi::regions_of(options.regions, options.region_count);
  for (std::size_t i = 0; i < options.region_count; ++i) {
    const memferry_tracker* tracker = options.trackers ? options.trackers[i] : nullptr;
    if (tracker && tracker->region != config.regions[i])
      throw std::invalid_argument("trackers: one of another region");
    config.trackers.push_back(tracker ? tracker->tracker : nullptr);
  }
  config.host = &required(options.host, "host");
  if (options.port == 0) throw std::invalid_argument("port: 0");
  config.port = options.port;
  memferry::capi::apply(options.session, config.migration, config.channels, config.tokens);
  config.bandwidth = options.bandwidth;
  config.compress = memferry::capi::compress_of(options.compress);
  if (config.compress != memferry::wire::Compress::kOff)
    config.destination_encodings = memferry::wire::kCompressions;
  config.connect_timeout = milliseconds_or(options.connect_timeout_ms, 5000);
  config.recover_timeout = milliseconds_or(options.recover_timeout_ms, 60000);
  return config;
}

memferry_sender_stats stats_of(const SenderStats& stats) {
  memferry_sender_stats out{};
  out.bytes_on_wire = stats.bytes_on_wire;
  out.pages_sent = stats.pages_sent;
  out.pages_zero = stats.pages_zero;
  out.pages_resent = stats.pages_resent;
  out.pages_pending = stats.pages_pending;
  out.faults_served = stats.faults_served;
  out.redials = stats.redials;
  out.extra_memory_bytes = stats.extra_memory_bytes;
  return out;
}

}  // namespace

extern "C" {

int memferry_sender_create(const memferry_sender_options* options, memferry_sender** sender,
                           memferry_error* error) {
  return guarded(error, [&] {
    required(sender, "sender") = nullptr;
    const memferry_sender_options given = memferry::capi::read_sized(options, "options");
    SenderConfig config = config_of(given);
    auto made = std::make_unique<memferry_sender>();
    made->claims = std::make_unique<memferry::capi::Claims>(config.regions);
    made->events = std::make_shared<Events>(given.on_event, given.context);
    config.on_event = Events::callback_of(made->events);
    made->sender = std::make_unique<Sender>(std::move(config));
    *sender = made.release();
  });
}

int memferry_sender_connect(memferry_sender* sender, memferry_error* error) {
  return guarded(error, [&] { required(sender, "sender").sender->connect(); });
}

int memferry_sender_queue_populated(memferry_sender* sender, memferry_error* error) {
  return guarded(error, [&] { required(sender, "sender").sender->queue_populated(); });
}

int memferry_sender_queue_dirty(memferry_sender* sender, uint64_t* pages_pending, memferry_error* error) {
  return guarded(error, [&] {
    const std::uint64_t pages = required(sender, "sender").sender->queue_dirty();
    if (pages_pending) *pages_pending = pages;
  });
}

int memferry_sender_start_round(memferry_sender* sender, uint64_t tag, memferry_error* error) {
  return guarded(error, [&] { required(sender, "sender").sender->start_round(tag); });
}

int memferry_sender_discard_dirty(memferry_sender* sender, uint64_t tag, memferry_error* error) {
  return guarded(error, [&] { required(sender, "sender").sender->discard_dirty(tag); });
}

int memferry_sender_switch_over(memferry_sender* sender, memferry_error* error) {
  return guarded(error, [&] { required(sender, "sender").sender->switch_over(); });
}

int memferry_sender_start_push(memferry_sender* sender, memferry_error* error) {
  return guarded(error, [&] { required(sender, "sender").sender->start_push(); });
}

int memferry_sender_digest(memferry_sender* sender, uint32_t region, uint8_t digest[16],
                           memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::write_digest(digest, required(sender, "sender").sender->digest(region));
  });
}

int memferry_sender_set_bandwidth(memferry_sender* sender, uint64_t bandwidth, memferry_error* error) {
  return guarded(error, [&] { required(sender, "sender").sender->set_bandwidth(bandwidth); });
}

int memferry_sender_get_stats(memferry_sender* sender, struct memferry_sender_stats* stats,
                              memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::write_sized(stats, stats_of(required(sender, "sender").sender->stats()), "stats");
  });
}

int memferry_sender_wait(memferry_sender* sender, int kind, uint64_t tag, int64_t timeout_ms,
                         memferry_error* error) {
  return guarded(error, [&] { required(sender, "sender").events->wait(kind, tag, timeout_ms); });
}

int memferry_sender_close(memferry_sender* sender, int goodbye, memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::refuse_in(Callback::kEngine, "memferry_sender_close()");
    if (!sender) return;
    const std::unique_ptr<memferry_sender> owned(sender);
    owned->sender->close(goodbye != 0);
  });
}

}  // extern "C"
