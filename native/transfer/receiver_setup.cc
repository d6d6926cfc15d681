// What a receiver has before the first connection: its maps, its pager or what touches memory ahead, its threads.
#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "os/mapping.h"
#include "os/pagemap.h"
#include "transfer/receiver_impl.h"

namespace memferry {

Receiver::Impl::Impl(ReceiverConfig config_in)
    : domain(std::move(config_in.known)), config(std::move(config_in)), page_size(system_page_size()) {
  if (config.regions.empty()) throw std::invalid_argument("a migration has at least one region");
  if (config.channels < 1 || config.channels > 16) throw std::invalid_argument("channels: 1 to 16");
  if (config.tokens.empty() || config.tokens.size() % (config.channels + 1) != 0) {
    throw std::invalid_argument("tokens: whole rows of one for each channel and the demand channel");
  }
  // start() enlists for good; until then a retire() waits for this constructor.
  std::vector<std::unique_ptr<RegionUse>> uses;
  const bool from_start = config.paging_from_start || config.sourceless;
  // What comes for private memory of another process waits here until a pager installs it.
  const bool remote = std::any_of(config.regions.begin(), config.regions.end(),
                                  [](const auto& region) { return region && region->remote(); });
  const bool may_page = config.may_page || from_start || remote;
  if (config.sourceless && config.servers.empty())
    throw std::invalid_argument("neither a source nor servers");
  intake.set_rate(config.bandwidth);
  for (const auto& region : config.regions) {
    if (!region) throw std::invalid_argument("a region is missing");
    if (region->page_size() != page_size)
      throw std::invalid_argument(
          "a region that moves has pages of the system's size; larger ones are split by it");
    uses.push_back(std::make_unique<RegionUse>(region, "receive"));
    arrivals.push_back(std::make_unique<RegionArrival>(region));
    if (region->remote()) take_remote(*region, maps.size());
    backings.push_back(backing_of(*region));
    const bool in_place = base_of(maps.size()) == ReceiverConfig::Base::kInPlace;
    maps.push_back(
        std::make_unique<ArrivalMap>(region, config.discard_first && !in_place, config.keep_page_hashes));
  }
  // Said before anything is dropped.
  if (may_page) HugeMemory::check(config.regions);
  if (!config.sourceless && !config.base_images.empty())
    throw std::invalid_argument("images to compare a parked guest with, and it is none");
  if (from_start && !config.bases.empty()) throw std::invalid_argument("a base for paging from the start");
  std::vector<ArrivalMap*> all;
  for (std::size_t i = 0; i < maps.size(); ++i) {
    ArrivalMap& map = *maps[i];
    all.push_back(&map);
    Discarder discarder(backings[i]);
    map.for_each_part({PageNumber{0}, map.pages()}, [&](std::span<std::byte> part, PageNumber) {
      // Half of a huge page cannot be dropped, and one that forms later would populate what is missing.
      // EINVAL: a kernel without huge pages.
      if (may_page) ::madvise(part.data(), part.size(), MADV_NOHUGEPAGE);
      // What is there is none of the guest's, and while paging present means arrived.
      const bool in_place = base_of(i) == ReceiverConfig::Base::kInPlace;
      if ((config.discard_first && !in_place) || from_start)
        discarder.add(Address::of(part.data()), part.size());
    });
    discarder.flush();
    if (from_start) map.present.clear_run({PageNumber{0}, map.pages()});
  }
  if (may_page) {
    pager = std::make_unique<Pager>(
        all, [this](std::string code, std::string message) { fail(std::move(code), std::move(message)); });
  } else {
    ahead = std::make_unique<TouchAhead>(all);
  }
  make_gather();
  take_bases();
  if (domain && !config.servers.empty()) throw std::invalid_argument("references of a scatter's own kind");
  if (from_start) {
    pager->serve();
    state = State::kPaging;
  }
  if (config.sourceless) {
    switched = true;
    source_left = true;
    source_sends = false;
    EngineEvent event{};
    event.kind = EngineEventKind::kSwitched;
    events.push_back(std::move(event));
  }
  for (unsigned i = 0; i <= config.channels; ++i) {
    auto channel = std::make_unique<Channel>();
    channel->index = i;
    channel->demand = i == config.channels;
    channel->filler = std::make_unique<Filler>(backings, ahead.get());
    channels.push_back(std::move(channel));
  }
  if (domain) known = domain->join(all);
}

// Another process's private memory: nothing can be dropped there from here, so nothing may be there.
void Receiver::Impl::take_remote(Region& region, std::size_t index) {
  if (base_of(index) != ReceiverConfig::Base::kNone)
    throw std::invalid_argument("a base for private memory of another process");
  std::uint64_t populated = 0;
  Pagemap pagemap(region.owner());
  for (const Extent& extent : region.extents()) {
    // The page of zeros too: who has only read there has a page that nothing is installed over.
    pagemap.populated_by_reading(extent.start, extent.bytes, [&](AddressRange range) {
      populated += range.end.value - range.start.value;
    });
  }
  if (populated > 0) {
    throw std::invalid_argument("private memory of another process must be fresh to receive: " +
                                std::to_string(populated >> 10U) + " KiB are populated there");
  }
  region.stage();
}

void Receiver::Impl::start() {
  for (const auto& channel : channels) {
    Channel& own = *channel;
    own.thread.start(own.demand ? "mf-demand" : "mf-recv-" + std::to_string(own.index),
                     [this, &own](WorkerThread&) { channel_main(own); });
  }
  if (gather) gather->start();
  supervisor.start("mf-receiver", [this](WorkerThread&) { supervise(); });
  // Last, since a retire() may call region_gone() at once; nobody touches the memory before a connection is
  // attached.
  std::vector<std::unique_ptr<Region::User>> enlisted;
  for (const auto& region : config.regions) {
    enlisted.push_back(region->enlist([this] { region_gone(); }));
    if (!enlisted.back()) throw std::invalid_argument("a region is gone already");
  }
  const std::lock_guard lock(mutex);
  users = std::move(enlisted);
}

}  // namespace memferry
