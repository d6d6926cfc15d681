#include "bind/environment.h"

#include <algorithm>

namespace memferry::bind {

namespace {

void shut_down_engine(void* engine) { static_cast<Engine*>(engine)->shut_down(); }

}  // namespace

Adoption::Adoption(Environment& environment, std::shared_ptr<SharedRegion> shared,
                   const std::vector<Napi::Object>& pinned)
    : environment_(environment), shared_(std::move(shared)) {
  pinned_.reserve(pinned.size());
  for (const Napi::Object& object : pinned) pinned_.push_back(Napi::Persistent(object));
}

Adoption::~Adoption() {
  end();
  if (!detached_) environment_.forget(*this);
}

void Adoption::end() {
  shared_->region().retire();
  pinned_.clear();
}

void Environment::attach(Napi::Env env) {
  auto* self = new Environment(env);
  env.SetInstanceData(self);
  // Hooks run in the reverse order of their making: this one after those of the engines.
  if (napi_add_env_cleanup_hook(env, &Environment::at_end, self) != napi_ok) throw Napi::Error::New(env);
}

// Each engine has a hook of its own, made after its event queue's: so it runs before Node ends the queue,
// and no native thread can post into one that is being freed.
void Environment::add(Engine* engine) {
  if (napi_add_env_cleanup_hook(env_, &shut_down_engine, engine) != napi_ok) throw Napi::Error::New(env_);
  engines_.insert(engine);
}

void Environment::remove(Engine* engine) {
  if (engines_.erase(engine) != 0) napi_remove_env_cleanup_hook(env_, &shut_down_engine, engine);
}

void Environment::shut_down_engines() {
  while (!engines_.empty()) {
    Engine* engine = *engines_.begin();
    engine->shut_down();
    remove(engine);
  }
}

std::shared_ptr<Adoption> Environment::adopt(std::shared_ptr<SharedRegion> shared,
                                             const std::vector<Napi::Object>& pinned) {
  release_unshared();
  const std::string id = shared->id();
  auto adoption = std::make_shared<Adoption>(*this, std::move(shared), pinned);
  adoptions_[id] = adoption;
  return adoption;
}

std::shared_ptr<Adoption> Environment::adoption_of(const std::string& id) {
  release_unshared();
  const auto found = adoptions_.find(id);
  return found == adoptions_.end() ? nullptr : found->second.lock();
}

void Environment::keep_while_shared(std::shared_ptr<Adoption> adoption) {
  kept_.push_back(std::move(adoption));
  release_unshared();
}

void Environment::release_unshared() {
  std::vector<std::shared_ptr<Adoption>> released;  // destroyed after `kept_` is whole again
  const auto first = std::stable_partition(
      kept_.begin(), kept_.end(), [](const auto& adoption) { return adoption->shared()->handles() > 0; });
  std::move(first, kept_.end(), std::back_inserter(released));
  kept_.erase(first, kept_.end());
}

void Environment::forget(const Adoption& adoption) { adoptions_.erase(adoption.shared()->id()); }

void Environment::at_end(void* data) {
  auto* self = static_cast<Environment*>(data);
  self->shut_down_engines();
  std::vector<std::shared_ptr<Adoption>> living;
  for (const auto& [id, weak] : self->adoptions_) {
    if (auto adoption = weak.lock()) living.push_back(std::move(adoption));
  }
  for (const auto& adoption : living) {
    adoption->end();
    adoption->detach();
  }
  self->adoptions_.clear();
  living.clear();
  self->kept_.clear();
}

}  // namespace memferry::bind
