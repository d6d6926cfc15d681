#!/bin/sh
# The core as those who embed it have it: installed under a scratch prefix, used by programs that are built outside of the
# tree, by find_package and by pkg-config, with every C and C++ compiler that is here. A line for each check, the counts
# last. Leaves the programs where MEMFERRY_EMBED_DIR says, for the tests in test/embed.
#   MEMFERRY_EMBED_DIR=DIRECTORY scripts/test-embed.sh
set -eu
cd "$(dirname "$0")/.."
root=$PWD
scratch=${MEMFERRY_EMBED_DIR:?where to install to and build in}
build=${BUILD_DIR:-build-native}
jobs=${JOBS:-$(nproc)}
mkdir -p "$scratch"
scratch=$(cd "$scratch" && pwd)
prefix=$scratch/prefix
log=$scratch/log
rm -rf "$prefix" "$scratch/embed"
passed=0 failed=0 skipped=0

# check NAME COMMAND...
check() {
  name=$1
  shift
  if "$@" >"$log" 2>&1; then
    passed=$((passed + 1))
    echo "ok: $name"
  else
    failed=$((failed + 1))
    echo "failed: $name"
    tail -n 30 "$log"
  fi
}

exports() {
  nm -D --defined-only "$(find "$prefix" -name libmemferry.so)" | awk '{ print $3 }' | sort >"$scratch/exports"
  grep -o '\bmemferry_[a-z_]*(' "$prefix/include/memferry.h" | tr -d '(' | sort -u >"$scratch/declared"
  # Declared functions are there; nothing is exported that is none of ours.
  [ -z "$(grep -v '^memferry_' "$scratch/exports")" ] && [ -z "$(grep -vxFf "$scratch/declared" "$scratch/exports")" ] &&
    grep -xFf "$scratch/exports" "$scratch/declared" | grep -q . &&
    [ "$(grep -cxFf "$scratch/exports" "$scratch/declared")" = "$(wc -l <"$scratch/exports")" ]
}

versions() {
  # package.json, the header, the package files: one version.
  version=$(node -p "require('./package.json').version")
  header=$(awk '/define MEMFERRY_VERSION_(MAJOR|MINOR|PATCH)/ { printf "%s%s", sep, $3; sep = "." }' "$prefix/include/memferry.h")
  echo "$version, memferry.h $header"
  [ "$version" = "$header" ] && [ "$(pkg-config --modversion memferry)" = "$version" ]
}

# header LANGUAGE COMPILER FLAGS...: by itself, with every warning
header() {
  language=$1 compiler=$2
  shift 2
  echo '#include <memferry.h>' |
    "$compiler" "$@" -x "$language" -Wall -Wextra -Wpedantic -Werror -fsyntax-only -I"$prefix/include" -
}

# programs DIRECTORY CC CXX: by find_package
programs() {
  cmake -S "$scratch/embed" -B "$1" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER="$2" \
    -DCMAKE_CXX_COMPILER="$3" && cmake --build "$1" -j "$jobs" && timeout 60 "$1/engines" && timeout 60 "$1/tracked"
}

by_pkg_config() {
  make -C "$scratch/embed" CC="$1" BUILD="$scratch/make-$1" && timeout 60 "$scratch/make-$1/engines"
}

generator=
command -v ninja >/dev/null 2>&1 && generator='-G Ninja'
build_core() {
  # The same build as the suite `native`'s.
  # shellcheck disable=SC2086
  cmake -S . -B "$build" $generator -DCMAKE_CXX_COMPILER="${CXX:-g++}" -DCMAKE_BUILD_TYPE=Release -DMEMFERRY_SANITIZE= &&
    cmake --build "$build" -j "$jobs" --target memferry_shared memferry_static memferry_commit_twin memferry_capi_faults memferry_parker
}

check 'the core builds' build_core
check 'cmake --install' cmake --install "$build" --prefix "$prefix"
# Away from the tree, so that nothing of it is found by chance.
cp -r examples/embed "$scratch/embed"
PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name memferry.pc)")
export PKG_CONFIG_PATH
check 'one version everywhere' versions
check 'only memferry_* is exported, and all of it' exports
check 'memferry.h in C11' header c cc -std=c11
check 'memferry.h in C++11' header c++ "${CXX:-g++}" -std=c++11
check 'find_package, gcc and g++' programs "$scratch/programs" gcc g++
check 'pkg-config, gcc' by_pkg_config gcc
if command -v clang >/dev/null 2>&1 && command -v clang++ >/dev/null 2>&1; then
  check 'find_package, clang and clang++' programs "$scratch/programs-clang" clang clang++
  check 'pkg-config, clang' by_pkg_config clang
else
  skipped=$((skipped + 2))
  echo 'skipped: no clang here'
fi
check 'no exception leaves the C interface' timeout 120 "$root/$build/test/embed/memferry_capi_faults"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
