// NativeSampler: a guest's sampler with its reporter, as a handle. An open handle is never collected: like a socket it
// lives until it is closed, or its environment ends. It holds nobody's region.
//
// Thread: the environment's own.
#pragma once

#include <memory>

#include "bind/environment.h"
#include "bind/node_api.h"
#include "share/page_sampler.h"
#include "spread/directory_reporter.h"

namespace memferry::bind {

class SamplerHandle : public Napi::ObjectWrap<SamplerHandle>, public Engine {
 public:
  static void define(Napi::Env env);
  static Napi::Value create(const Napi::CallbackInfo& info);
  explicit SamplerHandle(const Napi::CallbackInfo& info);
  ~SamplerHandle() override;
  void shut_down() override;

 private:
  Napi::Value set_directories(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<DirectoryReporter> reporter_;
  std::unique_ptr<PageSampler> sampler_;  // kept after close() for its last figures
  bool open_ = false;
};

}  // namespace memferry::bind
