#include "bind/values.h"

#include <cinttypes>
#include <cstdio>

namespace memferry::bind {

namespace {

constexpr double kMaxSafeInteger = 9007199254740991.0;

[[noreturn]] void refuse(const char* what, const char* expected) {
  throw std::invalid_argument(std::string(what) + ": expected " + expected);
}

std::size_t element_bytes(napi_typedarray_type type) {
  switch (type) {
    case napi_int8_array:
    case napi_uint8_array:
    case napi_uint8_clamped_array:
      return 1;
    case napi_int16_array:
    case napi_uint16_array:
      return 2;
    case napi_int32_array:
    case napi_uint32_array:
    case napi_float32_array:
      return 4;
    default:
      return 8;
  }
}

const char* kind_name(EngineEventKind kind) {
  switch (kind) {
    case EngineEventKind::kConnected:
      return "connected";
    case EngineEventKind::kRoundDone:
      return "round-done";
    case EngineEventKind::kSwitched:
      return "switched";
    case EngineEventKind::kEvicted:
      return "evicted";
    case EngineEventKind::kFirstChannel:
      return "first-channel";
    case EngineEventKind::kFilled:
      return "filled";
    case EngineEventKind::kComplete:
      return "complete";
    case EngineEventKind::kLost:
      return "lost";
    case EngineEventKind::kRestHere:
      return "rest-here";
    case EngineEventKind::kPaused:
      return "paused";
    case EngineEventKind::kRecovered:
      return "recovered";
    case EngineEventKind::kFailed:
      return "failed";
  }
  return "failed";
}

}  // namespace

std::span<std::byte> bytes_of(const Napi::Value& value, const char* what) {
  // Not through node-addon-api's classes: they ask for the ArrayBuffer, and a SharedArrayBuffer is none.
  napi_typedarray_type type{};
  std::size_t length = 0;
  void* data = nullptr;
  if (!value.IsTypedArray() ||
      napi_get_typedarray_info(value.Env(), value, &type, &length, &data, nullptr, nullptr) != napi_ok) {
    refuse(what, "a typed array");
  }
  return {static_cast<std::byte*>(data), length * element_bytes(type)};
}

std::uint64_t count_of(const Napi::Value& value, const char* what) {
  if (!value.IsNumber()) refuse(what, "a number");
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!(number >= 0 && number <= kMaxSafeInteger)) refuse(what, "a non-negative integer");
  const auto count = static_cast<std::uint64_t>(number);
  if (static_cast<double>(count) != number) refuse(what, "a non-negative integer");
  return count;
}

std::uint32_t index_of(const Napi::Value& value, const char* what) {
  const std::uint64_t count = count_of(value, what);
  if (count > UINT32_MAX) refuse(what, "a 32-bit integer");
  return static_cast<std::uint32_t>(count);
}

std::uint64_t address_of(const Napi::Value& value) {
  if (!value.IsBigInt()) refuse("address", "a bigint");
  bool lossless = false;
  const std::uint64_t address = value.As<Napi::BigInt>().Uint64Value(&lossless);
  if (!lossless) refuse("address", "an address");
  return address;
}

int descriptor_of(const Napi::Value& value, const char* what) {
  const std::uint64_t number = count_of(value, what);
  if (number > 0x7fffffffU) refuse(what, "a descriptor");
  return static_cast<int>(number);
}

std::string text_of(const Napi::Value& value, const char* what) {
  if (!value.IsString()) refuse(what, "a string");
  return value.As<Napi::String>().Utf8Value();
}

bool flag_of(const Napi::Value& value, const char* what) {
  if (!value.IsBoolean()) refuse(what, "a boolean");
  return value.As<Napi::Boolean>().Value();
}

Napi::Function function_of(const Napi::Value& value, const char* what) {
  if (!value.IsFunction()) refuse(what, "a function");
  return value.As<Napi::Function>();
}

Napi::Object object_of(const Napi::Value& value, const char* what) {
  if (!value.IsObject()) refuse(what, "an object");
  return value.As<Napi::Object>();
}

Napi::Array array_of(const Napi::Value& value, const char* what) {
  if (!value.IsArray()) refuse(what, "an array");
  return value.As<Napi::Array>();
}

Napi::Value run_pairs(Napi::Env env, const std::vector<PageRun>& runs) {
  Napi::Float64Array pairs = Napi::Float64Array::New(env, runs.size() * 2);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    pairs[2 * i] = static_cast<double>(runs[i].first.value);
    pairs[2 * i + 1] = static_cast<double>(runs[i].count);
  }
  return pairs;
}

Napi::Array run_objects(Napi::Env env, const std::vector<RegionRun>& runs) {
  Napi::Array array = Napi::Array::New(env, runs.size());
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const Napi::HandleScope scope(env);
    Napi::Object run = Napi::Object::New(env);
    run.Set("region", Napi::Number::New(env, runs[i].region));
    run.Set("first", number(env, runs[i].run.first.value));
    run.Set("count", number(env, runs[i].run.count));
    array.Set(static_cast<std::uint32_t>(i), run);
  }
  return array;
}

Napi::Object event_object(Napi::Env env, const EngineEvent& event) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("kind", Napi::String::New(env, kind_name(event.kind)));
  object.Set("tag", number(env, event.tag));
  object.Set("suspects", number(env, event.suspects));
  object.Set("code", Napi::String::New(env, event.code));
  object.Set("message", Napi::String::New(env, event.message));
  object.Set("lost", run_objects(env, event.lost));
  return object;
}

std::string hex128(std::uint64_t high, std::uint64_t low) {
  std::array<char, 33> text{};
  (void)std::snprintf(text.data(), text.size(), "%016" PRIx64 "%016" PRIx64, high, low);
  return text.data();
}

}  // namespace memferry::bind
