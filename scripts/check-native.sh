#!/bin/sh
# Format and lint of the native sources.
#   scripts/check-native.sh          clang-format (all) and clang-tidy (native/) must have nothing to say
#   scripts/check-native.sh format   the former alone
#   scripts/check-native.sh lint     the latter alone; with names of files, of those
#   scripts/check-native.sh fix      formats in place
# JOBS sets the number of processes at once. clang-tidy keeps in build-check/ what has passed (scripts/tidy.mjs).
set -eu
cd "$(dirname "$0")/.."
jobs=${JOBS:-$(nproc)}
action=${1:-all}
[ $# -gt 0 ] && shift

sources() {
  find native test/native test/fuzz scripts examples \( -name '*.h' -o -name '*.cc' -o -name '*.c' \) -not -path '*/build/*' | sort
}

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
    echo "usage: $0 [format|lint [FILE...]|fix]" >&2
    exit 2
    ;;
esac

exec node scripts/tidy.mjs "$@"
