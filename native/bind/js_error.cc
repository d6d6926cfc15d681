#include "bind/js_error.h"

#include <new>

#include "os/sys_error.h"
#include "page/region.h"

namespace memferry::bind {

namespace {

Napi::Error with_code(Napi::Error error, const std::string& code) {
  error.Set("code", Napi::String::New(error.Env(), code));
  return error;
}

}  // namespace

Napi::Error to_js_error(Napi::Env env, const std::exception_ptr& exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const Napi::Error& error) {
    return error;
  } catch (const CodedError& error) {
    return with_code(Napi::Error::New(env, error.what()), error.code());
  } catch (const RegionGone& error) {
    return with_code(Napi::Error::New(env, error.what()), "REGION_GONE");
  } catch (const OwnerGone& error) {
    return with_code(Napi::Error::New(env, error.what()), "OWNER_GONE");
  } catch (const SystemError& error) {
    Napi::Error js = with_code(Napi::Error::New(env, error.what()), "SYSTEM");
    js.Set("errno", Napi::Number::New(env, error.error()));
    js.Set("syscall", Napi::String::New(env, error.operation()));
    return js;
  } catch (const std::system_error& error) {
    Napi::Error js = with_code(Napi::Error::New(env, error.what()), "SYSTEM");
    js.Set("errno", Napi::Number::New(env, error.code().value()));
    return js;
  } catch (const std::out_of_range& error) {
    return with_code(Napi::RangeError::New(env, error.what()), "INVALID_ARGUMENT");
  } catch (const std::invalid_argument& error) {
    return with_code(Napi::TypeError::New(env, error.what()), "INVALID_ARGUMENT");
  } catch (const std::bad_alloc&) {
    return with_code(Napi::Error::New(env, "out of memory"), "NO_MEMORY");
  } catch (const std::exception& error) {
    return with_code(Napi::Error::New(env, error.what()), "SYSTEM");
  } catch (...) {
    return with_code(Napi::Error::New(env, "an unknown exception"), "SYSTEM");
  }
}

}  // namespace memferry::bind
