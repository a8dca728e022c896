#!/usr/bin/env bash
# Builds the wheel of the CPU kernels that serves every torch from 2.11 and every Python from 3.10 on, holds it against
# the stable ABIs and manylinux_2_28, and tries it: installed without a compiler in reach, the ops' tests, and the time
# from `pip install` to the end of README's first example. Called by `make wheel`.
#   PY    python to build with, which has torch and pyproject's extras build and wheel (default python3)
#   TRY   pythons to try it with, each of which has a torch and the packages of the extra test (default: PY)
set -eu
cd "$(dirname "$0")/.."
PY=${PY:-python3}
TRY=${TRY:-$PY}
out=build/wheel
rm -rf "$out"
mkdir -p "$out/raw" "$out/temp"
tools=$(dirname "$(command -v "$PY")")
FASTIF_CUDA=0 FASTIF_MEMORY=0 "$PY" setup.py -q build -b "$out/temp" bdist_wheel -d "$out/raw" >"$out/build.log" 2>&1 \
  || { tail -n 40 "$out/build.log"; exit 1; }
PATH="$tools:$PATH" "$PY" -m auditwheel repair --plat manylinux_2_28_x86_64 --exclude 'libtorch*' --exclude 'libc10*' \
  -w "$out" "$out"/raw/*.whl >"$out/auditwheel.log" 2>&1 || { cat "$out/auditwheel.log"; exit 1; }
wheel=$(echo "$out"/*.whl)
echo "wheel: $wheel, $(($(stat -c %s "$wheel") / 1024)) KiB"
"$PY" -m zipfile -e "$wheel" "$out/unpacked"
PATH="$tools:$PATH" torch-abi-audit --check both "$out/unpacked/fastif/_C.abi3.so"

# The tests, beside no source of the package; and README's example, which ends with its first score.
mkdir "$out/tried"
cp -r tests pyproject.toml README.md "$out/tried"
sed -n '/^```python$/,/^```$/p' README.md | sed '1d; /^```$/,$d' >"$out/tried/example.py"
wheel=$PWD/$wheel
cd "$out/tried"
for python in $TRY; do
  case $python in */*) ;; *) python=$(command -v "$python") ;; esac
  name=$("$python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")')
  site=$PWD/$(echo "$name" | tr -c 'A-Za-z0-9.\n' _)
  run() { env -i HOME="$HOME" PATH=/nowhere PYTHONPATH="$site" OMP_NUM_THREADS=1 "$python" "$@"; }
  began=$(date +%s%N)
  "$PY" -m pip install -q --no-deps --no-index --target "$site" --python-version 3.10 --only-binary :all: \
    --platform manylinux_2_28_x86_64 --abi abi3 --implementation cp "$wheel"
  run -W error example.py >example.log 2>&1 || { cat example.log; exit 1; }
  seconds=$(($(date +%s%N) - began))
  run -c 'import fastif; assert fastif.build_info()["compiled"], fastif.build_info()'
  # What those two ask about are the sources and how a library is loaded, which stand elsewhere.
  run -m pytest -p no:cacheprovider -m "not slow" tests/ops --ignore tests/ops/test_plain.py \
    --ignore tests/ops/test_registration.py >tests.log 2>&1 || { tail -n 40 tests.log; exit 1; }
  rm -rf runs
  awk -v name="$name" -v ns="$seconds" -v tests="$(tail -n 1 tests.log)" \
    'BEGIN { printf "wheel: %s: %.1f s to install it and to run README'"'"'s example; ops: %s\n", name, ns / 1e9, tests }'
done
