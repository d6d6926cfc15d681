#!/bin/sh
# Builds the fuzzers of test/fuzz/ with clang's libFuzzer, AddressSanitizer and UBSan, and runs each on its kept corpus
# for a while; what it finds beyond the corpus stays in build-fuzz/.
#   scripts/fuzz.sh [SECONDS] [NAME...]   20 seconds each and all of them, unless said otherwise
# The last line is `N passed, N failed, N skipped`; without clang's libFuzzer all are skipped. A failure's input is left
# in build-fuzz/NAME/: run build-fuzz/NAME.fuzz with it.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-20}
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

passed=0 failed=0
for name in $names; do
  echo "==> $name, $seconds s"
  mkdir -p "$build/$name"
  if "$compiler" -std=c++20 -O1 -g -Inative -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
    "test/fuzz/${name}_fuzz.cc" native/wire/codec.cc native/wire/delta.cc native/wire/frame.cc -llz4 -lzstd \
    -o "$build/$name.fuzz" &&
    "$build/$name.fuzz" -max_total_time="$seconds" -max_len=4096 -timeout=60 -rss_limit_mb=1024 -verbosity=0 \
      -print_final_stats=1 -artifact_prefix="$build/$name/" "$build/$name" "test/fuzz/corpus/$name"; then
    passed=$((passed + 1))
  else
    echo "fuzz: $name FAILED" >&2
    failed=$((failed + 1))
  fi
done
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
