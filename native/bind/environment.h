// What one environment (the main thread's, or a worker's) holds of ours: the constructors of the handle
// classes, the engines that are open, and the memory of this environment's that is pinned as regions.
//
// When the environment ends, its engines are closed first (missing pages poisoned, waiters woken, threads
// joined), then its regions are retired, and only then V8 lets the memory go.
//
// Thread: the environment's own.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "bind/node_api.h"
#include "bind/region_registry.h"

namespace memferry::bind {

class Environment;

// Something with native threads that an environment owns.
class Engine {
 public:
  Engine() = default;
  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Stops every thread of it, as the source's or destination's death would look to the peer. Twice is fine.
  virtual void shut_down() = 0;
};

// A region over memory of this environment's: the JavaScript objects stay referenced while anything here
// (handles, trackers, engines) needs the region; when the last one lets go the region is retired.
class Adoption {
 public:
  Adoption(Environment& environment, std::shared_ptr<SharedRegion> shared,
           const std::vector<Napi::Object>& pinned);
  ~Adoption();
  Adoption(const Adoption&) = delete;
  Adoption& operator=(const Adoption&) = delete;

  [[nodiscard]] const std::shared_ptr<SharedRegion>& shared() const { return shared_; }
  // Stops all native use, then lets the JavaScript objects go. Twice is fine.
  void end();
  // The environment is ending and has ended this; nothing here may touch it any more.
  void detach() { detached_ = true; }
  [[nodiscard]] bool detached() const { return detached_; }

 private:
  Environment& environment_;
  std::shared_ptr<SharedRegion> shared_;
  std::vector<Napi::ObjectReference> pinned_;
  bool detached_ = false;
};

class Environment {
 public:
  static void attach(Napi::Env env);
  static Environment& of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

  explicit Environment(Napi::Env env) : env_(env) {}

  Napi::FunctionReference region_class;
  Napi::FunctionReference tracker_class;
  Napi::FunctionReference sender_class;
  Napi::FunctionReference receiver_class;
  Napi::FunctionReference listener_class;
  Napi::FunctionReference stage_class;
  Napi::FunctionReference held_state_class;
  Napi::FunctionReference sampler_class;
  Napi::FunctionReference source_pager_class;
  Napi::FunctionReference spreader_class;
  Napi::FunctionReference share_class;
  Napi::FunctionReference fd_listener_class;
  Napi::FunctionReference restore_class;
  Napi::FunctionReference fd_connection_class;

  // Between the two, the environment's end shuts the engine down.
  void add(Engine* engine);
  void remove(Engine* engine);
  void shut_down_engines();

  std::shared_ptr<Adoption> adopt(std::shared_ptr<SharedRegion> shared,
                                  const std::vector<Napi::Object>& pinned);
  // The adoption of a region of this environment's; nullptr when it is another's, or needs none.
  [[nodiscard]] std::shared_ptr<Adoption> adoption_of(const std::string& id);
  // A handle was collected, not closed: the memory stays pinned while another thread has a handle on it.
  void keep_while_shared(std::shared_ptr<Adoption> adoption);
  void forget(const Adoption& adoption);

 private:
  static void at_end(void* self);
  void release_unshared();

  Napi::Env env_;
  std::set<Engine*> engines_;
  std::unordered_map<std::string, std::weak_ptr<Adoption>> adoptions_;
  std::vector<std::shared_ptr<Adoption>> kept_;
};

}  // namespace memferry::bind
