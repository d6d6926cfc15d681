#!/bin/sh
# Builds the fuzzers of test/fuzz/ with clang's libFuzzer, AddressSanitizer and UBSan, and runs each on its kept corpus
# for a while; what it finds beyond the corpus stays in build-fuzz/.
#   scripts/fuzz.sh [SECONDS] [NAME...]   8 seconds each and all of them, unless said otherwise
# The core that they link is the one of `scripts/test-native.sh asan`, so that nothing is compiled twice. The last line is
# `N passed, N failed, N skipped`; without clang's libFuzzer all are skipped. A failure's input is left in
# build-fuzz/NAME/: run build-native-asan/test/fuzz/NAME_fuzz with it.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-8}
[ $# -gt 0 ] && shift
build=build-fuzz
compiler=${CXX:-clang++}
all=$(cd test/fuzz && ls *_fuzz.cc | sed 's/_fuzz\.cc$//')
names=${*:-$all}
mkdir -p "$build"

if ! printf 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n' |
  "$compiler" -x c++ -fsanitize=fuzzer,address - -o "$build/probe" 2>/dev/null; then
  echo "fuzz: no clang with libFuzzer here ($compiler), nothing is fuzzed" >&2
  echo "0 passed, 0 failed, $(echo "$names" | wc -w) skipped"
  exit 0
fi

# Every one by itself: one that does not compile fails alone, and not by what it was before.
targets=$(for name in $names; do echo "${name}_fuzz"; done)
for name in $names; do rm -f "build-native-asan/test/fuzz/${name}_fuzz"; done
BUILD_DIR='' BUILD_TARGETS=$targets scripts/test-native.sh asan || true

passed=0 failed=0
for name in $names; do
  echo "==> $name, $seconds s"
  mkdir -p "$build/$name"
  program=build-native-asan/test/fuzz/${name}_fuzz
  # shellcheck disable=SC2046
  if [ -x "$program" ] &&
    "$program" -max_total_time="$seconds" -max_len=4096 -timeout=60 -rss_limit_mb=1024 -malloc_limit_mb=256 \
      -verbosity=0 -print_final_stats=1 -artifact_prefix="$build/$name/" \
      $([ -e "test/fuzz/$name.dict" ] && echo "-dict=test/fuzz/$name.dict") \
      "$build/$name" "test/fuzz/corpus/$name"; then
    passed=$((passed + 1))
  else
    echo "fuzz: $name FAILED" >&2
    failed=$((failed + 1))
  fi
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
