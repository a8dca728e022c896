#!/bin/sh
# Compiles the CUDA sources without a GPU and without a CUDA build of torch: every kernel with nvcc, every wrapper's syntax
# against torch's headers. Called by `make cuda-check`.
#   PY    python that has torch (default python3)
#   NVCC  nvcc to use (default /usr/local/cuda/bin/nvcc, else the one on PATH)
#   ARCH  architecture to compile for (default sm_90)
# Arguments: the wrappers to check, and nothing else is compiled then (default: all, and every kernel).
set -u
kernels="csrc/*/cuda/*.cu"
[ $# = 0 ] || kernels=
cd "$(dirname "$0")/.." || exit 1
[ $# != 0 ] || set -- csrc/cuda.cpp csrc/*/cuda/*.cpp
PY=${PY:-python3}
ARCH=${ARCH:-sm_90}
if [ -z "${NVCC:-}" ]; then
  if [ -x /usr/local/cuda/bin/nvcc ]; then NVCC=/usr/local/cuda/bin/nvcc; else NVCC=$(command -v nvcc || true); fi
fi
if [ -z "$NVCC" ]; then
  echo "cuda-check: skipped: nvcc not found (set NVCC, or install the CUDA toolkit)"
  exit 0
fi
out=build/cuda_check
mkdir -p "$out"
# The wrappers are checked while nvcc is at work.
headers=$("$PY" -c 'import os, sysconfig, torch
print("-isystem", os.path.dirname(torch.__file__) + "/include", "-isystem", sysconfig.get_paths()["include"])') || exit 1
# The toolkit's headers: those that nvcc itself uses, whatever wraps it.
top=$("$NVCC" --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')
(
  failed=0
  for wrapper in "$@"; do
    # shellcheck disable=SC2086
    if ${CXX:-g++} -std=c++20 -fsyntax-only -Wall @csrc/stable_abi.flags -DUSE_CUDA -DFASTIF_CUDA_MAJOR=13 $headers \
        -isystem "$top/include" "$wrapper"; then
      echo "$wrapper: syntax correct"
    else
      echo "cuda-check: FAILED: $wrapper"
      failed=1
    fi
  done
  exit "$failed"
) >"$out/wrappers.log" 2>&1 &
wrappers=$!

failed=0
for source in $kernels; do
  name=$(echo "$source" | tr / _)
  log=$out/$name.log
  if "$NVCC" -c -std=c++20 -arch="$ARCH" -O3 -lineinfo -Xcompiler -fPIC,-Wall -Xptxas -v \
      -o "$out/$name.o" "$source" >"$log" 2>&1; then
    # One line per kernel. A mangled name holds the kernel's own after its namespace's, each with its length before it,
    # and then the template arguments.
    awk -v source="$source" '
      /Compiling entry function/ { split($0, quoted, "\047"); name = quoted[2] }
      /bytes spill stores/ {
        for (i = 1; i <= NF; ++i) if ($i == "spill") spill += $(i - 2)
      }
      /Used [0-9]+ registers/ {
        for (i = 1; i <= NF; ++i) {
          if ($i ~ /^registers/) registers = $(i - 1)
          if ($i == "smem" || $i == "smem,") shared = $(i - 2)
        }
        sub(/^_ZN6fastif/, "", name)
        match(name, /^[0-9]+/)
        length_ = substr(name, 1, RLENGTH) + 0
        rest = substr(name, RLENGTH + 1 + length_)
        name = substr(name, RLENGTH + 1, length_)
        if (rest !~ /^I/) rest = "Iv"  # no template
        sub(/EEv.*/, "", rest)
        sub(/^I/, "", rest)
        type = substr(rest, 1, 1) == "f" ? "float" : substr(rest, 1, 1) == "d" ? "double" : ""
        arguments = type
        rest = substr(rest, 2)
        gsub(/L[ib]/, ", ", rest)
        gsub(/NS_[0-9]+/, ", ", rest)  # a class template of the namespace, of the same type
        gsub(/I[fd]/, "", rest)
        gsub(/E/, "", rest)
        printf "%-30s %-28s %3d registers  %5d bytes shared  spills %s\n", name, "<" type rest ">", registers, shared,
               (spill > 0) ? spill " bytes" : "none"
        spill = 0; shared = 0
      }' "$log"
    grep -i "warning" "$log" | sed 's/^/  /'
  else
    echo "cuda-check: FAILED: $source"
    cat "$log"
    failed=1
  fi
done

wait "$wrappers" || failed=1
cat "$out/wrappers.log"
[ "$failed" = 0 ] && echo "cuda-check: all compiled for $ARCH; nothing was run"
exit "$failed"
