#include "bind/region_registry.h"

#include <sys/random.h>

#include <array>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "os/sys_error.h"

namespace memferry::bind {

namespace {

struct Registry {
  std::mutex mutex;  // guards `regions`
  std::unordered_map<std::string, std::weak_ptr<SharedRegion>> regions;
};

// Never destroyed: threads of workers may still let regions go while the process runs its exit handlers.
Registry& registry() {
  static auto* instance = new Registry();
  return *instance;
}

std::string random_id() {
  std::array<unsigned char, 16> bytes{};
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size()))
    throw_errno("getrandom");
  std::string id;
  id.reserve(bytes.size() * 2);
  for (const unsigned byte : bytes) {
    id.push_back("0123456789abcdef"[byte >> 4U]);
    id.push_back("0123456789abcdef"[byte & 0xfU]);
  }
  return id;
}

}  // namespace

std::shared_ptr<SharedRegion> SharedRegion::publish(std::shared_ptr<Region> region, bool own_memory) {
  std::shared_ptr<SharedRegion> shared(new SharedRegion(random_id(), std::move(region), own_memory));
  const std::lock_guard lock(registry().mutex);
  registry().regions[shared->id()] = shared;
  return shared;
}

std::shared_ptr<SharedRegion> SharedRegion::find(const std::string& id) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().regions.find(id);
  return found == registry().regions.end() ? nullptr : found->second.lock();
}

void SharedRegion::retire_all() {
  std::vector<std::shared_ptr<SharedRegion>> living;  // let go outside the lock, which their destructors take
  {
    const std::lock_guard lock(registry().mutex);
    for (const auto& [id, weak] : registry().regions) {
      if (auto shared = weak.lock()) living.push_back(std::move(shared));
    }
  }
  for (const auto& shared : living) shared->region().retire();
}

bool SharedRegion::claim() {
  if (!region_->claim()) return false;
  claimed_.store(true);
  return true;
}

void SharedRegion::release() {
  claimed_.store(false);
  region_->release();
}

SharedRegion::~SharedRegion() {
  const std::lock_guard lock(registry().mutex);
  registry().regions.erase(id_);
}

}  // namespace memferry::bind
