// Node-API's C++ classes as this addon wants them. In an environment that is being terminated nothing can be
// thrown into JavaScript any more; without this setting a call of ours that fails there would end the process.
#pragma once

#define NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS

#include <napi.h>
