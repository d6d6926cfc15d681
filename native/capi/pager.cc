#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "capi/handles.h"
#include "fault/arrival_map.h"
#include "fault/discard.h"
#include "fault/huge_memory.h"
#include "fault/pager.h"
#include "os/address.h"

using memferry::Address;
using memferry::ArrivalMap;
using memferry::PageNumber;
using memferry::Pager;
using memferry::PageRun;
using memferry::Region;
using memferry::RegionGone;
using memferry::capi::Callback;
using memferry::capi::guarded;
using memferry::capi::required;

struct memferry_pager {
  explicit memferry_pager(const memferry_pager_options& options)
      : regions(memferry::capi::regions_of(options.regions, options.region_count)) {
    std::vector<ArrivalMap*> all;
    // Until every region's retire() can stop the pager it waits for this constructor.
    std::vector<std::unique_ptr<memferry::RegionUse>> uses;
    memferry::HugeMemory::check(regions);  // before anything is dropped
    for (const auto& region : regions) {
      uses.push_back(std::make_unique<memferry::RegionUse>(region, "page"));
      arrivals.push_back(std::make_unique<memferry::RegionArrival>(region));
      maps.push_back(std::make_unique<ArrivalMap>(region, true, false));
      all.push_back(maps.back().get());
      drop(*maps.back());
    }
    pager = std::make_unique<Pager>(all, [options](const std::string& code, const std::string& message) {
      if (!options.on_broken) return;
      const memferry::capi::InCallback here(Callback::kEngine);
      memferry_error why{};
      why.size = sizeof why;
      memferry::capi::write_error(&why, memferry::control::engine_cause(code, message));
      options.on_broken(options.context, &why);
    });
    pager->set_router([options](const Pager::Asked& asked) {
      const memferry::capi::InCallback here(Callback::kEngine);
      options.on_fault(options.context, asked.region, asked.run.first.value, asked.run.count);
      return Pager::Route::kSent;
    });
    pager->serve();
    for (const auto& region : regions) {
      users.push_back(region->enlist([this] { end(); }));
      if (!users.back()) {
        end();
        throw RegionGone("page");
      }
    }
  }
  ~memferry_pager() {
    try {
      users.clear();
      end();
    } catch (...) {
      // Nobody is left to tell; what was not let go of waits with the owner's userfaultfd, and never reads as zeros.
    }
  }
  memferry_pager(const memferry_pager&) = delete;
  memferry_pager& operator=(const memferry_pager&) = delete;

  // Half of a huge page cannot be dropped, and one that forms later would populate what is missing.
  static void drop(const ArrivalMap& map) {
    memferry::Discarder discarder(memferry::backing_of(map.region()));
    map.for_each_part({PageNumber{0}, map.pages()}, [&](std::span<std::byte> part, PageNumber) {
      ::madvise(part.data(), part.size(), MADV_NOHUGEPAGE);
      discarder.add(Address::of(part.data()), part.size());
    });
    discarder.flush();
  }

  [[nodiscard]] std::uint64_t missing() const {
    std::uint64_t pages = 0;
    for (const auto& map : maps) pages += map->missing();
    return pages;
  }

  // Whoever comes second waits until the first is done. With no lock held that an install() from on_fault() could wait
  // for: the pager's thread is joined.
  void end() {
    const std::lock_guard only(end_mutex);
    {
      const std::unique_lock lock(mutex);
      if (ended) return;
      ended = true;
    }
    if (missing() == 0 && !any_lost) {
      try {
        return pager->finish();
      } catch (const memferry::SystemError&) {
        // What stays registered is let go of by stop(): nothing is missing.
      }
    }
    pager->poison_missing();
    pager->stop();
  }

  PageRun run_of(std::uint32_t region, std::uint64_t first, std::uint64_t count) const {
    if (region >= maps.size()) throw std::invalid_argument("region: there is none of this number");
    const std::uint64_t pages = maps[region]->pages();
    if (first >= pages || count > pages - first) throw std::invalid_argument("pages outside of the region");
    return {PageNumber{first}, count};
  }

  std::vector<std::shared_ptr<Region>> regions;
  std::vector<std::unique_ptr<memferry::RegionArrival>> arrivals;
  std::vector<std::unique_ptr<ArrivalMap>> maps;
  std::unique_ptr<Pager> pager;
  std::mutex end_mutex;
  std::shared_mutex mutex;  // shared by what touches the memory, which end() waits for; guards ended
  bool ended = false;
  std::atomic<bool> any_lost{false};
  std::vector<std::unique_ptr<Region::User>> users;
};

extern "C" {

int memferry_pager_create(const memferry_pager_options* options, memferry_pager** pager,
                          memferry_error* error) {
  return guarded(error, [&] {
    required(pager, "pager") = nullptr;
    const memferry_pager_options given = memferry::capi::read_sized(options, "options");
    if (!given.on_fault) throw std::invalid_argument("on_fault: NULL");
    *pager = std::make_unique<memferry_pager>(given).release();
  });
}

int memferry_pager_install(memferry_pager* pager, uint32_t region, uint64_t first, uint64_t count,
                           const void* bytes, memferry_error* error) {
  return guarded(error, [&] {
    memferry_pager& of = required(pager, "pager");
    const PageRun run = of.run_of(region, first, count);
    const std::shared_lock lock(of.mutex);
    if (of.ended) throw RegionGone("install");
    const Pager::Installed done = bytes ? of.pager->install(region, run, static_cast<const std::byte*>(bytes))
                                        : of.pager->install_zeros(region, run);
    if (!done.intact) throw RegionGone("install: the memory is not what it should be");
  });
}

int memferry_pager_lose(memferry_pager* pager, uint32_t region, uint64_t first, uint64_t count,
                        memferry_error* error) {
  return guarded(error, [&] {
    memferry_pager& of = required(pager, "pager");
    const PageRun run = of.run_of(region, first, count);
    const std::shared_lock lock(of.mutex);
    if (of.ended) throw RegionGone("lose");
    if (!of.pager->give_up(region, run).empty()) of.any_lost = true;
    of.pager->poison_lost();
  });
}

int memferry_pager_ask_again(memferry_pager* pager, memferry_error* error) {
  return guarded(error, [&] { required(pager, "pager").pager->ask_again(true); });
}

uint64_t memferry_pager_missing(const memferry_pager* pager) { return pager ? pager->missing() : 0; }

int memferry_pager_close(memferry_pager* pager, memferry_error* error) {
  return guarded(error, [&] {
    memferry::capi::refuse_in(Callback::kEngine, "memferry_pager_close()");
    delete pager;
  });
}

}  // extern "C"
