#include "bind/page_functions.h"

#include <cstdint>

#include "bind/js_error.h"
#include "bind/values.h"
#include "page/diff.h"
#include "page/hash.h"

namespace memferry::bind {

namespace {

Napi::Value hash_pages_of(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::span<std::byte> view = bytes_of(info[0], "view");
    const std::uint64_t page_size = count_of(info[1], "pageSize");
    const std::span<std::byte> out = bytes_of(info[2], "out");
    if (page_size == 0 || view.size() % page_size != 0) {
      throw std::invalid_argument("pageSize: the view is not whole pages");
    }
    if (out.size() != view.size() / page_size * sizeof(std::uint64_t) ||
        reinterpret_cast<std::uintptr_t>(out.data()) % alignof(std::uint64_t) != 0) {
      throw std::invalid_argument("out: expected one 64-bit element for each page");
    }
    hash_pages(view, page_size, reinterpret_cast<std::uint64_t*>(out.data()));
    return info.Env().Undefined();
  });
}

Napi::Value hash_of(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&]() -> Napi::Value {
    return Napi::BigInt::New(info.Env(), xxh3_64(bytes_of(info[0], "view")));
  });
}

Napi::Value diff_pages_of(const Napi::CallbackInfo& info) {
  return guarded(info.Env(), [&] {
    const std::span<std::byte> a = bytes_of(info[0], "a");
    const std::span<std::byte> b = bytes_of(info[1], "b");
    return run_pairs(info.Env(), diff_pages(a, b, count_of(info[2], "pageSize")));
  });
}

Napi::Value hash_implementation_of(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), hash_implementation());
}

}  // namespace

void define_page_functions(Napi::Env env, Napi::Object exports) {
  exports.Set("hashPages", Napi::Function::New<hash_pages_of>(env, "hashPages"));
  exports.Set("hash", Napi::Function::New<hash_of>(env, "hash"));
  exports.Set("diffPages", Napi::Function::New<diff_pages_of>(env, "diffPages"));
  exports.Set("hashImplementation", Napi::Function::New<hash_implementation_of>(env, "hashImplementation"));
}

}  // namespace memferry::bind
