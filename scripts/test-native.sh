#!/bin/sh
# Builds the native core and runs its tests: plain (gcc), asan (clang, with UBSan), tsan (clang).
#   scripts/test-native.sh [plain|asan|tsan] [arguments of ctest...]
# JOBS sets the number of compilers at once; of tests, which wait more than they compute, there are twice as many (but for
# those of test/native/serial_tests.cmake). With BUILD_ONLY=1 no test runs; BUILD_TARGETS, some names, is that and builds
# these alone. The asan core is instrumented for the fuzzers too (scripts/fuzz.sh).
set -eu
cd "$(dirname "$0")/.."
kind=${1:-plain}
[ $# -gt 0 ] && shift
jobs=${JOBS:-$(nproc)}

case $kind in
  plain) build=build-native; compiler=${CXX:-g++}; sanitize=; type=Release ;;
  asan) build=build-native-asan; compiler=${CXX:-clang++}; sanitize=address,undefined; type=Sanitized ;;
  tsan) build=build-native-tsan; compiler=${CXX:-clang++}; sanitize=thread; type=Sanitized ;;
  *) echo "usage: $0 [plain|asan|tsan] [ctest arguments]" >&2; exit 2 ;;
esac
build=${BUILD_DIR:-$build}
fuzzers=OFF
[ "$kind" = asan ] && case $compiler in *clang*) fuzzers=ON ;; esac
generator=
command -v ninja >/dev/null 2>&1 && generator='-G Ninja'

# One build at a time: `npm test` compiles the fuzzers, too, while it does other things.
mkdir -p "$build"
exec 9>"$build/.lock"
command -v flock >/dev/null 2>&1 && flock 9
# shellcheck disable=SC2086
cmake -S . -B "$build" $generator -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_BUILD_TYPE="$type" \
  -DMEMFERRY_SANITIZE="$sanitize" -DMEMFERRY_FUZZERS="$fuzzers" >/dev/null
if [ -n "${BUILD_TARGETS:-}" ]; then
  # Whatever else fails to build.
  keep_going=-k
  [ -n "$generator" ] && keep_going='-k 0'
  # shellcheck disable=SC2086
  cmake --build "$build" -j "$jobs" --target $BUILD_TARGETS -- $keep_going
  exit
fi
cmake --build "$build" -j "$jobs"
[ "${BUILD_ONLY:-}" = 1 ] && exit 0
exec 9>&-

# A race or an overflow must fail the test that has it, and say where.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_stack_use_after_return=1:strict_string_checks=1}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1}"
export TSAN_OPTIONS="${TSAN_OPTIONS:-halt_on_error=1:second_deadlock_stack=1}"
cd "$build"
exec ctest --output-on-failure -j "$((2 * jobs))" "$@"
