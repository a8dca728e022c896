#!/bin/sh
# Compiles every CPU source for 64-bit ARM, against this machine's torch headers. Called by `make arm-check`.
#   PY    python that has torch and ziglang, whose clang has the target (default python3)
set -u
cd "$(dirname "$0")/.." || exit 1
PY=${PY:-python3}
headers=$("$PY" -c 'import sysconfig, torch.utils.cpp_extension as c
print(*(f"-isystem {path}" for path in (*c.include_paths(), sysconfig.get_paths()["include"])))') || exit 1
out=build/arm_check
mkdir -p "$out"
failed=0
for source in csrc/ops.cpp csrc/*/cpu/*.cpp; do
  # shellcheck disable=SC2086
  "$PY" -m ziglang c++ -target aarch64-linux-gnu -std=c++20 -O2 -Wall @csrc/stable_abi.flags $headers -c "$source" \
    -o "$out/$(echo "$source" | tr / _).o" || { echo "arm-check: FAILED: $source"; failed=1; }
done
[ "$failed" = 0 ] && echo "arm-check: all compiled for aarch64; nothing was run"
exit "$failed"
