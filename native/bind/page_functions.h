// The hot parts as functions of their own: page hashing and page diffing over typed arrays.
//
// Thread: the environment's own; they run to their end there.
#pragma once

#include "bind/node_api.h"

namespace memferry::bind {

void define_page_functions(Napi::Env env, Napi::Object exports);

}  // namespace memferry::bind
