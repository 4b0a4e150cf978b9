#!/bin/bash
# Build the kernel library once per set of definitions, for scripts/check_gpu.sh.
#   scripts/build_variants.sh FOLDER NAME[=DEFINITION[;DEFINITION]]...
set -eu
folder=$1; shift
root=$(cd "$(dirname "$0")/.." && pwd)
for variant in "$@"; do
  name=${variant%%=*}; definitions=""
  [ "$name" = "$variant" ] || definitions=${variant#*=}
  cmake -S "$root" -B "$root/build/variants/$name" -DSVDIT_KERNEL_DEFINITIONS="$definitions" > /dev/null
  cmake --build "$root/build/variants/$name" > "$root/build/variants/$name.log" 2>&1 || { tail -20 "$root/build/variants/$name.log"; exit 1; }
  mkdir -p "$folder/$name"
  cp "$root/build/variants/$name/libsvdit_kernels.so" "$folder/$name/"
done
ls -l "$folder"/*/*.so
