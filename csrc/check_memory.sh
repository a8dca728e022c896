#!/bin/sh
# The ops' calls with AddressSanitizer watching the CPU kernels: what is read or written outside of a tensor ends them.
# Called by `make memory-check`; it builds in a copy of the tree. (Leaks are not looked for: Python ends with many.)
#   PY           python that has torch and pytest (default python3)
#   FASTIF_FUZZ  calls with spoiled arguments (default 100000)
set -eu
cd "$(dirname "$0")/.."
PY=$(realpath -s "$(command -v "${PY:-python3}")")
out=build/memory_check
rm -rf "$out" && mkdir -p "$out"
cp -r setup.py pyproject.toml README.md csrc fastif tests "$out"
rm -f "$out"/fastif/_C*.so "$out"/fastif/_memory*.so
cd "$out"
watched="-fsanitize=address -fno-omit-frame-pointer"
FASTIF_CUDA=0 FASTIF_MEMORY=0 CFLAGS=$watched CXXFLAGS=$watched LDFLAGS=-fsanitize=address \
  "$PY" setup.py -q build_ext --inplace > log 2>&1 || { cat log; exit 1; }
# Python is not built with it: the library has to come first. What it waits for may be thrown from C++'s.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 OMP_NUM_THREADS=1 PYTHONPATH="$PWD" FASTIF_FUZZ="${FASTIF_FUZZ:-100000}"
"$PY" -c 'import ctypes, numpy, torch
from fastif.ops import per_sample_grad
short = torch.zeros(20)
longer = numpy.frombuffer((ctypes.c_float * 30).from_address(short.data_ptr()), dtype=numpy.float32)
per_sample_grad.sq_norms(torch.from_numpy(longer).view(3, 10), torch.ones(3, 2))' > log 2>&1 || true
grep -q "heap-buffer-overflow" log || { echo "memory-check: a planted overflow was not seen:"; cat log; exit 1; }
"$PY" -m pytest -q --capture=sys -p no:cacheprovider -m "not slow" tests/ops/test_contracts.py tests/ops/test_outs.py \
  tests/ops/test_per_sample_grad.py tests/ops/test_ggn_block.py tests/ops/test_kronecker_block.py \
  tests/ops/test_farthest_first.py tests/ops/test_farthest_first_lazy.py tests/ops/test_factor_dots.py
