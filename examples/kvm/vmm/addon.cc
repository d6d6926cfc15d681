// The VMM as an addon of Node: what vmm.ts declares.
//
// Thread: the environment's own; a pause waits on a thread of the pool.
#include <napi.h>

#include <algorithm>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "os/sys_error.h"
#include "vm.h"

extern "C" const unsigned char kvm_guest[];
extern "C" const unsigned char kvm_guest_end[];
extern "C" const unsigned char kvm_guest_fill[];
extern "C" const unsigned char kvm_guest_scribble[];
extern "C" const unsigned char kvm_guest_store[];
extern "C" const unsigned char kvm_guest_out[];

namespace kvm_example {

namespace {

template <typename Function>
auto guarded(Napi::Env env, Function&& function) -> decltype(function()) {
  try {
    return function();
  } catch (const Napi::Error&) {
    throw;
  } catch (const BadState& error) {
    Napi::Error wrapped = Napi::Error::New(env, error.what());
    wrapped.Set("code", Napi::String::New(env, "BAD_STATE"));
    throw wrapped;
  } catch (const std::exception& error) {
    throw Napi::Error::New(env, error.what());
  }
}

std::span<std::byte> bytes_of(const Napi::Value& value, const char* what) {
  if (!value.IsTypedArray()) throw std::invalid_argument(std::string(what) + " is no typed array");
  void* data = nullptr;
  std::size_t length = 0;
  napi_typedarray_type type = napi_uint8_array;
  if (napi_get_typedarray_info(value.Env(), value, &type, &length, &data, nullptr, nullptr) != napi_ok) {
    throw std::invalid_argument(std::string(what) + " cannot be read");
  }
  return {static_cast<std::byte*>(data), value.As<Napi::TypedArray>().ByteLength()};
}

class VmHandle : public Napi::ObjectWrap<VmHandle> {
 public:
  static void define(Napi::Env env, Napi::Object exports) {
    exports.Set(
        "Vm", DefineClass(
                  env, "Vm",
                  {InstanceAccessor<&VmHandle::fd>("fd"), InstanceMethod<&VmHandle::log_writes>("logWrites"),
                   InstanceMethod<&VmHandle::boot>("boot"), InstanceMethod<&VmHandle::save>("save"),
                   InstanceMethod<&VmHandle::load>("load"), InstanceMethod<&VmHandle::run>("run"),
                   InstanceMethod<&VmHandle::pause>("pause"), InstanceMethod<&VmHandle::status>("status"),
                   InstanceMethod<&VmHandle::close>("close")}));
  }

  // new Vm(ram: Uint8Array, marks: BigUint64Array | null, console: number)
  explicit VmHandle(const Napi::CallbackInfo& info) : Napi::ObjectWrap<VmHandle>(info) {
    guarded(info.Env(), [&] {
      VmConfig config;
      config.ram = bytes_of(info[0], "ram");
      ram_ = Napi::Persistent(info[0].As<Napi::Object>());
      if (!info[1].IsNull()) {
        const std::span<std::byte> marks = bytes_of(info[1], "marks");
        if (reinterpret_cast<std::uintptr_t>(marks.data()) % 8 != 0)
          throw std::invalid_argument("marks: not aligned");
        config.marks = {reinterpret_cast<std::uint64_t*>(marks.data()), marks.size() / 8};
        marks_ = Napi::Persistent(info[1].As<Napi::Object>());
      }
      config.console = info[2].As<Napi::Number>().Int32Value();
      vm_ = std::make_shared<Vm>(config);
    });
  }

 private:
  static Napi::ObjectReference again(const Napi::ObjectReference& reference) {
    return reference.IsEmpty() ? Napi::ObjectReference() : Napi::Persistent(reference.Value());
  }
  Vm& vm() const {
    if (!vm_) throw std::logic_error("the VM is closed");
    return *vm_;
  }
  template <typename Function>
  Napi::Value done(const Napi::CallbackInfo& info, Function&& function) {
    return guarded(info.Env(), [&] {
      function();
      return info.Env().Undefined();
    });
  }

