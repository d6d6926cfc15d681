// What a sender is made of: its configuration checked, what its connections share, the scatter where there are servers.
#include <sys/eventfd.h>

#include <algorithm>
#include <stdexcept>

#include "os/mapping.h"
#include "os/sys_error.h"
#include "transfer/sender_impl.h"

namespace memferry {
namespace {

constexpr unsigned kMostChannels = 16;

SenderConfig checked(SenderConfig config) {
  if (config.regions.empty()) throw std::invalid_argument("no regions");
  if (config.servers.size() > wire::Holders::kMostServers) throw std::invalid_argument("too many servers");
  if (config.servers.empty() && !config.direct)
    throw std::invalid_argument("neither a destination nor servers");
  if (config.replicas < 1 || config.replicas > 2) throw std::invalid_argument("replicas: 1 or 2");
  for (const auto& region : config.regions) {
    if (!region) throw std::invalid_argument("a region is missing");
    if (region->page_size() != system_page_size())
      throw std::invalid_argument(
          "a region that moves has pages of the system's size; larger ones are split by it");
  }
  config.trackers.resize(std::max(config.trackers.size(), config.regions.size()));
  if (config.trackers.size() != config.regions.size())
    throw std::invalid_argument("more trackers than regions");
  if (config.channels < 1 || config.channels > kMostChannels)
    throw std::invalid_argument("channels: 1 to 16");
  if (config.tokens.empty() || config.tokens.size() % (config.channels + 1) != 0) {
    throw std::invalid_argument("tokens: one for each channel and the demand channel, epoch by epoch");
  }
  config.base_pages.resize(config.regions.size());
  if (config.told_pages.size() > config.regions.size())
    throw std::invalid_argument("more lengths than regions");
  for (std::size_t i = 0; i < config.base_pages.size(); ++i) {
    if (config.base_pages[i] > config.regions[i]->pages()) config.base_pages[i] = 0;  // of some other region
    // What is written after its page was compared must be known.
    if (config.base_pages[i] > 0 && !config.trackers[i])
      throw std::invalid_argument("a base without a tracker");
  }
  if (!config.on_event) throw std::invalid_argument("no event callback");
  return config;
}

std::unique_ptr<DeltaCache> make_delta_cache(const SenderConfig& config, std::uint64_t page_size) {
  const auto encodings = static_cast<std::uint16_t>(
      config.destination_encodings | (config.servers.empty() ? std::uint16_t{0} : config.server_encodings));
  const bool agreed = (encodings & wire::kFlagDelta) != 0;
  if (config.delta_cache_bytes == 0 || !agreed) return nullptr;
  // No more than the guest may ever fill, with something over for regions that share sets.
  std::uint64_t most = 0;
  for (const auto& region : config.regions) most += 2 * region->capacity_pages() * page_size;
  return std::make_unique<DeltaCache>(std::min(config.delta_cache_bytes, most), page_size);
}

int make_eventfd() {
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) throw_errno("eventfd");
  return fd;
}

}  // namespace

Sender::Impl::Impl(SenderConfig c)
    : config(checked(std::move(c))),
      address(wire::SocketAddress::parse(config.host, config.port)),
      queue(config.regions),
      page_size(config.regions.front()->page_size()),
      delta_cache(make_delta_cache(config, page_size)),
      encoding{config.compress,  config.destination_encodings, config.server_encodings, &compression, &deltas,
               delta_cache.get()},
      references(config.references && config.servers.empty()
                     ? std::make_unique<References>(*config.references, queue)
                     : nullptr),
      cancel(make_eventfd()),
      scatter(make_scatter()) {
  pacer.set_bandwidth(config.bandwidth);
  for (std::uint32_t region = 0; region < config.told_pages.size(); ++region)
    queue.set_room(region, config.told_pages[region]);
  std::uint64_t bitmap_bytes = queue.memory_bytes();
  for (const auto& region : config.regions) {
    suspects.push_back(std::make_unique<AtomicBitmap>(region->capacity_pages()));
    bitmap_bytes += suspects.back()->words() * sizeof(std::uint64_t);
  }
  if (delta_cache) bitmap_bytes += delta_cache->memory_bytes();
  if (references) bitmap_bytes += references->memory_bytes();
  note_memory(bitmap_bytes);
  if (std::any_of(config.base_pages.begin(), config.base_pages.end(), [](auto pages) { return pages > 0; })) {
    comparison = std::make_unique<BaseComparison>(config.regions, config.base_pages, config.base_key,
                                                  config.answer_timeout);
  }
  try {
    for (const auto& region : config.regions) {
      auto user = region->enlist([this] { region_gone(); });
      if (!user) throw RegionGone("Sender");
      users.push_back(std::move(user));
    }
    supervisor.start("mf-source", [this](WorkerThread&) { supervise(); });
  } catch (...) {
    users.clear();  // while everything that region_gone() needs is still there
    throw;
  }
}

Sender::Impl::~Impl() = default;

std::unique_ptr<Scatter> Sender::Impl::make_scatter() {
  if (config.servers.empty()) return nullptr;
  ScatterConfig ours;
  ours.servers = config.servers;
  ours.replicas = config.replicas;
  ours.connect_timeout = config.connect_timeout;
  ours.stall_timeout = config.stall_timeout;
  ours.answer_timeout = config.answer_timeout;
  ours.release_as_evicted = config.release_as_evicted;
  ours.direct = config.direct;
  ours.encoding = encoding;
  ours.dedup = config.dedup;
  ours.directory_dial_timeout = config.directory_dial_timeout;
  ours.directory_patience = config.directory_patience;
  return std::make_unique<Scatter>(
      std::move(ours),
      Scatter::Shared{config.migration, queue, gate, pacer, cancel.get(),
                      [this](const PageFrames::Sent& sent) { count_sent(sent); },
                      [this](std::uint64_t bytes) { bytes_on_wire += bytes; }, [this] { scatter_drained(); },
                      [this](const std::string& code, const std::string& why) {
                        const std::lock_guard lock(mutex);
                        if (!fatal) fatal = Failure{code, why};
                        supervisor_changed.notify_all();
                      }},
      page_size);
}

}  // namespace memferry
