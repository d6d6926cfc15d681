#include "bind/event_queue.h"

#include "bind/js_error.h"

namespace memferry::bind {

struct EventQueue::Item {
  std::shared_ptr<EventQueue> queue;
  Deliver deliver;
};

std::shared_ptr<EventQueue> EventQueue::create(Napi::Env env, const Napi::Function& callback,
                                               const char* name) {
  std::shared_ptr<EventQueue> queue(new EventQueue());
  const Napi::String label = Napi::String::New(env, name);
  const napi_status status = napi_create_threadsafe_function(
      env, callback, nullptr, label, 0, 1, nullptr, nullptr, nullptr, &deliver_item, &queue->function_);
  if (status != napi_ok) throw Napi::Error::New(env);
  napi_unref_threadsafe_function(env, queue->function_);
  return queue;
}

void EventQueue::post(Deliver deliver) {
  auto item = std::make_unique<Item>(Item{shared_from_this(), std::move(deliver)});
  const std::lock_guard lock(mutex_);
  if (function_ == nullptr) return;
  switch (napi_call_threadsafe_function(function_, item.get(), napi_tsfn_nonblocking)) {
    case napi_ok:
      item.release();  // deliver_item deletes it
      break;
    case napi_closing:
      // The environment is ending, and this call has given up our share of the function.
      function_ = nullptr;
      break;
    default:
      break;  // no memory for the queue's entry
  }
}

void EventQueue::close() {
  closed_ = true;
  const std::lock_guard lock(mutex_);
  if (function_ == nullptr) return;
  napi_release_threadsafe_function(function_, napi_tsfn_abort);
  function_ = nullptr;
}

void EventQueue::deliver_item(napi_env raw_env, napi_value callback, void* /*context*/, void* data) {
  const std::unique_ptr<Item> item(static_cast<Item*>(data));
  if (raw_env == nullptr || callback == nullptr || item->queue->closed_) return;
  const Napi::Env env(raw_env);
  try {
    item->deliver(env, Napi::Function(env, callback));
  } catch (const Napi::Error& error) {
    // Node only warns about what a callback of an older Node-API version throws; it must not vanish.
    napi_fatal_exception(raw_env, error.Value());
  } catch (...) {
    napi_fatal_exception(raw_env, to_js_error(env, std::current_exception()).Value());
  }
}

}  // namespace memferry::bind
