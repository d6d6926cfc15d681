#!/bin/sh
# Format and lint of the native sources.
#   scripts/check-native.sh          clang-format (all) and clang-tidy (native/) must have nothing to say
#   scripts/check-native.sh format   the former alone
#   scripts/check-native.sh lint     the latter alone
#   scripts/check-native.sh fix      formats in place
# A source that passed is looked at again only when it, a header, or the settings have changed; the stamps are
# in build-check/. JOBS sets the number of processes at once.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
build=${BUILD_DIR:-build-check}
jobs=${JOBS:-$(nproc)}
action=${1:-all}

sources() { find native test/native test/fuzz scripts/kernel \( -name '*.h' -o -name '*.cc' -o -name '*.c' \) | sort; }

case $action in
  fix)
    sources | xargs clang-format -i
    exit 0
    ;;
  all | format)
    sources | xargs -P "$jobs" -n 16 clang-format --dry-run --Werror
    echo "format: $(sources | wc -l) files"
    [ "$action" = format ] && exit 0
    ;;
  lint) ;;
  *)
    echo "usage: $0 [format|lint|fix]" >&2
    exit 2
    ;;
esac

# The analyzer bounded: a fifth of its time, and it finds what is near.
tidy_arguments='--quiet'
for config in mode=shallow max-nodes=8000; do
  tidy_arguments="$tidy_arguments --extra-arg=-Xclang --extra-arg=-analyzer-config --extra-arg=-Xclang --extra-arg=$config"
done

cmake -S . -B "$build" -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DCMAKE_CXX_COMPILER=clang++ -DMEMFERRY_TESTS=OFF >/dev/null
stamps=$build/tidy-stamps
mkdir -p "$stamps"
settings=$( { cat .clang-tidy "$0"; find native -name '*.h' | sort | xargs cat; } | cksum)

# The addon's own sources are not in CMake's list without cmake-js: their headers come from the node in use.
node_include=$(node -p "require('path').resolve(process.execPath, '../../include/node')" 2>/dev/null || true)
addon_api=$(node -p "require('path').resolve(require('node-addon-api').include_dir)" 2>/dev/null || true)

# shellcheck disable=SC2016
find native -name '*.cc' | sort | while read -r file; do
  stamp=$stamps/$(echo "$file" | tr / _)
  state="$settings $(cksum <"$file")"
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && continue
  case $file in
    native/bind/*)
      if [ ! -f "$node_include/node_api.h" ] || [ -z "$addon_api" ]; then
        echo "skipped: $file (no Node headers beside this node)" >&2
        continue
      fi
      ;;
  esac
  printf '%s\n%s\n%s\n' "$file" "$stamp" "$state"
done >"$build/tidy-todo"

export tidy_arguments node_include addon_api build root
# shellcheck disable=SC2016
tr '\n' '\0' <"$build/tidy-todo" | xargs -0 -r -P "$jobs" -n 3 sh -c '
  file=$1 stamp=$2 state=$3
  case $file in
    native/bind/*)
      set -- -- -std=c++20 -I"$root/native" -isystem "$addon_api" -isystem "$node_include" \
        -DNAPI_VERSION=8 -DNAPI_CPP_EXCEPTIONS ;;
    *) set -- ;;
  esac
  if output=$(clang-tidy -p "$build" $tidy_arguments "$file" "$@" 2>/dev/null); then
    printf "%s\n" "$state" >"$stamp"
  else
    printf "%s\n" "$output"
    exit 1
  fi
' tidy || { echo 'clang-tidy has found something' >&2; exit 1; }
echo "lint: $(find native -name '*.cc' | wc -l) files"
