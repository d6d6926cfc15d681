// The standard headers that nearly every file includes, parsed once: a third of the time of a build. Precompiled by
// CMakeLists.txt and scripts/install.mjs, and included first by the compiler itself; every file still includes what it
// uses.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>
