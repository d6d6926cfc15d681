// Work on a thread of the pool as a promise. What the work needs is kept alive by its captures, which are
// dropped on the environment's thread; an environment that ends waits for work under way, so work must be
// bounded.
//
// Thread: run_async is called on, and settles on, the environment's own; `work` runs on a thread of the pool.
#pragma once

#include <exception>
#include <memory>
#include <optional>
#include <utility>

#include "bind/js_error.h"
#include "bind/node_api.h"

namespace memferry::bind {

// `work()` gives a T; `convert(env, T)` makes it a JavaScript value.
template <typename Work, typename Convert>
Napi::Value run_async(Napi::Env env, const char* name, Work work, Convert convert) {
  using Result = decltype(work());
  struct Task {
    Task(Work w, Convert c) : work(std::move(w)), convert(std::move(c)) {}
    Work work;
    Convert convert;
    std::optional<Result> result;
    std::exception_ptr failure;
    napi_deferred deferred = nullptr;
    napi_async_work handle = nullptr;
  };
  auto task = std::make_unique<Task>(std::move(work), std::move(convert));

  const auto execute = [](napi_env, void* data) {
    auto* running = static_cast<Task*>(data);
    try {
      running->result.emplace(running->work());
    } catch (...) {
      running->failure = std::current_exception();
    }
  };
  const auto complete = [](napi_env raw_env, napi_status status, void* data) {
    const std::unique_ptr<Task> done(static_cast<Task*>(data));
    const Napi::Env js(raw_env);
    const Napi::HandleScope scope(js);
    // In an environment that is ending none of this can run JavaScript; it fails quietly, and nobody waits.
    try {
      if (status != napi_ok || (!done->result && !done->failure)) {
        throw CodedError("CANCELLED", "the thread is ending");
      }
      if (done->failure) std::rethrow_exception(done->failure);
      const Napi::Value value = done->convert(js, std::move(*done->result));
      napi_resolve_deferred(raw_env, done->deferred, value);
    } catch (...) {
      try {
        napi_reject_deferred(raw_env, done->deferred, to_js_error(js, std::current_exception()).Value());
      } catch (const Napi::Error&) {
      }
    }
    napi_delete_async_work(raw_env, done->handle);
  };

  napi_value promise = nullptr;
  if (napi_create_promise(env, &task->deferred, &promise) != napi_ok) throw Napi::Error::New(env);
  const Napi::String label = Napi::String::New(env, name);
  if (napi_create_async_work(env, nullptr, label, execute, complete, task.get(), &task->handle) != napi_ok ||
      napi_queue_async_work(env, task->handle) != napi_ok) {
    throw Napi::Error::New(env);
  }
  task.release();  // `complete` deletes it
  return Napi::Value(env, promise);
}

}  // namespace memferry::bind
