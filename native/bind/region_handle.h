// NativeRegion: one environment's handle on a region.
//
// Thread: the environment's own.
#pragma once

#include <memory>
#include <vector>

#include "bind/environment.h"
#include "bind/event_queue.h"
#include "bind/node_api.h"

namespace memferry::bind {

// What an engine or tracker holds of a region: the region, and the pin on its JavaScript objects where it is
// this environment's. Made, copied and destroyed on the environment's thread.
struct RegionHold {
  std::shared_ptr<SharedRegion> shared;
  std::shared_ptr<Adoption> adoption;
};

// Tells JavaScript that the owner of attached memory is gone, for as long as the handle is open.
class OwnerNotice final : public Engine {
 public:
  OwnerNotice(Environment& environment, std::shared_ptr<EventQueue> queue);
  ~OwnerNotice() override;
  void shut_down() override { queue_->close(); }

 private:
  Environment& environment_;
  std::shared_ptr<EventQueue> queue_;
};

class RegionHandle : public Napi::ObjectWrap<RegionHandle> {
 public:
  static void define(Napi::Env env);
  static Napi::Value allocate(const Napi::CallbackInfo& info);
  static Napi::Value adopt(const Napi::CallbackInfo& info);
  // (pidfd, uffd | null, [{ address: bigint, lengthBytes, offset }], memory | null, onGone(message))
  static Napi::Value attach(const Napi::CallbackInfo& info);
  // The first four of attach(): who touches what is missing there waits from now on.
  static Napi::Value register_missing(const Napi::CallbackInfo& info);
  static Napi::Value open_pidfd(const Napi::CallbackInfo& info);
  static Napi::Value take_descriptor(const Napi::CallbackInfo& info);
  static Napi::Value open(const Napi::CallbackInfo& info);
  static Napi::Value reserved_bytes(const Napi::CallbackInfo& info);

  // The region behind a handle that came from JavaScript. Throws std::invalid_argument when it is not one,
  // CodedError (REGION_CLOSED).
  static RegionHold hold_of(const Napi::Value& value);

  explicit RegionHandle(const Napi::CallbackInfo& info);
  ~RegionHandle() override;

 private:
  static Napi::Object wrap(Napi::Env env, RegionHold hold);
  [[nodiscard]] const RegionHold& hold() const;  // throws CodedError (REGION_CLOSED)
  [[nodiscard]] Region& region() const { return hold().shared->region(); }

  Napi::Value id(const Napi::CallbackInfo& info);
  Napi::Value page_size(const Napi::CallbackInfo& info);
  Napi::Value capacity_pages(const Napi::CallbackInfo& info);
  Napi::Value pages(const Napi::CallbackInfo& info);
  Napi::Value grow(const Napi::CallbackInfo& info);
  Napi::Value mapped_pages(const Napi::CallbackInfo& info);
  Napi::Value retired(const Napi::CallbackInfo& info);
  Napi::Value retire(const Napi::CallbackInfo& info);
  Napi::Value buffers(const Napi::CallbackInfo& info);
  Napi::Value starts_at(const Napi::CallbackInfo& info);
  Napi::Value attached(const Napi::CallbackInfo& info);
  Napi::Value claimed(const Napi::CallbackInfo& info);
  Napi::Value claim(const Napi::CallbackInfo& info);
  Napi::Value release(const Napi::CallbackInfo& info);
  Napi::Value digest(const Napi::CallbackInfo& info);
  Napi::Value fill(const Napi::CallbackInfo& info);
  Napi::Value fill_from(const Napi::CallbackInfo& info);
  Napi::Value save(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  RegionHold hold_;  // of a live handle; kept after close() only for `id`
  bool open_ = false;
  bool holds_claim_ = false;
  std::unique_ptr<OwnerNotice> notice_;  // of the handle that attach() gave
};

}  // namespace memferry::bind