  Napi::Value fd(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value { return Napi::Number::New(info.Env(), vm().fd()); });
  }
  Napi::Value log_writes(const Napi::CallbackInfo& info) {
    return done(info, [&] { vm().log_writes(info[0].ToBoolean().Value()); });
  }
  Napi::Value boot(const Napi::CallbackInfo& info) {
    return done(info, [&] { vm().boot(); });
  }
  Napi::Value save(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const std::vector<std::byte> state = vm().save();
      Napi::Uint8Array bytes = Napi::Uint8Array::New(info.Env(), state.size());
      std::copy(state.begin(), state.end(), reinterpret_cast<std::byte*>(bytes.Data()));
      return bytes;
    });
  }
  Napi::Value load(const Napi::CallbackInfo& info) {
    return done(info, [&] { vm().load(bytes_of(info[0], "state")); });
  }
  Napi::Value run(const Napi::CallbackInfo& info) {
    return done(info, [&] { vm().run(); });
  }

  // The vCPU may be waiting for a page that comes over the network, so this thread does not wait for it.
  class Pause : public Napi::AsyncWorker {
   public:
    Pause(Napi::Env env, std::shared_ptr<Vm> vm, Napi::ObjectReference ram, Napi::ObjectReference marks)
        : Napi::AsyncWorker(env, "kvm.pause"),
          deferred_(Napi::Promise::Deferred::New(env)),
          ram_(std::move(ram)),
          marks_(std::move(marks)),
          vm_(std::move(vm)) {}
    [[nodiscard]] Napi::Promise promise() const { return deferred_.Promise(); }
    void Execute() override {
      try {
        stood_at_ns_ = vm_->pause();
      } catch (const std::exception& error) {
        SetError(error.what());
      }
    }
    void OnOK() override { deferred_.Resolve(Napi::BigInt::New(Env(), stood_at_ns_)); }
    void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

   private:
    Napi::Promise::Deferred deferred_;
    Napi::ObjectReference ram_;  // as long as the VM
    Napi::ObjectReference marks_;
    std::shared_ptr<Vm> vm_;
    std::uint64_t stood_at_ns_ = 0;
  };
  Napi::Value pause(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      (void)vm();
      auto* const worker = new Pause(info.Env(), vm_, again(ram_), again(marks_));
      const Napi::Promise promise = worker->promise();
      worker->Queue();
      return promise;
    });
  }

  Napi::Value status(const Napi::CallbackInfo& info) {
    return guarded(info.Env(), [&]() -> Napi::Value {
      const Napi::Env env = info.Env();
      const Status now = vm().status();
      Napi::Object status = Napi::Object::New(env);
      constexpr const char* kNames[] = {"stands", "runs", "failed"};
      status.Set("state", Napi::String::New(env, kNames[static_cast<int>(now.state)]));
      status.Set("outputs", Napi::Number::New(env, static_cast<double>(now.device.outputs)));
      status.Set("last", Napi::Number::New(env, now.device.last));
      status.Set("failure", Napi::String::New(env, now.failure));
      return status;
    });
  }
  Napi::Value close(const Napi::CallbackInfo& info) {
    vm_.reset();
    ram_.Reset();
    marks_.Reset();
    return info.Env().Undefined();
  }

  // In this order: the VM goes before what it writes to.
  Napi::ObjectReference ram_;
  Napi::ObjectReference marks_;
  std::shared_ptr<Vm> vm_;
};

Napi::Object init(Napi::Env env, Napi::Object exports) {
  VmHandle::define(env, exports);
  const auto offset = [&](const unsigned char* label) {
    return Napi::Number::New(env, static_cast<double>(label - kvm_guest));
  };
  Napi::Object program = Napi::Object::New(env);
  program.Set("bytes", Napi::Buffer<unsigned char>::Copy(
                           env, kvm_guest, static_cast<std::size_t>(kvm_guest_end - kvm_guest)));
  program.Set("fill", offset(kvm_guest_fill));
  program.Set("scribble", offset(kvm_guest_scribble));
  program.Set("store", offset(kvm_guest_store));
  program.Set("out", offset(kvm_guest_out));
  exports.Set("program", program);
  return exports;
}

}  // namespace

NODE_API_MODULE(NODE_GYP_MODULE_NAME, init)

}  // namespace kvm_example
