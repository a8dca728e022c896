#!/usr/bin/env bash
# Builds, links and imports fastif for CUDA without a GPU, in a copy of the tree, and runs there the tests that need no
# GPU. Compiling alone does not show that the library loads. Called by `make cuda-link`; takes several GB and minutes.
#   PYTHON     makes the venv (default python3)
#   CUDA_VENV  the venv with a CUDA build of torch and pip's nvcc; made where it is absent (default .venv-cuda)
set -eu
cd "$(dirname "$0")/.."
CUDA_VENV=${CUDA_VENV:-.venv-cuda}
if [ ! -e "$CUDA_VENV/ready" ]; then
  "${PYTHON:-python3}" -m venv "$CUDA_VENV"
  # Three equal signs: two also mean 2.13.0+cpu, where pip knows a place that has it.
  "$CUDA_VENV/bin/python" .ci/requirements.py build test cuda > "$CUDA_VENV/requirements.txt"
  "$CUDA_VENV/bin/pip" install -q "torch===2.13.0" -r "$CUDA_VENV/requirements.txt"
  touch "$CUDA_VENV/ready"
fi
python=$(cd "$CUDA_VENV/bin" && pwd)/python
tree=build/cuda_link
mkdir -p "$tree"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  if [ -e "$file" ]; then printf '%s\0' "$file"; fi
done | xargs -0 cp -p --parents -t "$tree"
cd "$tree"
# pip's toolkit, which has no libcudart.so to link with, whatever other toolkit there is.
CUDA_HOME=$("$python" -c 'import nvidia; print(nvidia.__path__[0] + "/cu13")')
PATH=$(dirname "$python"):/usr/bin:/bin
export CUDA_HOME PATH PYTHONPATH="$PWD"
FASTIF_CUDA=1 "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { tail -n 40 build.log; exit 1; }
grep '^fastif:' build.log
"$python" -c '
import fastif
info = fastif.build_info()
assert info["compiled"] and info["cuda"], info
print("cuda-link: imported", info)
'
ls -l fastif/_C*.so | awk '{ printf "cuda-link: %s has %.1f MB\n", $NF, $5 / 1e6 }'
"$python" -m pytest -q -p no:cacheprovider tests/ops tests/influence/test_influence.py
echo "cuda-link: built, linked, imported; no kernel was run"
