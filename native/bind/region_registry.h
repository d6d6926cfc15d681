// The one thing that is process-wide: which regions exist, by unguessable id, so that another thread can get
// a handle on one. It holds them weakly.
//
// Threads: any.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "page/owner_watch.h"
#include "page/region.h"

namespace memferry::bind {

class SharedRegion {
 public:
  // Gives the region an id and makes it known. Throws SystemError (getrandom).
  static std::shared_ptr<SharedRegion> publish(std::shared_ptr<Region> region, bool own_memory);
  // nullptr when there is none any more.
  static std::shared_ptr<SharedRegion> find(const std::string& id);
  // For the end of the process: whoever waits for a page of any region is woken.
  static void retire_all();
  ~SharedRegion();
  SharedRegion(const SharedRegion&) = delete;
  SharedRegion& operator=(const SharedRegion&) = delete;

  [[nodiscard]] const std::string& id() const { return id_; }
  [[nodiscard]] Region& region() const { return *region_; }
  [[nodiscard]] const std::shared_ptr<Region>& region_pointer() const { return region_; }
  // Memory of memferry's own, in which any environment may have views.
  [[nodiscard]] bool own_memory() const { return own_memory_; }

  // Of another process's memory: `gone` is called from the watch's thread.
  void watch_owner(std::function<void(const std::string&)> gone) {
    owner_watch_ = std::make_unique<OwnerWatch>(region_, std::move(gone));
  }

  // Open handles in all environments.
  [[nodiscard]] int handles() const { return handles_.load(); }
  void add_handle() { ++handles_; }
  // Without a handle nobody hears of the owner's end, and the watch must not take the events of its userfaultfd from
  // whoever attaches the same memory next. (This object itself lives on until its handles are collected.)
  void drop_handle() {
    if (--handles_ == 0) owner_watch_.reset();
  }

  // One migration at a time.
  bool claim();  // true when nobody else has it
  void release();
  [[nodiscard]] bool claimed() const { return claimed_.load(); }

 private:
  SharedRegion(std::string id, std::shared_ptr<Region> region, bool own_memory)
      : id_(std::move(id)), region_(std::move(region)), own_memory_(own_memory) {}

  const std::string id_;
  const std::shared_ptr<Region> region_;
  const bool own_memory_;
  std::atomic<int> handles_{0};
  std::atomic<bool> claimed_{false};  // the region's own claim, for looking at
  std::unique_ptr<OwnerWatch> owner_watch_;
};

}  // namespace memferry::bind
